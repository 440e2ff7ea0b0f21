"""A FLUX.2 model: its folder, and each of its parts as training and encoding need it."""
