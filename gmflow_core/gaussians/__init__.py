"""Gaussian mixtures: algebra, draws, density, transport to the standard normal distribution."""
