"""A node that trains a few-step GM adapter for the model that is connected."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.adapter_folder import adapter_names, find_adapter
from .comfyui.bases import base_names
from .comfyui.files import fingerprint
from .comfyui.schema import ADVANCED, node_schema, seed_input
from .comfyui.train_adapter import train_adapter
from .comfyui.train_file import adapter_path
from .comfyui.train_lora import MLP, TARGETS
from .comfyui.train_optimizer import OPTIMIZERS
from .comfyui.train_prompts import encode, prompts_of, prompts_path
from .comfyui.train_settings import DX, GM, GUIDANCES, NONE, TrainSettings
from .comfyui.train_state import times_lost

NEW = "(new)"  # choice of no adapter to begin with


def data_inputs() -> list[io.Input]:
    """Return the inputs for the teacher, the prompts and the size."""
    return [
        io.Model.Input(
            "model",
            tooltip="The teacher: a model from any loader (16 bit, fp8, int8, GGUF), with LoRAs on "
            f"it if you like, of one of these kinds: {base_names()}. Its weights are not changed.",
        ),
        io.Latent.Input(
            "latent_image",
            tooltip="An empty latent: its size is what is trained on, its batch size the number of "
            "pictures in an iteration. 512 x 512 costs a quarter of 1024 x 1024.",
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="The prompts: one conditioning, or a list of them. Each iteration draws one. "
            "For FLUX.1 and FLUX.2 all through one FluxGuidance.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What the teacher's guidance steers away from. If clip is connected, an empty "
            "text counts without it.",
        ),
        io.Clip.Input("clip", optional=True, tooltip="The text encoders, for prompts_file alone."),
        io.String.Input(
            "prompts_file",
            default="",
            optional=True,
            placeholder="prompts.txt",
            tooltip="A text file in ComfyUI's input folder with one prompt a line, for clip.",
        ),
    ]


def student_inputs() -> list[io.Input]:
    """Return the inputs for what the student is to be."""
    return [
        io.Int.Input(
            "steps", default=4, min=1, max=8, tooltip="Network calls that the adapter is made for."
        ),
        io.Combo.Input(
            "policy",
            options=[GM, DX],
            default=GM,
            tooltip="gm predicts a Gaussian mixture for each latent pixel; dx predicts velocities "
            "at K times.",
        ),
        io.Int.Input(
            "K",
            default=8,
            min=1,
            max=64,
            tooltip="Gaussians of a mixture, or times of dx (10 in the published ones).",
        ),
        io.Combo.Input(
            "teacher_guidance",
            options=list(GUIDANCES),
            default=NONE,
            tooltip="Guidance of the teacher, which the student learns to do without: none for "
            "models that are guidance-distilled (FLUX.1 dev, FLUX.2 dev); cfg for the others, with "
            "their usual scale; or GMFlow's probabilistic guidance.",
        ),
        io.Float.Input(
            "teacher_scale",
            default=4.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="The cfg scale, such as 4, or the weight of probabilistic guidance, below 1. "
            "Without guidance it counts for nothing.",
        ),
    ]


def run_inputs() -> list[io.Input]:
    """Return the inputs for the run."""
    return [
        io.Int.Input(
            "iterations",
            default=1000,
            min=1,
            max=1_000_000,
            tooltip="Steps of the optimizer. A run of the same name and settings goes on from "
            "where it ended; a higher number lets it go on further.",
        ),
        io.Float.Input(
            "learning_rate", default=1e-4, min=1e-7, max=0.1, step=1e-7, tooltip="Of AdamW."
        ),
        io.Int.Input(
            "rank", default=32, min=1, max=512, tooltip="Of the LoRA; published adapters have 256."
        ),
        seed_input("seed", "Of the noise, the prompts' order and the new weights.", stays=True),
        io.String.Input(
            "save_name",
            default="my_adapter_4step",
            tooltip="Name of the file in models/loras, for GM Adapter. The state from which a run "
            "goes on is beside it.",
        ),
    ]


def advanced_inputs() -> list[io.Input]:
    """Return the inputs that are seldom changed."""
    more = {"optional": True, **ADVANCED}
    return [*start_inputs(more), *loss_inputs(more), *machine_inputs(more)]


def start_inputs(more: dict) -> list[io.Input]:
    """Return the inputs for what is trained; `more` are options of each."""
    return [
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default=MLP,
            tooltip="The layers that the LoRA changes. published: the MLPs and the time embedding, "
            "as in the published adapters; attention too: those and the attention.",
            **more,
        ),
        io.Combo.Input(
            "warm_start",
            options=[NEW, *adapter_names()],
            default=NEW,
            tooltip="An adapter to begin with, such as a published one of the same base: much "
            "shorter. K, rank and targets are then its own.",
            **more,
        ),
    ]


def loss_inputs(more: dict) -> list[io.Input]:
    """Return the inputs for the loss; `more` are options of each."""
    return [
        io.Int.Input(
            "states",
            default=2,
            min=1,
            max=16,
            tooltip="Places on each segment at which the teacher is asked.",
            **more,
        ),
        io.Int.Input(
            "window",
            default=3,
            min=0,
            max=32,
            tooltip="Substeps, of 128, over which the velocities are compared.",
            **more,
        ),
        io.Float.Input(
            "dropout",
            default=0.05,
            min=0.0,
            max=0.9,
            step=0.01,
            tooltip="Share of the Gaussians that is left out where the policy is followed.",
            **more,
        ),
        io.Float.Input(
            "shift",
            default=3.2,
            min=0.1,
            max=20.0,
            step=0.01,
            tooltip="Time shift that the adapter is made for, written into its file.",
            **more,
        ),
        io.Int.Input(
            "decay",
            default=0,
            min=0,
            max=1_000_000,
            tooltip="Iterations over which the states move from the teacher's own path to the "
            "student's; the published FLUX.1 adapters have 2000, those of Qwen-Image 0.",
            **more,
        ),
    ]


def machine_inputs(more: dict) -> list[io.Input]:
    """Return the inputs for the optimizer and the files; `more` are options of each."""
    return [
        io.Int.Input("warmup", default=20, min=0, max=10_000, tooltip=WARMUP, **more),
        io.Combo.Input(
            "optimizer", options=list(OPTIMIZERS), default=OPTIMIZERS[0], tooltip=EIGHT, **more
        ),
        io.Boolean.Input("ema", default=True, tooltip=EMA, **more),
        io.Boolean.Input("gradient_checkpointing", default=True, tooltip=CHECKPOINTING, **more),
        io.Int.Input("preview_every", default=50, min=0, max=100_000, tooltip=PREVIEW, **more),
        io.Int.Input("checkpoint_every", default=100, min=0, max=100_000, tooltip=FILES, **more),
    ]


WARMUP = "Iterations over which the learning rate rises."
EIGHT = "adamw8bit keeps its state in 8 bits, and needs the package bitsandbytes."
EMA = "Use a moving average of the weights, kept in the computer's memory."
CHECKPOINTING = "Compute blocks again in the backward pass: a third slower, far less memory."
PREVIEW = "Iterations between pictures beside the progress bar; 0 for none."
FILES = "Iterations between files; 0 writes one at the end. An interrupted run writes one too."


class GMFlowTrainAdapter(io.ComfyNode):
    """Train a GM adapter for a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowTrainAdapter",
            display_name="GM Train Adapter",
            category="GMFlow/training",
            aliases="train, distill, distillation, few step, turbo, lightning, pi-flow, piflow, "
            "imitation, lora, adapter, fine-tune, 4 steps",
            description="Makes a few-step adapter for your own model, fine-tune or LoRA, without "
            "data: from noise the student goes its own way, and where it gets, the model itself is "
            "asked (imitation distillation, pi-Flow). The adapter is written to models/loras for "
            f"GM Adapter. Base models: {base_names()}.",
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            inputs=[*data_inputs(), *student_inputs(), *run_inputs(), *advanced_inputs()],
            outputs=[
                io.Model.Output(tooltip="The model with the new adapter, as GM Adapter gives it."),
                io.String.Output("name", display_name="name", tooltip="Of the adapter's file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, warm_start=None) -> bool | str:
        """Check that the adapter exists; a linked name is not known yet."""
        name = next(iter(warm_start or []), None)
        if name not in (None, NEW):
            find_adapter(name)
        return True

    @classmethod
    def fingerprint_inputs(cls, save_name=None, prompts_file=None, **kwargs) -> list:
        """Return what changes with the prompts' file, and when files of a training are deleted.

        Linked values are not known yet.
        """
        name, prompts = next(iter(save_name or []), None), next(iter(prompts_file or []), None)
        found = [] if name is None else [times_lost(adapter_path(name))]
        return found + (fingerprint(prompts_path(prompts)) if (prompts or "").strip() else [])

    @classmethod
    def execute(cls, model, latent_image, **inputs) -> io.NodeOutput:
        lists = {name: inputs.pop(name, []) for name in ("positive", "negative", "clip")}
        for kind, values in {"model": model, "latent_image": latent_image, **lists}.items():
            if len(values) > 1 and kind != "positive":
                raise ValueError(
                    f"only one {kind} is taken, and there are {len(values)}; connect a single one: "
                    "of the inputs, positive alone takes a list"
                )
        given = {name: values[0] for name, values in inputs.items() if values}
        clip = next(iter(lists["clip"]), None)
        prompts = prompts_of(lists["positive"], clip, given.pop("prompts_file", ""))
        name, run = given.pop("save_name"), settings_of(given)
        negative = next(iter(lists["negative"]), None)
        if negative is None and clip is not None and run.guidance != NONE:
            negative = encode(clip, "")
        negative = None if negative is None else negative[:1]
        latent = latent_image[0]
        return io.NodeOutput(*train_adapter(model[0], prompts, negative, latent, run, name))


def settings_of(given: dict) -> TrainSettings:
    """Return the settings that a node's inputs mean."""
    renamed = {"K": "count", "teacher_guidance": "guidance", "teacher_scale": "scale"}
    renamed["gradient_checkpointing"] = "checkpointing"
    values = {renamed.get(name, name): value for name, value in given.items()}
    if values.get("warm_start") == NEW:
        values["warm_start"] = ""
    if values.get("guidance", NONE) == NONE:
        values["scale"] = 1.0
    return TrainSettings(**values)
