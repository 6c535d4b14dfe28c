"""A small classifier, trained on the data, as feature extractor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.files.data_record import LONGEST_NAME
from gmflow_core.files.errors import FileError, printable, quoted, reading
from gmflow_core.files.json_files import json_object, parse_json
from gmflow_core.files.safetensors_files import check_finite, read_safetensors, write_safetensors
from gmflow_core.models.settings import check_settings
from gmflow_core.models.state_dict import check_shapes, shapes_of
from training.evaluation.extractors import SPATIAL_CHANNELS, check_images, flat_maps

FORMAT = "gmflow-features-1"
TRAIN_AGAIN = "delete it, or give --features another file name, to train the features again"
LARGEST = 64  # pixels per side
HELD_OUT = 0.1  # share of the images that tests the classifier if there is no test set


@dataclass(frozen=True)
class ClassifierConfig:
    """Hyperparameters of `Classifier`.

    Args:
        height, width: of the images in pixels, 1 to 64.
        num_classes: at least 2.
        channels: of the first layer; the next ones have twice and four times as many.
        features: width of the layer before the last.

    Raises:
        ValueError: a value is out of range.
    """

    height: int
    width: int
    num_classes: int
    channels: int = 32
    features: int = 64

    def __post_init__(self):
        check_settings(self)
        if not (1 <= self.height <= LARGEST and 1 <= self.width <= LARGEST):
            raise ValueError(
                f"the small classifier takes images up to {LARGEST} x {LARGEST}, not "
                f"{self.height} x {self.width}; use --features inception"
            )
        if self.num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, not {self.num_classes}")
        if self.channels < 8 or self.channels % 8 or self.features < 1:
            raise ValueError(
                f"channels {self.channels} and features {self.features} must be a multiple of 8, "
                "and at least 1"
            )


class Classifier(nn.Module):
    """A small convolutional network.

    Pairs of 3 x 3 convolutions halve the image down to about 4 pixels per side; two linear layers
    follow.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        size, here = max(config.height, config.width), config.channels
        layers = [nn.Conv2d(3, here, 3, padding=1)]
        while True:
            wider = min(2 * here, 4 * config.channels)
            layers += [nn.GroupNorm(8, here), nn.SiLU(), nn.Conv2d(here, wider, 3, padding=1)]
            here = wider
            if size <= 4:
                break
            layers.append(nn.AvgPool2d(2, ceil_mode=True))
            size = (size + 1) // 2
        layers += [nn.GroupNorm(8, here), nn.SiLU()]
        self.pooling = len(layers)  # place in the body
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(16 * here, config.features), nn.SiLU())
        self.head = nn.Linear(config.features, config.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, features) and logits (B, num_classes) of uint8 (B, 3, H, W)."""
        features = self.body[self.pooling :](self.maps(images))
        return features, self.head(features)

    def maps(self, images: Tensor) -> Tensor:
        """Return the last feature map before pooling, (B, 4 channels, h, w), h and w at most 4."""
        return self.body[: self.pooling](images.float() / 127.5 - 1)


class ClassifierFeatures:
    """Features of a small classifier: its layer before the last, and its probabilities.

    Spatial features are 7 channels of its last feature map before pooling; their distance is no
    sFID, but measures the same of small images: where things are.

    Args:
        network: the trained classifier.
        classes: names of the classes, in the order of the labels.
        training: how it was trained and its accuracy, see `train_classifier`.
        name: for reports.
    """

    def __init__(
        self,
        network: Classifier,
        classes: tuple[str, ...],
        training: dict[str, Any],
        name: str = "classifier",
    ):
        self.network = network.eval().requires_grad_(False)
        self.classes, self.training, self.name = classes, training, name
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """Name, dimensions, spatial dimensions, fingerprint and training, for a report."""
        config = self.network.config
        height, width = config.height, config.width
        while max(height, width) > 4:
            height, width = (height + 1) // 2, (width + 1) // 2
        facts = {
            "name": self.name,
            "dimensions": config.features,
            "spatial_dimensions": SPATIAL_CHANNELS * height * width,
            "fingerprint": self.fingerprint[:16],
        }
        return {**facts, **self.training}

    def to(self, device: str | torch.device) -> ClassifierFeatures:
        """Move the network to a device."""
        self.network.to(device)
        return self

    @torch.inference_mode()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Extract features, spatial features and class probabilities.

        Args:
            images: uint8 (B, 3, H, W) of the size that the classifier was trained on.

        Returns:
            "features" (B, 64), "spatial" (B, 7 h w) and "probabilities" (B, classes), on the CPU.

        Raises:
            ValueError: the images have another size.
        """
        config = self.network.config
        if check_images(images).shape[2:] != (config.height, config.width):
            raise ValueError(
                f"the features {self.name} are of images of {config.height} x {config.width} "
                f"pixels, not {images.shape[2]} x {images.shape[3]}; give --features another file "
                "name to train them on this data"
            )
        network = self.network
        maps = network.maps(images.to(network.head.weight.device))
        features = network.body[network.pooling :](maps)
        probabilities = network.head(features).softmax(1)
        return {
            "features": features.cpu(),
            "spatial": flat_maps(maps),
            "probabilities": probabilities.cpu(),
        }

    def accuracy(self, images: Tensor, labels: Tensor, chunk: int = 1000) -> float:
        """Return the share of images uint8 (N, 3, H, W) that get their label (N,)."""
        found = [self.extract(part)["probabilities"].argmax(1) for part in images.split(chunk)]
        return (torch.cat(found) == labels.cpu()).double().mean().item()

    def save(self, path: str | Path) -> None:
        """Write network, classes and training to a safetensors file, atomically."""
        metadata = {
            "format": FORMAT,
            "config": json.dumps(asdict(self.network.config)),
            "classes": json.dumps(self.classes),
            "training": json.dumps(self.training),
        }
        tensors = {name: t.cpu().contiguous() for name, t in self.network.state_dict().items()}
        write_safetensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> ClassifierFeatures:
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, or is damaged.
        """
        path = Path(path)
        tensors, metadata = read_safetensors(path, TRAIN_AGAIN)
        if metadata.get("format") != FORMAT:
            found = quoted(metadata.get("format"))
            raise FileError(
                path,
                f"holds no features that this version knows (format {found}, not {FORMAT!r})",
                "give --features another file name to train them",
            )
        for name, tensor in tensors.items():
            check_finite(tensor, name, path)
        with reading(path, TRAIN_AGAIN):
            config = ClassifierConfig(**json_object(metadata["config"], path, "config"))
            with torch.device("meta"):  # no memory before the sizes are compared
                expected = shapes_of(Classifier(config).state_dict())
            check_shapes(expected, shapes_of(tensors), "its config")
            network = Classifier(config)
            network.load_state_dict(tensors)
            classes = parse_json(metadata["classes"], path, what="list of classes")
            training = json_object(metadata["training"], path, "training record")
            texts = isinstance(classes, list) and all(isinstance(each, str) for each in classes)
            if not texts or len(classes) != config.num_classes:
                raise FileError(path, f"has the classes {quoted(classes)}", TRAIN_AGAIN)
            accuracy = training.get("accuracy")
            if type(accuracy) is not float or not 0 <= accuracy <= 1:
                raise FileError(path, f"has the accuracy {quoted(accuracy)}", TRAIN_AGAIN)
            classes = tuple(printable(each, LONGEST_NAME) for each in classes)
        return cls(network.to(device), classes, training, path.stem)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    *,
    test: tuple[Tensor, Tensor] | None = None,
    iterations: int = 1200,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    name: str = "classifier",
) -> ClassifierFeatures:
    """Train a small classifier with cross-entropy, AdamW, a one-cycle schedule and `jitter`.

    The weight decay is strong, so that features of training images resemble those of new ones.

    Args:
        images: uint8 (N, 3, H, W), up to 64 x 64.
        labels: (N,) indices into `classes`.
        test: images and labels of a test set; if None, a tenth of the images is held out.

    Returns:
        The classifier. Its `training` holds the accuracy on the test images, their source and
        number, the number of training images, the iterations and the seed.

    Raises:
        ValueError: the images are not uint8 RGB, too large or too few, or of one class only.
    """
    check_images(images)
    if len(images) != len(labels) or len(images) < 20 or labels.unique().numel() < 2:
        raise ValueError(
            f"{len(images)} images with {len(labels)} labels of {labels.unique().numel()} classes "
            "cannot train a classifier; at least 20 images of 2 classes are needed (--data)"
        )
    generator = torch.Generator().manual_seed(seed)
    test_set = "held-out images of the training data" if test is None else "test data"
    if test is None:
        order = torch.randperm(len(images), generator=generator)
        held_out, rest = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
        test, images, labels = (images[held_out], labels[held_out]), images[rest], labels[rest]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(ClassifierConfig(*images.shape[2:], len(classes))).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations)
    bar = tqdm(
        range(iterations), desc="training the features", disable=not progress, dynamic_ncols=True
    )
    for step in bar:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x = jitter(images[chosen].to(device, torch.float32), generator)
        loss = F.cross_entropy(network(x)[1], labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    features = ClassifierFeatures(network, tuple(classes), {}, name)
    features.training = {
        "accuracy": features.accuracy(*test),
        "tested_on": test_set,
        "test_images": len(test[0]),
        "train_images": len(images),
        "iterations": iterations,
        "seed": seed,
    }
    return features


def jitter(
    images: Tensor,
    generator: torch.Generator,
    turn: float = 0.2,
    grow: float = 0.1,
    shift: float = 0.15,
) -> Tensor:
    """Rotate, scale and shift each image a little, at random; border pixels are repeated outwards.

    Args:
        images: float (B, 3, H, W).
        turn: largest rotation in radians.
        grow: largest relative change of width and of height.
        shift: largest shift in half sides.

    Returns:
        (B, 3, H, W).
    """
    angle, stretch_x, stretch_y, x, y = torch.rand(5, len(images), generator=generator) * 2 - 1
    cos, sin = (turn * angle).cos(), (turn * angle).sin()
    rows = (
        [cos * (1 + grow * stretch_x), -sin, shift * x],
        [sin, cos * (1 + grow * stretch_y), shift * y],
    )
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1).to(images.device)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
