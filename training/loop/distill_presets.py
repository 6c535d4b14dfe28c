"""Settings of imitation distillation, and their presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gmflow_core.files.data_record import MOST_STEPS, STUDENT_RANGES
from gmflow_core.sampling.guidance import GUIDANCE_KINDS, Guidance
from training.common.settings import require
from training.loop.config import ValidatedConfig

GuidanceKind = Literal[tuple(GUIDANCE_KINDS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(ValidatedConfig):
    """Imitation distillation. The defaults shown are those of the chosen preset.

    Raises:
        ValueError: a setting is out of its range, or two of them do not go together.
    """

    preset: Literal["small", "imagenet"] = "small"
    """Preset that sets the other defaults: for models that a CPU can train, or pi-Flow's."""
    teacher: str = "outputs/digits/weights.safetensors"
    """Checkpoint whose flow is imitated: a file, a folder of diffusers' layout, or a hub id."""
    out: Path = Path("outputs/distilled")
    """Folder for checkpoint, TensorBoard logs and pictures; a run found there is resumed."""
    steps: int = 1
    """Network calls of the student."""
    policy: Literal["gm", "dx"] = "gm"
    """What the student predicts in a call: a Gaussian mixture, or x_0 at some times."""
    num_components: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 8
    """K, the number of Gaussians; or the number of times of a DX policy."""
    guidance: float | None = None
    """Guide the teacher: weight w in [0, 1) of probabilistic guidance, or the scale of cfg.
    The student learns the guided flow, and is sampled without guidance."""
    guidance_kind: GuidanceKind = "probabilistic"
    """Kind of the teacher's guidance."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Sigmas between which the teacher is guided."""
    data: Path | None = None
    """Start from real samples, in a folder written by training.prepare; None starts from noise."""
    source: str | None = None
    """Mixture source that the teacher was trained with; needed where it knows the modes."""
    states: int = 2
    """Places on each segment at which the teacher is asked."""
    window: int = 2
    """Substeps over which mean velocities are compared; 0 and 1 compare them at one place."""
    substeps: int = 32
    """Substeps of a policy, for the whole of time."""
    dropout: float = 0.05
    """Probability with which a Gaussian is left out where the policy is followed."""
    time_shift: float = 1.0
    """Shift of times towards noise, sigma = shift t / (1 + (shift - 1) t)."""
    final_step_size: float = 1.0
    """Length of the last segment relative to the others, in [0.001, 1]."""
    decay_iterations: int = 0
    """Iterations over which the teacher's own path gives way to the student's; 0 begins with the
    student's."""
    class_dropout: float = 0.1
    """Share of the labels that are replaced by "none", so that the student can be guided;
    0 with --guidance."""
    accumulate: int = 1
    """Pieces that each process's part of a batch is divided into, to fit into memory."""
    optimizer: Literal["auto", "adamw8bit", "adamw"] = "adamw"
    """AdamW with 8-bit state (bitsandbytes) or with 32-bit state; auto: 8-bit where it runs."""
    weight_decay: float = 0.0
    """Weight decay of the weights; biases have none."""
    clip: float = 1.0
    """Largest norm of the gradient, after the warm-up."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, about a third more time."""
    workers: int | None = 0
    """Processes that read --data, for each GPU; None: one for each core, up to 8."""
    vae: str | None = None
    """Folder or hub id of the VAE that decodes the pictures of a model of latents."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "num_components", "states", "substeps", "accumulate"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("window", "decay_iterations"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require((self.workers or 0) >= 0, "workers", self.workers, "0 or more")
        divided = self.shard and self.optimizer == "adamw8bit"
        require(not divided, "optimizer", self.optimizer, "adamw or auto with --shard")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        # as in the student's file, which has to be read again
        require(self.steps <= MOST_STEPS, "steps", self.steps, f"at most {MOST_STEPS}")
        for name, field in (("shift", "time_shift"), ("final_step_size", "final_step_size")):
            (low, high), value = STUDENT_RANGES[name], getattr(self, field)
            require(low <= value <= high, field, value, f"from {low:g} to {high:g}")
        require(0 <= self.class_dropout < 1, "class_dropout", self.class_dropout, "in [0, 1)")
        require(self.clip > 0, "clip", self.clip, "positive")
        everywhere = self.guidance_interval == (0.0, 1.0)
        fits = self.teacher_guidance() is not None or everywhere  # checks the values
        require(fits, "guidance_interval", self.guidance_interval, "given with a --guidance")
        fits = self.policy == "gm" or self.source is None
        require(fits, "policy", self.policy, "gm with --source")
        start = self.data is None or self.source is None
        require(start, "data", self.data, "left out with --source, whose noise starts the student")

    def teacher_guidance(self) -> Guidance | None:
        """Return the teacher's guidance; None if it has none, or one that never acts.

        Raises:
            ValueError: a value is out of range.
        """
        if self.guidance is None:
            return None
        found = Guidance(self.guidance, self.guidance_kind, interval=self.guidance_interval)
        return None if found.idle else found


_SMALL = DistillConfig(
    batch_size=64,
    iterations=2000,
    lr=1e-3,
    lr_schedule="cosine",
    warmup=50,
    checkpoint_every=500,
    log_every=50,
    picture_every=500,
)
PRESETS = {
    "small": _SMALL,
    "imagenet": dataclasses.replace(  # pi-Flow's student of one step, of 676 M parameters
        _SMALL,
        preset="imagenet",
        teacher="Lakonik/gmflow_imagenet_k8_ema",
        num_components=32,
        window=0,
        substeps=128,
        batch_size=4096,
        iterations=140_000,
        lr=5e-5,
        lr_schedule="constant",
        warmup=400,
        clip=50 / 3,  # pi-Flow clips at 50, and its loss is 3 times this one
        optimizer="auto",
        precision="bf16",
        gradient_checkpointing=True,
        checkpoint_every=1000,
        log_every=100,
        picture_every=5000,
        workers=None,
    ),
}
