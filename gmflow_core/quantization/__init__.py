"""Quantised weights, one file per format."""
