"""A node that puts a GM adapter, a LoRA and a head, on a base model from any loader."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from .comfyui.adapter import with_adapter
from .comfyui.bases import base_names
from .comfyui.files import fingerprint, read_tensors
from .comfyui.model_folders import LORAS


class GMFlowAdapter(io.ComfyNode):
    """Put a GM adapter on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowAdapter",
            display_name="GM Adapter",
            category="GMFlow",
            description="Makes a base model predict a Gaussian mixture, so that the GM Policy "
            f"Sampler needs 4 steps. Base models: {base_names()}. (The names of the LoRA layers in "
            "FLUX.2's adapter are a guess; see docs/flux_and_qwen.md.) The model may come from any "
            "loader (fp8, int8, GGUF), with LoRA loaders before or after; to stock samplers it is "
            "an ordinary model.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=f"A model from any loader, of one of these kinds: {base_names()}. "
                    "FLUX.1 has to be the dev version.",
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=folder_paths.get_filename_list(LORAS),
                    tooltip="A GM adapter from models/loras, such as gmflux_k8_piid_4step or "
                    "gmqwen_k8_piid_4step. Keep the number of steps in its name: it tells how many "
                    "the adapter was made for.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of the adapter's LoRA part. A little above 1 can sharpen "
                    "text and details, above all on fine-tuned models.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For GM Policy Sampler or GM Sampler, or any stock sampler, which "
                    "follows the mean."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **kwargs) -> list:
        """Return what changes when the file is replaced; a linked name is not known yet."""
        path = folder_paths.get_full_path(LORAS, adapter_name) if adapter_name else None
        return fingerprint(path) if path else []

    @classmethod
    def execute(cls, model, adapter_name: str, strength: float) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(LORAS, adapter_name)
        if not adapter_name.endswith((".safetensors", ".sft")):
            raise ValueError(
                f"{adapter_name} is not a safetensors file; GM adapters are published as such"
            )
        tensors, metadata = read_tensors(path, adapter_name)
        return io.NodeOutput(with_adapter(model, tensors, metadata, strength, adapter_name))
