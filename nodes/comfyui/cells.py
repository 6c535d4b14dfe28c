"""Sample one LATENT several times, for nodes that lay results side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
from torch import Tensor

from .previews import without_previews
from .sample_latent import run_sampler


def do_nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is sampled: a MODEL with its conditionings, and a LATENT.

    Args:
        guidance: weight of probabilistic guidance.
    """

    model: Any
    latent: dict
    positive: list | None = None
    negative: list | None = None
    guidance: float = 0.0

    def sample(
        self,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        seed: int,
        progress: Callable[[], None] = do_nothing,
    ) -> Tensor:
        """Return samples (B, C, *S) on the CPU, from the noise that ComfyUI's samplers would use.

        Args:
            progress: called after every step.

        Raises:
            ValueError: a conditioning is missing, or does not fit the model.
        """
        return run_sampler(
            without_previews(self.model),
            self.latent,
            sampler,
            sigmas,
            seed,
            self.positive,
            self.negative,
            self.guidance,
            callback=lambda *report: progress(),
            disable_pbar=True,
        ).cpu()


class Progress:
    """One progress bar over several samplings; the user's interruption ends them all.

    Args:
        steps: of all samplings together.
    """

    def __init__(self, steps: int):
        self.bar = comfy.utils.ProgressBar(steps)

    def __call__(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update(1)
