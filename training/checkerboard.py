"""Train a Gaussian-mixture flow model on the 2-D checkerboard, from the repository's root:

    python -m training.checkerboard                                  # GMFlow's settings: transition loss, AdamW, EMA
    python -m training.checkerboard --preset minimal                 # Adam, plain velocity NLL, no EMA
    python -m training.checkerboard --preset flow-matching           # K = 1 with unit variance: the baseline
    python -m training.checkerboard --out outputs/k16 -k 16 --batch-size 1024 --iterations 20000
    python -m training.checkerboard --evaluate outputs/checkerboard/model.safetensors
    torchrun --nproc-per-node 2 -m training.checkerboard             # DDP on two GPUs; with --device cpu on one machine's CPU

Started again with the same --out, a run goes on from its last checkpoint, to the very losses of a run that was never
stopped. OUT/model.safetensors is the checkpoint to resume from, and loads in ComfyUI at any time. At the end OUT/report.png
and OUT/report.json say how good the samples are, and OUT/weights.safetensors is the model to share: weights alone, in
float16, with these figures in its metadata.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from gmflow_core.files.checkpoint import save_checkpoint
from gmflow_core.flow.losses import nll, transition_nll
from gmflow_core.flow.path import diffuse, forward_transition
from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.toys.checkerboard import draw_checkerboard
from gmflow_core.toys.density_picture import density_picture
from gmflow_core.toys.points import sample_points
from training.common.devices import to_device
from training.evaluation.checkerboard_report import MIN_SIGMA, write_report
from training.loop import trainer
from training.loop.config import TrainerConfig, parse_preset, require

MODULE = "training.checkerboard"
PICTURE_SAMPLES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Checkerboard training. The defaults shown are those of the chosen preset."""

    preset: Literal["full", "minimal", "flow-matching"] = "full"
    """Where the other defaults come from."""
    out: Path = Path("outputs/checkerboard")
    """Folder for the checkpoint, the TensorBoard logs and the report; a run found there is resumed."""
    num_components: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 64
    """K, the number of Gaussians."""
    constant_log_std: float | None = None
    """Fix the mixture's log-std instead of learning it; 0 with K = 1 is ordinary flow matching."""
    transition_ratio: float | None = 0.9
    """How far down the transition loss looks, (sigma_high - sigma_low) / sigma_high in (0, 1]; None: plain velocity NLL."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW (without weight decay) or Adam."""
    ema: bool = True
    """Keep the power-function average of the weights, decay (1 - 1/t)^8, and sample with it."""
    evaluate: Path | None = None
    """Only write the report of this checkpoint, into --out or, without it, beside the checkpoint."""
    eval_samples: int = 200_000
    """Samples per solver and step count in the report."""

    def __post_init__(self):
        super().__post_init__()
        require(self.eval_samples >= 1, "eval_samples", self.eval_samples, "at least 1")
        ratio = self.transition_ratio
        require(ratio is None or 0 < ratio <= 1, "transition_ratio", ratio, "in (0, 1], or None")


PRESETS = {
    "full": Config(),
    "minimal": Config(
        preset="minimal",
        num_components=32,
        transition_ratio=None,
        optimizer="adam",
        ema=False,
        warmup=0,
        iterations=50_000,
    ),
    "flow-matching": Config(
        preset="flow-matching", num_components=1, constant_log_std=0.0, transition_ratio=None
    ),
}


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    return parse_preset(PRESETS, MODULE, __doc__, arguments)


def draw_batch(config: Config, generator: torch.Generator) -> dict[str, Tensor]:
    """The whole batch of one iteration, from the CPU generator that all processes share."""

    def normal():
        return torch.randn(config.batch_size, 2, generator=generator)

    x0 = draw_checkerboard(config.batch_size, generator)
    sigma_high = torch.rand(config.batch_size, generator=generator).clamp(min=MIN_SIGMA)
    if config.transition_ratio is None:
        noise = normal()
        return {"x": diffuse(x0, sigma_high, noise), "sigma": sigma_high, "velocity": noise - x0}
    sigma_low = sigma_high * (1 - config.transition_ratio)
    x_low = diffuse(x0, sigma_low, normal())
    x_high = forward_transition(x_low, sigma_low, sigma_high, normal())
    return {"x": x_high, "sigma": sigma_high, "x_low": x_low, "sigma_low": sigma_low}


def loss_of(model: Callable[[Tensor, Tensor], GaussianMixture], batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the batch, in nats per point without the 2 pi constant."""
    mixture = model(batch["x"], batch["sigma"])
    if "velocity" in batch:
        return nll(mixture, batch["velocity"]).mean()
    return transition_nll(
        mixture, batch["x_low"], batch["x"], batch["sigma_low"], batch["sigma"]
    ).mean()


class Trainer(trainer.Trainer):
    """A checkerboard run."""

    module = MODULE
    free_to_change = trainer.Trainer.free_to_change | {"evaluate", "eval_samples"}

    def __init__(self, config: Config):
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        super().__init__(config)

    def new_model(self) -> GMFlowMLP:
        config = self.config
        return GMFlowMLP(
            GMFlowMLPConfig(
                num_components=config.num_components, constant_log_std=config.constant_log_std
            )
        )

    def new_optimizer(self) -> torch.optim.Optimizer:
        cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[self.config.optimizer]
        return cls(self.model.parameters(), lr=self.config.lr, weight_decay=0.0, fused=True)

    def backward(self) -> dict[str, Tensor]:
        acc = self.accelerator
        share = slice(acc.process_index, None, acc.num_processes)
        batch = {
            k: to_device(v[share], acc.device)
            for k, v in draw_batch(self.config, self.generator).items()
        }

        def network(x: Tensor, sigma: Tensor) -> GaussianMixture:
            with self.autocast():
                return self.prepared(x, sigma)

        loss = loss_of(network, batch)
        acc.backward(loss)
        return {"loss": loss.detach()}

    def decay(self, step: int) -> float:
        """The power-function profile of Karras et al. 2024 with gamma = 7."""
        return (1 - 1 / step) ** 8

    def draw_picture(self) -> Tensor:
        points = sample_points(self.sampling_model(), PICTURE_SAMPLES, solver="gm-sde", steps=4)
        return density_picture(points, bins=64)

    def extra_state(self) -> dict[str, Tensor]:
        return {"rng": self.generator.get_state()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["rng"])

    def export(self) -> None:
        """Write the weights to share, and their report."""
        path, facts = self.config.out / "weights.safetensors", self.facts()
        save_checkpoint(self.sampling_model(), path, facts=facts, dtype=torch.float16)
        report = write_report(
            path, self.config.out, self.config.eval_samples, device=self.config.device
        )
        save_checkpoint(
            self.sampling_model(), path, facts={**facts, "report": report}, dtype=torch.float16
        )


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(arguments)
        if config.evaluate is not None:
            chosen = any(a.split("=")[0] == "--out" for a in arguments)
            out = config.out if chosen else config.evaluate.parent
            write_report(config.evaluate, out, config.eval_samples, device=config.device)
            return
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    run = trainer.main(lambda: Trainer(config))
    if run.accelerator.is_main_process:
        run.export()


if __name__ == "__main__":
    main()
