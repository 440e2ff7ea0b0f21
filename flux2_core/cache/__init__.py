"""What is cached: keys and fingerprints of rows, the index that ties tables together, and their upkeep."""
