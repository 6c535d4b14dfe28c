"""Sets of pictures on which samplers are compared: coloured digits and emoji.

A set prepares its pictures, trains a small classifier on them for its features, and draws noise and
labels for samples, each once for a work folder; then it scores samples by the figures of
training.evaluate, and samples models inside ComfyUI.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core.gaussians.draws import standard_normal
from training.data.shards import to_model, to_pixels
from training.evaluation.classifier import ClassifierFeatures, train_classifier
from training.evaluation.metrics import Reference, measure, score, statistics
from training.evaluation.models import class_shares, image_labels, image_seeds
from training.evaluation.real_images import PreparedImages
from training.evaluation.saturation import saturation_distance

from .stock import sampled
from .tables import Row

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ALL = 10**9  # pictures


class PictureSet:
    """Pictures, noise and labels of samples, and what the samples are compared with.

    A kind of pictures is a class of its own, which says how they are made.

    Args:
        work: folder for all files, whose names begin with the set's.

    Attributes:
        name: of the set.
        samples: how many are drawn; as many as there are held-out pictures if None.
        feature_iterations: of the classifier's training.
        uneven: classes are drawn as often as the pictures have them, not all alike.
        known: distance of saturations (N,) to a known distribution; None: to the pictures' own.
        classes: names of the classes.
        train, test: pictures uint8 (N, 3, H, W) and labels (N,), in a random order.
        noise, labels: of the samples, (n, 3, H, W) and (n,), as training.evaluate draws them.
        inputs: file of both.
        features: file of the classifier.
    """

    name: str
    samples: int | None = None
    feature_iterations = 1200
    uneven = False
    known = None

    def __init__(self, work: Path):
        self.work, self.inputs = work, work / f"{self.name}_inputs.safetensors"
        self.features = work / f"{self.name}_features.safetensors"
        train, test = (PreparedImages(self.prepared(s), ALL, None, CPU, 100) for s in PARTS)
        self.classes = tuple(train.data.classes)
        self.train, self.test = train.get(range(len(train))), test.get(range(len(test)))
        if not self.features.is_file():
            iterations = {"test": self.test, "iterations": self.feature_iterations}
            train_classifier(*self.train, self.classes, **iterations).save(self.features)
        self.extractor = ClassifierFeatures.load(self.features)
        self.count = self.samples or len(test)
        measures = measure(self.train[0], self.extractor, self.train[1])
        self.reference = Reference(statistics(measures.features), measures, self.count)
        self.seeds = image_seeds(0, range(self.count))
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        shares = class_shares(self.train[1], len(self.classes)) if self.uneven else None
        self.labels = image_labels(self.seeds, len(self.classes), shares)
        shape = (self.count, *train.data.shape)
        self.noise = standard_normal(shape, generators, like=torch.zeros(1))
        save_file({"noise": self.noise, "labels": self.labels}, self.inputs)

    def prepared(self, part: str) -> Path:
        """Return the prepared folder of a part, "train" or "test", made on the first call."""
        folder = self.work / f"{self.name}_{part}"
        if not folder.is_dir():
            self.prepare(part, folder)
        return folder

    def prepare(self, part: str, folder: Path) -> None:
        """Make the pictures of a part, and prepare them into a folder."""
        raise NotImplementedError

    def score(self, samples: Tensor, labels: Tensor | None = None) -> Row:
        """Return the figures of samples (n, 3, H, W) in [-1, 1].

        Args:
            labels: (n,); the first of the set's own if None.
        """
        labels = self.labels[: len(samples)] if labels is None else labels
        found = measure(to_pixels(samples), self.extractor, labels)
        figures = score(found, self.reference, classes=self.classes, known=self.known)
        return {**figures, "out_of_range": (samples.abs() > 1).double().mean().item()}

    def floor(self) -> Row:
        """Return the figures of as many held-out pictures, or of all if there are fewer."""
        pictures, labels = (tensor[: self.count] for tensor in self.test)
        return self.score(to_model(pictures), labels)

    def compare(self, settings: list[Row], checkpoint: Path) -> list[Row]:
        """Sample settings of a model in ComfyUI and score each that gave finite samples."""
        found = sampled(self.work, checkpoint, self.inputs, settings)
        return [
            {**setting, **facts, **self.score(samples)}
            for setting, (samples, facts) in zip(settings, found, strict=True)
            if samples.isfinite().all()
        ]


PARTS = ("train", "test")


class Digits(PictureSet):
    """The coloured digits of 8 x 8 pixels."""

    name, samples = "digits", 1000
    known = staticmethod(saturation_distance)

    def prepare(self, part: str, folder: Path) -> None:
        """Draw the digits on the first call, and prepare those of a part."""
        pictures = self.work / "digits"
        if not pictures.is_dir():
            _command("training.digits", "--out", pictures)
        data = ("--data", pictures / part, "--out", folder)
        _command("training.prepare", *data, "--size", "8", "--pixels", "--no-flip")


class Emoji(PictureSet):
    """Noto's emoji of 32 x 32 pixels, of which people are more than half."""

    name, uneven = "emoji", True

    def prepare(self, part: str, folder: Path) -> None:
        """Write the emoji on the first call (npm downloads them), and prepare those of a part."""
        pictures = self.work / "emoji"
        if not pictures.is_dir():
            _command("training.emoji", "--out", pictures)
        data = ("--data", pictures / part, "--out", folder)
        _command("training.prepare", *data, "--size", "32", "--pixels")


def _command(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
