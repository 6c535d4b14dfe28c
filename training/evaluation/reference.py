"""Measure the real images that samples are compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from gmflow_core.files.errors import FileError, printable, reading
from training.common.devices import cuda_or_cpu
from training.data.shards import INDEX
from training.evaluation.chunks import AGAIN, Chunks
from training.evaluation.config import NEIGHBOURS
from training.evaluation.extractors import Extractor
from training.evaluation.inputs import Inputs
from training.evaluation.metrics import Measures, Reference, measure, statistics
from training.evaluation.real_images import (
    ArrayImages,
    FolderImages,
    PreparedImages,
    RealImages,
)
from training.evaluation.reference_file import ENDINGS, ReferenceFile, read_reference


def load_reference(inputs: Inputs, extractor: Extractor) -> tuple[Reference, dict[str, Any]]:
    """Measure --reference, or else --data, in all processes.

    Returns:
        The reference, and the facts about it for the report.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it does not fit the features or the samples.
    """
    config = inputs.config
    path = config.reference or config.data
    opened = open_reference(
        path,
        config.reference_count,
        inputs.size,
        lambda folder: prepared_images(inputs, folder, config.reference_count),
    )
    return measure_reference(
        *opened,
        path,
        extractor,
        lambda images: measure_images(inputs, extractor, images, "_reference"),
        config.count,
        config.device,
    )


def open_reference(
    path: Path,
    count: int,
    size: int,
    prepared: Callable[[Path], PreparedImages],
    option: str = "reference",
) -> tuple[RealImages | None, ReferenceFile]:
    """Open a file of a reference, a prepared folder, or a folder of images.

    Args:
        count: images at most.
        size: width and height of images in a folder, which are cropped to it.
        prepared: opens a prepared folder.
        option: that the path comes from, for messages.

    Returns:
        Images, and what the file holds; None or nothing where it has none.

    Raises:
        FileNotFoundError, ValueError: there is no such file or folder, it is damaged, or a file of
            another kind.
    """
    if path.suffix in ENDINGS:
        given = read_reference(path, option)
        if given.images is None:
            return None, given
        stat = path.stat()
        key = {"npz": path.name, "bytes": stat.st_size, "time": stat.st_mtime_ns}
        return ArrayImages(given.images, count, key), given
    if (path / INDEX).exists():
        return prepared(path), ReferenceFile()
    if path.is_dir():
        return FolderImages(path, count, size, option), ReferenceFile()
    advice = f"give --{option} an .npz or .pkl file, or a folder of images"
    if path.exists():
        raise FileError(path, "is no .npz or .pkl file", advice)
    what = "reference " if option == "reference" else ""
    raise FileNotFoundError(printable(f"there is no {what}{path}; {advice}"))


def measure_reference(
    images: RealImages | None,
    given: ReferenceFile,
    path: Path,
    extractor: Extractor,
    measure_all: Callable[[RealImages], Measures],
    limit: int,
    device: str,
) -> tuple[Reference, dict[str, Any]]:
    """Return the reference of `open_reference`'s images and file, and the facts about it.

    Args:
        path: of the reference.
        measure_all: measures images.
        limit: images that precision and recall use.
        device: --device.

    Raises:
        ValueError: the file's statistics are of other features, or there are too few images.
    """
    check_dimensions(given, path, extractor)
    known = given.measures if images is None else images
    if known is not None and len(known) <= NEIGHBOURS:
        raise few_images(path, len(known))
    measures = given.measures if images is None else measure_all(images)
    content = hashlib.sha256(json.dumps(None if images is None else images.key).encode())
    for each in (given.statistics, given.spatial):
        if each is not None:
            content.update(each.mean.tobytes() + each.covariance.tobytes())
    if images is None and measures is not None:
        content.update(measures.features.numpy().tobytes())
    count = 0 if measures is None else len(measures)
    facts = {
        "name": path.name,
        "images": count,
        "images_for_precision_and_recall": min(count, limit),
        "statistics": "of the images" if given.statistics is None else "of the file",
        "fingerprint": content.hexdigest()[:16],
    }
    found, spatial = given.statistics, given.spatial
    if found is None:
        found, spatial = statistics(measures.features), statistics(measures.spatial)
    return Reference(found, measures, limit, cuda_or_cpu(device), spatial), facts


def few_images(path: Path, count: int) -> FileError:
    """Return the error of real images that are too few for precision and recall."""
    needed = f"precision and recall need at least {NEIGHBOURS + 1}; give more"
    return FileError(path, f"has {count} images", needed)


def check_dimensions(given: ReferenceFile, path: Path, extractor: Extractor) -> None:
    """Check that a file's statistics are of these features.

    Raises:
        ValueError: they are of others.
    """
    facts = extractor.facts
    if given.fingerprint not in (None, extractor.fingerprint):
        raise FileError(
            path,
            f"was measured with other features than {extractor.name} has now",
            "give --features those, or write it again with training.reference",
        )
    for name, each, wanted in (
        ("mu", given.statistics, facts["dimensions"]),
        ("mu_s", given.spatial, facts["spatial_dimensions"]),
    ):
        if each is not None and len(each.mean) != wanted:
            raise ValueError(
                f"{path}: {name} has {len(each.mean)} features, but {extractor.name} has {wanted}; "
                "use --features inception with such a file, or give a reference of images"
            )


def prepared_images(inputs: Inputs, folder: Path, count: int) -> PreparedImages:
    """Open a prepared folder of the samples' space; at most `count` images of it.

    Raises:
        ValueError: kind, shape or classes differ from the samples'.
    """
    config, space = inputs.config, inputs.space
    images = PreparedImages(folder, count, inputs.vae, inputs.device, config.batch_size)
    data = images.data
    as_many = space.classes is None or len(data.classes) == len(space.classes)
    same_names = config.data is None or tuple(data.classes) == space.classes
    if (data.kind, data.shape) != (space.kind, space.shape) or not (as_many and same_names):
        known = "" if space.classes is None else f" of {len(space.classes)}"
        raise ValueError(
            f"{folder} has {data.kind} {data.shape} of {len(data.classes)} classes, but "
            f"{space.name} {space.kind} {space.shape}{known}; prepare both with the same command"
        )
    return images


def measure_images(inputs: Inputs, extractor: Extractor, images: RealImages, name: str) -> Measures:
    """Measure real images in all processes, and keep the measures in OUT/measures/NAME."""
    key = {"of": images.key, **feature_key(extractor), **inputs.vae_key}
    folder = inputs.config.out / "measures" / name
    chunks = Chunks(folder, key, len(images), inputs.config.chunk_size)
    measure_chunks(chunks, images, extractor, inputs.state, name.strip("_"))
    return Measures.cat(read_measures(chunks, number) for number in range(len(chunks)))


def feature_key(extractor: Extractor) -> dict[str, Any]:
    """Return the part of a key of measures that says which features they hold."""
    return {"features": extractor.fingerprint, "spatial": extractor.facts["spatial_dimensions"]}


def measure_chunks(
    chunks: Chunks, images: RealImages, extractor: Extractor, state: PartialState, name: str
) -> None:
    """Measure images in all processes, and write the measures to the chunks that lack them.

    Args:
        name: for the progress bar.
    """
    mine = range(state.process_index, len(chunks), state.num_processes)
    missing = [number for number in mine if chunks.state(number) != "whole"]
    for number in tqdm(
        missing,
        desc=name,
        unit="chunk",
        disable=not state.is_main_process or not missing,
        dynamic_ncols=True,
    ):
        pixels, labels = images.get(chunks.images(number))
        chunks.write(number, measure(pixels, extractor, labels).tensors(), {})
    state.wait_for_everyone()


def read_measures(chunks: Chunks, number: int) -> Measures:
    """Read the measures in a chunk.

    Raises:
        FileError: it holds other tensors.
    """
    tensors = chunks.read(number)[0]
    with reading(chunks.path(number), AGAIN, "holds no measures of images"):
        return Measures(**tensors)
