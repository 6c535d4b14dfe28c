"""Fitting mixture sources."""
