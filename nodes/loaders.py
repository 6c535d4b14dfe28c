"""Nodes that load GM models."""

from __future__ import annotations

import logging
import os

import torch
from comfy_api.latest import io

from ..gmflow_core import load_checkpoint, read_metadata
from ..gmflow_core.files.labels import distinct
from .comfyui.gm_model import gm_model
from .comfyui.model_folders import find_model, installed_models, seen_names

SMALL = 100e6  # parameters of a model for which fp32 costs little
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class GMFlowLoader(io.ComfyNode):
    """A GM checkpoint as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowLoader",
            display_name="Load GM Model",
            category="GMFlow",
            description="Loads a model that predicts a Gaussian mixture. The MODEL is an ordinary one: stock samplers run on "
            "it and follow the mixture's mean; the GM samplers use the whole mixture.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list(installed_models()),
                    tooltip="A checkpoint from the models/gmflow folder (or the gmflow folders of extra_model_paths.yaml), or "
                    "one that comes with the extension. A file that training wrote, or a folder in the layout of diffusers "
                    "such as gmflow_imagenet_k8_ema, can be copied there as it is.",
                ),
                io.String.Input(
                    "hub_id_or_path",
                    default="",
                    optional=True,
                    placeholder="hub id or path instead",
                    tooltip="Instead of the choice above: a path, or the id of a model on the Hugging Face hub, such as "
                    "Lakonik/gmflow_imagenet_k8_ema. It is downloaded once, into the hub's cache; a folder of that name in "
                    "models/gmflow is taken instead.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    optional=True,
                    tooltip="Type of the weights in memory. default: as stored, and fp32 for models below 100 million "
                    "parameters. The mixture's mathematics is in fp32 with every type.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For the GM samplers, or any stock sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str, hub_id_or_path: str = "") -> bool | str:
        """The choice must exist, if it counts."""
        try:
            find_model(model_name, hub_id_or_path)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, model_name: str, hub_id_or_path: str = "", weight_dtype: str = "default"
    ) -> list:
        """A file that was trained on, or a folder that was replaced, is loaded again."""
        source = find_model(model_name, hub_id_or_path)
        files = [source]
        for folder in ("", "transformer", "spectrum_net", "vae") if os.path.isdir(source) else ():
            place = os.path.join(source, folder)
            files += (
                [entry.path for entry in sorted(os.scandir(place), key=lambda e: e.name)]
                if os.path.isdir(place)
                else []
            )
        stats = [os.stat(file) for file in files if os.path.exists(file)]
        return [source, weight_dtype, *((stat.st_mtime, stat.st_size) for stat in stats)]

    @classmethod
    def execute(
        cls, model_name: str, hub_id_or_path: str = "", weight_dtype: str = "default"
    ) -> io.NodeOutput:
        source = find_model(model_name, hub_id_or_path)
        logging.info(
            "GMFlow: loading %s%s",
            source,
            "" if os.path.exists(source) else " from the Hugging Face hub",
        )
        metadata = read_metadata(source)
        network, _ = load_checkpoint(source, dtype=DTYPES[weight_dtype])
        if weight_dtype == "default" and sum(p.numel() for p in network.parameters()) < SMALL:
            network = network.float()
        seen_names.extend(
            name
            for name in distinct(metadata["data"].get("labels") or [])
            if name not in seen_names
        )
        return io.NodeOutput(gm_model(network, metadata["data"]))
