"""Tables in a folder or on object storage: rows that exist exactly once, and files written whole."""
