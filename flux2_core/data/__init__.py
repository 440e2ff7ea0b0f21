"""Data sets: from folders and files to the samples table."""
