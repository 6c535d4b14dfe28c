"""All that touches the internals of ComfyUI."""
