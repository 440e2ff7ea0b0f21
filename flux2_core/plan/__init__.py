"""What `plan` says before anything is spent."""
