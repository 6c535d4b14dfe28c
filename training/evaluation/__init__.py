"""Evaluation: features, metrics, sweeps, reports."""
