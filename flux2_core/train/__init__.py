"""Training: batches, methods, optimizer and loop."""
