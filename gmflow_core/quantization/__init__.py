"""Quantised weights, a file a format."""
