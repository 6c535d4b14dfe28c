"""A node that puts a GM adapter, a LoRA and a head, on a base model from any loader."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.adapter import with_adapter
from .comfyui.adapter_file import read_adapter
from .comfyui.bases import base_names
from .comfyui.files import fingerprint
from .comfyui.model_folders import find_lora, lora_names
from .comfyui.schema import node_schema


class GMFlowAdapter(io.ComfyNode):
    """Put a GM adapter on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowAdapter",
            display_name="GM Adapter",
            category="GMFlow/loaders",
            aliases="pi-flow, piflow, few step, 4 steps, turbo, lightning, distilled, flux, qwen, "
            "lora, adapter, load lora",
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
                    options=lora_names(),
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
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        """Check that the file exists; a linked name is not known yet."""
        if adapter_name is not None:
            find_lora(adapter_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **kwargs) -> list:
        """Return what changes when the file is replaced; a linked name is not known yet."""
        return fingerprint(find_lora(adapter_name)) if adapter_name else []

    @classmethod
    def execute(cls, model, adapter_name: str, strength: float) -> io.NodeOutput:
        tensors, metadata = read_adapter(find_lora(adapter_name))
        return io.NodeOutput(with_adapter(model, tensors, metadata, strength, adapter_name))
