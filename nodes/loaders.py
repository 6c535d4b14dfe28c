"""A node that loads GM models."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.files import fingerprint
from .comfyui.gm_model import DTYPES, load_gm_model
from .comfyui.model_folders import files_of, find_model, installed_models
from .comfyui.schema import node_schema
from .comfyui.solver_choice import no_effect


class GMFlowLoader(io.ComfyNode):
    """A node that loads a GM checkpoint as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowLoader",
            display_name="GM Load Model",
            category="GMFlow/loaders",
            aliases="load checkpoint, gaussian mixture, gaussian, gmflow, gm-dit, emoji, "
            "digits, checkerboard, imagenet, flow matching, few step",
            description="Loads a model that predicts a Gaussian mixture. The MODEL is an ordinary "
            "one: stock samplers run on it and follow the mixture's mean; the GM samplers use the "
            "whole mixture.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(installed_models()),
                    tooltip="A checkpoint from the models/gmflow folder (or the gmflow folders of "
                    "extra_model_paths.yaml), or one shipped with the extension. A file that "
                    "training wrote, or a folder in the layout of diffusers such as "
                    "gmflow_imagenet_k8_ema, can be copied there as it is.",
                ),
                io.String.Input(
                    "hub_id_or_path",
                    default="",
                    optional=True,
                    placeholder="hub id or path instead",
                    tooltip="Instead of the choice above: a path, or the id or address of a model "
                    "on the Hugging Face hub, such as Lakonik/gmflow_imagenet_k8_ema. It is "
                    "downloaded once, into the hub's cache; a folder of the same name in "
                    "models/gmflow is preferred.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    optional=True,
                    tooltip="Type of the weights in memory. default: as stored, and fp32 for "
                    "models below 100 million parameters. The mixture is computed in fp32 with "
                    "every type.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For the GM samplers, or any stock sampler.")],
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, hub_id_or_path: str | None = ""
    ) -> bool | str:
        """Check that the chosen model exists; linked names are not known yet."""
        if model_name is not None and hub_id_or_path is not None:
            find_model(model_name, hub_id_or_path)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        model_name: str | None,
        hub_id_or_path: str | None = "",
        weight_dtype: str | None = "default",
    ) -> list:
        """Return what changes when a file is trained further, or a folder replaced."""
        if model_name is None or hub_id_or_path is None:
            return []
        source = find_model(model_name, hub_id_or_path)
        return [weight_dtype, *fingerprint(source, *files_of(source))]

    @classmethod
    def execute(
        cls, model_name: str, hub_id_or_path: str = "", weight_dtype: str = "default"
    ) -> io.NodeOutput:
        if hub_id_or_path.strip():
            no_effect(f"model_name ({model_name})", "hub_id_or_path is used")
        return io.NodeOutput(load_gm_model(find_model(model_name, hub_id_or_path), weight_dtype))
