"""GMFlow for ComfyUI: the entry point that ComfyUI looks for."""

WEB_DIRECTORY = "./web"  # scripts and help pages, which ComfyUI's page loads

if __package__:  # imported by ComfyUI, not collected by a test runner

    async def comfy_entrypoint():
        """Return the extension, as ComfyUI's V3 schema asks for."""
        from .nodes import GMFlowExtension

        return GMFlowExtension()
