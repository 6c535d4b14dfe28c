"""GMFlow for ComfyUI."""

if __package__:  # imported by ComfyUI, not collected by a test runner

    async def comfy_entrypoint():
        """ComfyUI's door (V3 schema)."""
        from .nodes import GMFlowExtension

        return GMFlowExtension()
