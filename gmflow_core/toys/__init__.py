"""2-D toys: the checkerboard, samples of 2-D models, and their pictures."""
