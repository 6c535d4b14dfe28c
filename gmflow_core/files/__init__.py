"""Files: checkpoints, class labels, diffusers folders, the hub."""
