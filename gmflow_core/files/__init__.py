"""Files: atomic writes, checkpoints, class names, folders in the layout of diffusers, the hub."""
