"""Training loops: the loop itself, its settings, and the trainers of each kind of model."""
