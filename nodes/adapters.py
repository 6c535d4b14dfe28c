"""GM adapters: a LoRA and a head that make a mixture model of a base model, whatever loader that comes from."""

from __future__ import annotations

import os

import comfy.utils
import folder_paths
from comfy_api.latest import io

from .comfyui.adapter import with_adapter

FOLDER = "loras"


class GMFlowAdapter(io.ComfyNode):
    """A GM adapter on any MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowAdapter",
            display_name="GM Adapter",
            category="GMFlow",
            description="Makes a FLUX.1 or Qwen-Image model (or FLUX.2, see the README) predict a Gaussian mixture, so that "
            "the GM Policy Sampler needs 4 steps. The model may come from any loader (fp8, int8, GGUF), with LoRA loaders "
            "before or after; to stock samplers it is an ordinary model.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX.1 dev or Qwen-Image model from any loader; FLUX.2 as far as its adapter is known.",
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A GM adapter from models/loras, such as gmflux_k8_piid_4step or gmqwen_k8_piid_4step. Keep the "
                    "number of steps in its name: it tells how many the adapter was made for.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Of the adapter's LoRA part. A little above 1 can sharpen text and details, above all on "
                    "fine-tuned models.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For GM Policy Sampler or GM Sampler, or any stock sampler, which follows the mean."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **kwargs) -> list:
        """A file that was replaced is loaded again. A name that comes over a wire is not known yet."""
        path = folder_paths.get_full_path(FOLDER, adapter_name) if adapter_name else None
        return [os.stat(path).st_mtime, os.stat(path).st_size] if path else []

    @classmethod
    def execute(cls, model, adapter_name: str, strength: float) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, adapter_name)
        if not adapter_name.endswith((".safetensors", ".sft")):
            raise ValueError(
                f"{adapter_name} is not a safetensors file; GM adapters are published as such"
            )
        try:
            tensors, metadata = comfy.utils.load_torch_file(
                path, safe_load=True, return_metadata=True
            )
        except Exception as error:
            raise ValueError(
                f"{adapter_name} cannot be read ({error}). An incomplete download has to be repeated"
            ) from error
        return io.NodeOutput(with_adapter(model, tensors, metadata, strength, adapter_name))
