"""Load the feature extractor of an evaluation, or train it on the data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from gmflow_core.files.atomic import check_target
from gmflow_core.files.locks import locked_file
from training.common.processes import together
from training.evaluation.classifier import ClassifierFeatures, train_classifier
from training.evaluation.extractors import Extractor
from training.evaluation.inception import InceptionFeatures
from training.evaluation.inputs import Inputs
from training.evaluation.reference import prepared_images

MOST_IMAGES = 200_000  # to train or test a classifier


def load_extractor(inputs: Inputs) -> Extractor:
    """Load Inception or the small classifier; the main process downloads or trains it first.

    Raises:
        FileNotFoundError, ModuleNotFoundError: Inception's weights or torch-fidelity are missing.
        ValueError: the file is damaged, or its classes or image size are not the data's.
    """
    config = inputs.config
    if config.features == "inception":
        with inputs.state.main_process_first():
            return InceptionFeatures(config.inception_weights, inputs.device)
    path = Path(config.features)
    with together(inputs.state):
        if inputs.main and not path.exists():
            check_target(path)
            with locked_file(path):
                train_features(inputs, path)
    features = ClassifierFeatures.load(path, inputs.device)
    shape, space, size = features.network.config, inputs.space, inputs.size
    other_classes = space.classes not in (None, features.classes)
    if other_classes or (shape.height, shape.width) != (size, size):
        raise ValueError(
            f"{path} is a classifier of {of_classes(features.classes)}images of "
            f"{shape.width} x {shape.height}, but {space.name} has {of_classes(space.classes)}"
            f"images of {size} x {size}; give --features another file name to train one"
        )
    return features


def train_features(inputs: Inputs, path: Path) -> None:
    """Train the small classifier on --data, test it on --test-data if given, and save it."""
    config = inputs.config
    test = None if config.test_data is None else all_images(inputs, config.test_data)
    features = train_classifier(
        *all_images(inputs, config.data),
        inputs.space.classes,
        test=test,
        iterations=config.feature_iterations,
        device=inputs.device,
        name=path.stem,
    )
    features.save(path)
    print(
        f"{path}: a classifier to take features from, right for "
        f"{features.training['accuracy']:.2%} of the test images"
    )


def all_images(inputs: Inputs, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the images uint8 (N, 3, H, W) and labels (N,) of a prepared folder."""
    images = prepared_images(inputs, folder, MOST_IMAGES)
    return images.get(range(len(images)))


def of_classes(classes: tuple[str, ...] | None) -> str:
    """Return "N classes (first three ...) in ", or nothing if the classes are unknown."""
    return "" if classes is None else f"{len(classes)} classes ({', '.join(classes[:3])} ...) in "
