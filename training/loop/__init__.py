"""Training loops: trainers, objectives, optimizers, settings."""
