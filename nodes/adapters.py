"""Nodes that put a GM adapter, a LoRA and a head, on a base model, and that describe one."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .comfyui.adapted_loader import base_files, base_path, load_base
from .comfyui.adapter import fit_in_words, load_adapted
from .comfyui.adapter_details import describe_adapted, describe_file
from .comfyui.adapter_folder import adapter_names, find_adapter
from .comfyui.adapter_info import adapter_of
from .comfyui.bases import base_names
from .comfyui.files import fingerprint
from .comfyui.model_folders import blamed
from .comfyui.schema import ADVANCED, node_schema

OF_MODEL = "(on the connected model)"  # choice of no file
WORDS = (
    "pi-flow, piflow, arcflow, few step, 4 steps, 2 steps, turbo, lightning, distilled, flux, "
    "qwen, lora, adapter, load lora, fp8"
)


def adapter_input() -> io.Input:
    """Return the input for the name of an adapter."""
    return io.Combo.Input(
        "adapter_name",
        options=adapter_names(),
        tooltip="A GM adapter: first those found in models/loras (by what is in the file, whatever "
        "it is called), then published ones, which are downloaded once, when the node first runs "
        "(1 to 2 GB, into the Hugging Face hub's cache), unless they are in models/loras, then all "
        "other LoRAs. The steps and the schedule that it was made for are read from the file; if "
        "it does not say them, the number of steps is the one in its name or its folder's.",
    )


class GMFlowAdapter(io.ComfyNode):
    """Put a GM adapter on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowAdapter",
            display_name="GM Adapter",
            category="GMFlow/loaders",
            aliases=WORDS,
            description="Makes a base model predict a policy, such as a Gaussian mixture, for the "
            "time until the next network call, so that the GM Policy Sampler needs 4 steps "
            f"(pi-Flow) or 2 (ArcFlow). Base models: {base_names()}. The model may come from any "
            "loader (fp8, int8, GGUF), with LoRA loaders before or after; to stock samplers it is "
            "an ordinary model.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=f"A model from any loader, of one of these kinds: {base_names()}. "
                    "FLUX.1 has to be the dev version.",
                ),
                adapter_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of the adapter's LoRA part. A little above 1 can sharpen "
                    "text and details, above all on fine-tuned models.",
                ),
                io.String.Input(
                    "hub_id_or_path",
                    default="",
                    placeholder="hub id or path instead",
                    tooltip="Instead of the choice above: a file, or an adapter on the Hugging "
                    "Face hub as owner/name:folder or as its address, such as "
                    "Lakonik/pi-FLUX.1:gmflux_k8_piid_4step. It is downloaded once, into the hub's "
                    "cache; a file or folder of that name in models/loras is preferred.",
                    optional=True,
                    **ADVANCED,
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
    def validate_inputs(
        cls, adapter_name: str | None = None, hub_id_or_path: str | None = ""
    ) -> bool | str:
        """Check that the file exists; linked names are not known yet."""
        if adapter_name is not None and hub_id_or_path is not None:
            if hub_id_or_path.strip():
                find_adapter(adapter_name, hub_id_or_path)
            else:
                blamed("adapter_name", find_adapter, adapter_name)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, adapter_name: str | None, hub_id_or_path: str | None = "", **kwargs
    ) -> list:
        """Return what changes when the file is replaced; linked names are not known yet."""
        if adapter_name is None or hub_id_or_path is None:
            return []
        return find_adapter(adapter_name, hub_id_or_path).stamp()

    @classmethod
    def execute(
        cls, model, adapter_name: str, strength: float, hub_id_or_path: str = ""
    ) -> io.NodeOutput:
        file = find_adapter(adapter_name, hub_id_or_path)
        unused = adapter_name if hub_id_or_path.strip() else ""
        return io.NodeOutput(load_adapted(model, file, strength, unused))


class GMFlowAdaptedModel(io.ComfyNode):
    """Load a base model with a GM adapter on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowAdaptedModel",
            display_name="GM Load Model with Adapter",
            category="GMFlow/loaders",
            aliases=f"{WORDS}, load diffusion model, load pi-flow model, gguf",
            description="Load Diffusion Model and GM Adapter in one node: a base model "
            f"({base_names()}) that makes pictures in 4 steps. Workflows made for ComfyUI-piFlow "
            "get it in the place of Load pi-Flow Model.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=base_files(),
                    tooltip="The base model, from models/diffusion_models; GGUF files too if "
                    "ComfyUI-GGUF is installed.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"],
                    default="default",
                    tooltip="Type of the base model's weights in memory, as in Load Diffusion "
                    "Model. default: as stored. fp8 halves the memory of a 16-bit file.",
                ),
                adapter_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the adapter's LoRA part. Stay between 0.9 and 1.2.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For the GM samplers, or any stock sampler.")],
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, adapter_name: str | None = None
    ) -> bool | str:
        """Check that the files exist; linked names are not known yet."""
        if model_name is not None:
            blamed("model_name", base_path, model_name)
        if adapter_name is not None:
            blamed("adapter_name", find_adapter, adapter_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None, adapter_name: str | None, **kwargs) -> list:
        """Return what changes when a file is replaced; linked names are not known yet."""
        if model_name is None or adapter_name is None:
            return []
        return [*fingerprint(base_path(model_name)), *find_adapter(adapter_name).stamp()]

    @classmethod
    def execute(
        cls, model_name: str, weight_dtype: str, adapter_name: str, strength: float
    ) -> io.NodeOutput:
        file, base = find_adapter(adapter_name), load_base(model_name, weight_dtype)
        return io.NodeOutput(load_adapted(base, file, strength))


class GMFlowAdapterInfo(io.ComfyNode):
    """Show what a GM adapter holds, and what it fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowAdapterInfo",
            display_name="GM Adapter Info",
            category="GMFlow/loaders",
            aliases="adapter, info, inspect, metadata, lora, pi-flow, piflow, rank, few step",
            description="Shows an adapter's file, base model, policy, K, steps, shift, last step "
            "and guidance, the layers that its LoRA changes, and whether it fits a model. Only the "
            "file's header is read.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=[OF_MODEL, *adapter_names()],
                    default=OF_MODEL,
                    tooltip="An adapter from models/loras; or the one on the connected model.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A base model, to see whether the chosen adapter fits it; or a model "
                    "with an adapter on it.",
                ),
            ],
            outputs=[io.String.Output("info", display_name="info", tooltip="The text shown.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str | None = None) -> bool | str:
        """Check that the file exists; a linked name is not known yet."""
        if adapter_name not in (None, OF_MODEL):
            find_adapter(adapter_name)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **kwargs) -> list:
        """Return what changes with what is told of the file; a linked name is not known yet."""
        return [] if adapter_name in (None, OF_MODEL) else find_adapter(adapter_name).shown()

    @classmethod
    def execute(cls, adapter_name: str, model=None) -> io.NodeOutput:
        if adapter_name != OF_MODEL:
            text = describe_file(find_adapter(adapter_name), model and fit_in_words(model))
        else:
            adapter = adapter_of(model.model_options) if model else None
            if adapter is None:
                found = "the connected model has no GM adapter on it" if model else "none is chosen"
                raise ValueError(
                    f"{found}; choose an adapter's name, or connect the MODEL of a GM Adapter"
                )
            text = describe_adapted(adapter)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
