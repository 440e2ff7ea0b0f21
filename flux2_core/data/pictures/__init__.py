"""Pictures: how one is decoded, coloured, fitted and masked."""
