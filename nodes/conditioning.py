"""Nodes that make CONDITIONING."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..gmflow_core.files.labels import find_label
from .comfyui.gm_model import ImageNetwork
from .comfyui.model_folders import class_names
from .comfyui.options import class_conditioning, unconditional

ONLY_MORE = "(only more_labels)"


class GMFlowUnconditional(io.ComfyNode):
    """Empty CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowUnconditional",
            display_name="GM Unconditional",
            category="GMFlow",
            description="Empty conditioning, in nodes that ask for one (KSampler, Basic Guider, CFG Guider): for models that "
            "take none, such as the checkerboard; and no class, for class-conditional ones.",
            inputs=[],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Says nothing; connect it to positive, and to negative where asked."
                )
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(unconditional())


class GMFlowClassLabels(io.ComfyNode):
    """Class labels as CONDITIONING, with a latent that fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowClassLabels",
            display_name="GM Class Labels",
            category="GMFlow",
            description="What a class-conditional model (digits, ImageNet) is to generate, and an empty latent of its size: "
            "one batch item for each label, or several.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A class-conditional model from Load GM Model; its names count.",
                ),
                io.Combo.Input(
                    "label",
                    options=[*class_names(), ONLY_MORE],
                    tooltip="The first label. The list holds the names of all models that are installed, in the hub's cache, "
                    "or were loaded (press R to renew it, type to search it); choose one that the connected model has.",
                ),
                io.String.Input(
                    "more_labels",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="more labels, one per line",
                    tooltip="Further labels, one per line: a name, a part of a name that fits only one class, or a number.",
                ),
                io.Int.Input(
                    "repeat",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Images of each label.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The labels, one for each image."
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="No class: what guidance steers away from.",
                ),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Empty, of the model's own size, one item for each image.",
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    tooltip="The full names of the classes, one per line.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, label: str) -> bool:
        """Any text will do: what a model from the hub calls its classes is not in the list."""
        return True

    @classmethod
    def execute(cls, model, label: str, more_labels: str = "", repeat: int = 1) -> io.NodeOutput:
        network = model.get_model_object("diffusion_model")
        if not isinstance(network, ImageNetwork):
            raise ValueError(
                "GM Class Labels needs a class-conditional model, and this one takes no class labels; load digits or an "
                "ImageNet model with 'Load GM Model', or use 'GM Unconditional'"
            )
        config, names = network.network.config, network.label_names
        wanted = [] if label == ONLY_MORE else [label]
        wanted += [line for line in more_labels.splitlines() if line.strip()]
        if not wanted:
            raise ValueError(
                "there are no labels; choose one, or write some into more_labels, one per line"
            )
        try:
            labels = [find_label(text, names, config.num_classes) for text in wanted]
        except ValueError as error:
            raise ValueError(f"{error} (in more_labels, one per line)") from error
        images = [label for label in labels for _ in range(repeat)]
        latent = torch.zeros(
            (len(images), config.channels, config.latent_size, config.latent_size),
            device=comfy.model_management.intermediate_device(),
        )
        found = "\n".join(names[label] if names else str(label) for label in labels)
        return io.NodeOutput(
            class_conditioning(images), unconditional(), {"samples": latent}, found
        )
