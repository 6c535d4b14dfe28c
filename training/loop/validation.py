"""Measure the Fréchet distance of a run's samples to real images, at chosen iterations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from gmflow_core.files.errors import FileError
from training.common.processes import together
from training.encoders.fingerprints import MARK, fingerprint
from training.evaluation.chunks import Chunks
from training.evaluation.metrics import Statistics, Sums, frechet_distance
from training.evaluation.real_images import PreparedImages, to_images
from training.evaluation.reference import (
    check_dimensions,
    feature_key,
    measure_chunks,
    open_reference,
)
from training.evaluation.reference_statistics import combine, load_features
from training.loop.config import ValidatedConfig

BATCH = 100  # samples that a process draws at a time
CHUNK = 500  # images of the reference in a file


class Validation:
    """Fréchet distance of samples, with the features and references of training.evaluate.

    All processes draw a share of the samples; sample i has its own seed, so that their number
    changes nothing. Nothing is drawn from PyTorch's own generator, and so training goes on as it
    would without. The reference is measured once, and kept in OUT/validation.

    Args:
        config: of the run.
        shape: (C, h, w) of a sample.
        vae: decoder of the samples; None for pixels.
        vae_name: for the record of what was measured.

    Attributes:
        every: iterations between measurements.

    Raises:
        FileNotFoundError, ModuleNotFoundError: features or reference are missing.
        ValueError: they do not fit each other or the samples.
    """

    def __init__(
        self,
        config: ValidatedConfig,
        shape: tuple[int, ...],
        vae: Any = None,
        vae_name: str | None = None,
    ):
        if vae is None and shape[0] != 3:
            raise ValueError(
                f"samples of shape {shape} are no pictures to validate; for latents give --vae, or "
                "set --validate-every 0"
            )
        self.config, self.state, self.vae = config, PartialState(), vae
        self.every, self.shape = config.validation_interval, shape
        features = config.features or "inception"
        self.extractor = load_features(features, config.inception_weights, self.state)
        self.size = shape[1] * (1 if vae is None else vae.factor)
        self.check_size()
        self.reference = self.measured(config.reference or config.data, vae_name)

    def check_size(self) -> None:
        """Check that the features are of images of the samples' size.

        Raises:
            ValueError: they are not.
        """
        blank = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)
        self.extractor.extract(blank)

    def measured(self, path: Path, vae_name: str | None) -> Statistics | None:
        """Return statistics of the reference in the main process; None in the others.

        Raises:
            FileNotFoundError, ValueError: see `open_reference`.
        """
        config, state = self.config, self.state
        images, given = open_reference(path, config.reference_count, self.size, self.prepared)
        check_dimensions(given, path, self.extractor)
        if given.statistics is not None:
            return given.statistics
        key = {"of": images.key, **feature_key(self.extractor), "vae": vae_name}
        if self.vae is not None:
            key[MARK] = fingerprint(self.vae, decoding=True)
        chunks = Chunks(config.out / "validation", key, len(images), CHUNK)
        measure_chunks(chunks, images, self.extractor, state, "reference")
        return combine(chunks, 0)[0] if state.is_main_process else None

    def prepared(self, folder: Path) -> PreparedImages:
        """Open a prepared folder as a reference.

        Raises:
            FileError: its samples are of another kind or shape than the run's.
        """
        config, device = self.config, self.state.device
        images = PreparedImages(folder, config.reference_count, self.vae, device, BATCH)
        kind = "pixels" if self.vae is None else "latents"
        if (images.data.kind, images.data.shape) != (kind, self.shape):
            found = f"holds {images.data.kind} of shape {images.data.shape}"
            wanted = f"the samples are {kind} of shape {self.shape}: give another --reference"
            raise FileError(folder, found, wanted)
        return images

    def figures(
        self, model: nn.Module, draw: Callable[[nn.Module, range], Tensor]
    ) -> dict[str, float]:
        """Return the distance of the model's samples in the main process, nothing in the others.

        Args:
            model: the same one in all processes.
            draw: called with it and numbers of samples; returns these (n, C, h, w).

        Returns:
            "frechet_distance", the FID if the features are Inception's; NaN if a sample is not
            finite.
        """
        state, count = self.state, self.config.validate_count
        sums, finite = Sums(), True
        with together(state):
            first, end = (count * (state.process_index + i) // state.num_processes for i in (0, 1))
            for start in range(first, end, BATCH):
                x = draw(model, range(start, min(start + BATCH, end)))
                finite = finite and bool(x.isfinite().all())
                if finite:
                    images = to_images(x, self.vae, state.device)
                    sums.add(self.extractor.extract(images)["features"])
        found = gather_object([(sums, finite)]) if state.num_processes > 1 else [(sums, finite)]
        if not state.is_main_process:
            return {}
        if not all(each for _, each in found):
            return {"frechet_distance": math.nan}
        whole = Sums()
        for part, _ in found:
            whole.merge(part)
        return {"frechet_distance": frechet_distance(whole.statistics(), self.reference)}
