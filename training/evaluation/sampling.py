"""Sample the settings of a sweep."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from gmflow_core.models.precision import set_precision
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.images import sample_images
from training.evaluation.config import Setting
from training.evaluation.inputs import Inputs
from training.evaluation.models import image_labels, image_modes, image_seeds
from training.evaluation.real_images import to_images


class Sampler:
    """Sample settings; one model and the guide are in memory at a time."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.loaded: int | None = None  # number of the model in memory
        self.network: nn.Module | None = None
        self.guide: nn.Module | None = None

    def load(self, model: int) -> None:
        """Load a model and the guide; the model before it is released first."""
        if model == self.loaded:
            return
        inputs, self.network = self.inputs, None
        network = inputs.models[model].load(inputs.device)
        self.network, self.loaded = set_precision(network, inputs.precision), model
        if inputs.guide is not None and self.guide is None:
            self.guide = set_precision(inputs.guide.load(inputs.device), inputs.precision)

    def sample(self, setting: Setting, images: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Sample some images of a setting.

        Args:
            images: their numbers.

        Returns:
            "images" uint8 (n, 3, H, W) and "labels" (n,); and the facts "seconds", "out_of_range"
            (values outside [-1, 1] before they are clamped) and "values".

        Raises:
            ValueError: some samples are not finite.
        """
        inputs, config, started = self.inputs, self.inputs.config, time.perf_counter()
        self.load(setting.model)
        parts, all_labels, outside, values = [], [], 0, 0
        for start in range(images.start, images.stop, config.batch_size):
            batch = range(start, min(start + config.batch_size, images.stop))
            seeds = image_seeds(config.seed, batch)
            x, labels = self.draw(setting, seeds)
            finite = x.flatten(1).isfinite().all(1)
            if not finite.all():
                bad = seeds[finite.tolist().index(False)]
                raise ValueError(
                    f"{setting.name}: the sample of seed {bad} is not finite; the checkpoint may "
                    "have diverged, or try --precision fp32"
                )
            outside, values = outside + int((x.abs() > 1).sum()), values + x.numel()
            parts.append(to_images(x, inputs.vae, inputs.device))
            all_labels.append(labels)
        seconds = time.perf_counter() - started
        facts = {"seconds": seconds, "out_of_range": outside, "values": values}
        return {"images": torch.cat(parts), "labels": torch.cat(all_labels)}, facts

    def draw(self, setting: Setting, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Draw one batch, with label, mode and noise of each image from its own seed.

        Returns:
            Samples (n, C, h, w) in the model's space, and their labels (n,) on the CPU.
        """
        inputs, config, network = self.inputs, self.inputs.config, self.network
        modes = None if inputs.source is None else image_modes(seeds, inputs.source)
        by_mode = inputs.models[setting.model].conditioning == "mode"
        classes = network.config.num_classes
        labels = modes.cpu() if by_mode else image_labels(seeds, max(1, classes), inputs.shares)
        if inputs.is_unlabelled(setting):
            labels = torch.full_like(labels, classes)
        guidance = sigmas = None
        if setting.guidance != "none":
            guidance = Guidance(setting.scale, setting.guidance, interval=config.guidance_interval)
        if setting.steps:
            sigmas = setting.choice.sigmas(config.end)
        spectrum = {} if config.spectrum else {"spectrum": None}
        x = sample_images(
            network,
            None if by_mode else labels,
            solver=setting.solver,
            steps=setting.steps,
            order=config.order,
            substeps=setting.substeps(config),
            sigmas=sigmas,
            shift=setting.choice.shift,
            temperature=setting.choice.temperature,
            guidance=guidance,
            seeds=seeds,
            source=inputs.source,
            modes=modes,
            guide=self.guide,
            guide_scale=config.guide_scale,
            **spectrum,
        )
        return x, labels
