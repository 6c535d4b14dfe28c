"""Sample one LATENT several times, for nodes that lay results side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
from torch import Tensor

from .gm_model import GMModel
from .guiders import gm_guider, guided
from .label_conditioning import NO_TEXT
from .previews import without_previews
from .probabilistic_cfg import has_probabilistic_guidance
from .sample_latent import fitting_samples, initial_noise


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

    def check(self) -> None:
        """Check that what a model needs is there.

        Raises:
            ValueError: there is no prompt for a model that is conditioned on text.
        """
        if self.positive is None and not isinstance(self.model.model, GMModel):
            raise ValueError(
                f"this model ({type(self.model.model).__name__}) is conditioned on text; connect a "
                "prompt (CLIPTextEncode) to positive"
            )

    def sample(
        self,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        seed: int,
        progress: Callable[[], None] = do_nothing,
    ) -> Tensor:
        """Return samples (B, C, *S) on the CPU, from the noise that ComfyUI's samplers would use.

        Args:
            progress: called after every network call that the sampler reports.
        """
        positive = NO_TEXT if self.positive is None else self.positive
        model, samples = without_previews(self.model), fitting_samples(self.model, self.latent)
        if self.guidance and not has_probabilistic_guidance(model):
            model = guided(model)
        result = gm_guider(model, positive, self.negative, self.guidance).sample(
            initial_noise(self.latent, samples, positive, seed),
            samples,
            sampler,
            sigmas,
            denoise_mask=self.latent.get("noise_mask"),
            callback=lambda *report: progress(),
            disable_pbar=True,
            seed=seed,
        )
        return result.cpu()


class Progress:
    """One progress bar over several samplings; the user's interruption ends them all.

    Args:
        calls: network calls in all.
    """

    def __init__(self, calls: int):
        self.bar = comfy.utils.ProgressBar(calls)

    def __call__(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update(1)
