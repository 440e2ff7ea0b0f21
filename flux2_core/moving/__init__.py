"""Moving in: what other trainers' configurations become here, and what a new one begins with."""
