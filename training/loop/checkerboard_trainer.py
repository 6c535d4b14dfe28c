"""Train a small network on the 2-D checkerboard."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
from training.common.settings import SMALLEST_SIGMA
from training.data.batches import rows_of
from training.evaluation.checkerboard_report import write_report
from training.loop.checkerboard_presets import CheckerboardConfig
from training.loop.optimizer import power_decay
from training.loop.trainer import Trainer

PICTURE_SAMPLES = 10_000


def draw_batch(config: CheckerboardConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the whole batch of an iteration from the CPU generator that all processes share.

    Returns:
        "x" (B, 2) and "sigma" (B,); with a transition loss "x_low" and "sigma_low", otherwise the
        "velocity" (B, 2).
    """

    def normal():
        return torch.randn(config.batch_size, 2, generator=generator)

    x0 = draw_checkerboard(config.batch_size, generator)
    sigma_high = torch.rand(config.batch_size, generator=generator).clamp(min=SMALLEST_SIGMA)
    if config.transition_ratio is None:
        noise = normal()
        return {"x": diffuse(x0, sigma_high, noise), "sigma": sigma_high, "velocity": noise - x0}
    sigma_low = sigma_high * (1 - config.transition_ratio)
    x_low = diffuse(x0, sigma_low, normal())
    x_high = forward_transition(x_low, sigma_low, sigma_high, normal())
    return {"x": x_high, "sigma": sigma_high, "x_low": x_low, "sigma_low": sigma_low}


def loss_of(model: Callable[[Tensor, Tensor], GaussianMixture], batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch, in nats per point without the 2 pi constant."""
    mixture = model(batch["x"], batch["sigma"])
    if "velocity" in batch:
        return nll(mixture, batch["velocity"]).mean()
    return transition_nll(
        mixture, batch["x_low"], batch["x"], batch["sigma_low"], batch["sigma"]
    ).mean()


class CheckerboardTrainer(Trainer):
    """A checkerboard run.

    Raises:
        ValueError: the processes do not divide the batch; or as `Trainer`.
    """

    module = "training.checkerboard"
    free_to_change = Trainer.free_to_change | {"evaluate", "eval_samples"}
    config: CheckerboardConfig

    def __init__(self, config: CheckerboardConfig):
        self.generator = torch.Generator().manual_seed(config.seed + 1)
        super().__init__(config)
        acc = self.accelerator
        rows_of(acc.process_index, acc.num_processes, config.batch_size, 1)  # for its error

    def new_model(self) -> GMFlowMLP:
        """Create the network."""
        config = self.config
        return GMFlowMLP(
            GMFlowMLPConfig(
                num_components=config.num_components, constant_log_std=config.constant_log_std
            )
        )

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Create AdamW or Adam, without weight decay."""
        cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[self.config.optimizer]
        return cls(self.model.parameters(), lr=self.config.lr, weight_decay=0.0, fused=True)

    def backward(self) -> dict[str, Tensor]:
        """Compute the gradients of this process's share of a batch; return the loss."""
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
        """Return the decay of the power-function profile."""
        return power_decay(step)

    def draw_picture(self, model: GMFlowMLP) -> Tensor:
        """Draw the density of GM-SDE samples in 4 steps."""
        points = sample_points(model, PICTURE_SAMPLES, solver="gm-sde", steps=4)
        return density_picture(points, bins=64)

    def extra_state(self) -> dict[str, Tensor]:
        """Return the state of the generator of batches."""
        return {"rng": self.generator.get_state()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Load the state of the generator of batches."""
        self.generator.set_state(state["rng"])

    def export(self) -> None:
        """Write the weights to share in float16, with their report in the metadata."""
        path, model = self.config.out / "weights.safetensors", self.sampling_model()
        if not self.accelerator.is_main_process:
            return
        facts = self.facts()
        save_checkpoint(model, path, facts=facts, dtype=torch.float16)
        report = write_report(
            path, self.config.out, self.config.eval_samples, device=self.config.device
        )
        save_checkpoint(model, path, facts={**facts, "report": report}, dtype=torch.float16)
