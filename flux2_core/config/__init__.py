"""The configuration: its sections, and how it is read."""
