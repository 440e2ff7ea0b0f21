"""What: the maths, the models, the tables and the configuration."""
