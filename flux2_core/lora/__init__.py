"""The adapter: which Linears it sits on, its weights, and its files."""
