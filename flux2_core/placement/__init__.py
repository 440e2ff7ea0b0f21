"""Where the frozen base lies: planned, built, sharded or streamed, and what is computed again."""
