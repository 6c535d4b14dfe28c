"""Training from the command line: python -m training.NAME."""
