"""Where a picture's bytes lie: files, objects and members of containers, inside the data set's wall."""
