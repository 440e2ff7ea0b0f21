"""What a step minimises: a protocol, and the methods that fill it."""
