"""Code that touches the internals of ComfyUI: one subject a file."""
