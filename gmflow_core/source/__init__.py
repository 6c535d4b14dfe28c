"""Gaussian-mixture sources (MM-FM): the source, its mode frame, EM, running moments, files."""
