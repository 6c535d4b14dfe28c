"""Nodes that make CONDITIONING."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.class_labels import (
    ONLY_MORE,
    choose_labels,
    classes_for_page,
    empty_images,
    network_of,
)
from .comfyui.label_conditioning import class_conditioning, unconditional
from .comfyui.model_folders import class_names
from .comfyui.schema import node_schema


class GMFlowUnconditional(io.ComfyNode):
    """A node that makes empty CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowUnconditional",
            display_name="GM Unconditional",
            category="GMFlow/sampling",
            aliases="empty conditioning, no prompt, null conditioning, unconditional, "
            "checkerboard, class",
            description="Empty conditioning for nodes that require one (KSampler, Basic Guider, "
            "CFG Guider). Use it with models that take none, such as the checkerboard, and as "
            "'no class' with class-conditional models.",
            inputs=[],
            outputs=[
                io.Conditioning.Output(
                    tooltip="Empty; connect it to positive, and to negative where required."
                )
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(unconditional())


class GMFlowClassLabels(io.ComfyNode):
    """A node that makes CONDITIONING of class labels, and a latent that fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowClassLabels",
            display_name="GM Class Labels",
            category="GMFlow/sampling",
            aliases="class, classes, label, imagenet, emoji, digits, conditioning, prompt",
            description="The classes that a class-conditional model (emoji, digits, ImageNet) is "
            "to generate, and an empty latent of its size: one batch item for each label, or "
            "several.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A class-conditional model from GM Load Model; labels are looked up "
                    "among its class names.",
                ),
                io.Combo.Input(
                    "label",
                    options=[*class_names(), ONLY_MORE],
                    **classes_for_page(),
                    tooltip="The first label. The list holds the class names of the connected "
                    "model; those of all models that are installed, in the hub's cache, or were "
                    "loaded where the page cannot tell (press R to refresh it, type to search "
                    "it).",
                ),
                io.String.Input(
                    "more_labels",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="more labels, one per line",
                    tooltip="Further labels, one per line: a name, a part of a name that fits only "
                    "one class, or a number.",
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
                    tooltip="No class, for guidance to steer away from.",
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
        """Accept any text: the list lacks the classes of models that are not downloaded yet."""
        return True

    @classmethod
    def execute(cls, model, label: str, more_labels: str = "", repeat: int = 1) -> io.NodeOutput:
        network = network_of(model)
        labels, names = choose_labels(network, label, more_labels)
        latent = empty_images(network, len(labels) * repeat)  # refuses too many
        return io.NodeOutput(
            class_conditioning([label for label in labels for _ in range(repeat)]),
            unconditional(),
            latent,
            "\n".join(names),
        )
