"""Measure the real images that samples are compared with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gmflow_core.files.errors import reading
from training.common.devices import cuda_or_cpu
from training.data.shards import INDEX
from training.evaluation.chunks import AGAIN, Chunks
from training.evaluation.extractors import Extractor
from training.evaluation.inputs import Inputs
from training.evaluation.metrics import Measures, Reference, Statistics, measure, statistics
from training.evaluation.real_images import (
    ArrayImages,
    FolderImages,
    PreparedImages,
    RealImages,
    read_npz,
)


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
    images, given = open_reference(inputs, path)
    wanted = extractor.facts["dimensions"]
    if given is not None and len(given.mean) != wanted:
        raise ValueError(
            f"{path}: mu has {len(given.mean)} features, but {extractor.name} has {wanted}; use "
            "--features inception with such a file, or give a reference of images"
        )
    measures = None
    if images is not None:
        measures = measure_images(inputs, extractor, images, "_reference")
    content = hashlib.sha256(json.dumps(None if images is None else images.key).encode())
    if given is not None:
        content.update(given.mean.tobytes() + given.covariance.tobytes())
    count = 0 if measures is None else len(measures)
    facts = {
        "name": path.name,
        "images": count,
        "images_for_precision_and_recall": min(count, config.count),
        "statistics": "of the file" if given is not None else "of the images",
        "fingerprint": content.hexdigest()[:16],
    }
    given = given or statistics(measures.features)
    return Reference(given, measures, config.count, cuda_or_cpu(config.device)), facts


def open_reference(inputs: Inputs, path: Path) -> tuple[RealImages | None, Statistics | None]:
    """Open an .npz file, a prepared folder, or a folder of images.

    Returns:
        Images and statistics; None for what an .npz file lacks, and no statistics for folders.

    Raises:
        FileNotFoundError, ValueError: there is no such file or folder, or it is damaged.
    """
    count = inputs.config.reference_count
    if path.suffix == ".npz":
        pixels, given = read_npz(path)
        if pixels is None:
            return None, given
        stat = path.stat()
        key = {"npz": path.name, "bytes": stat.st_size, "time": stat.st_mtime_ns}
        return ArrayImages(pixels, count, key), given
    if (path / INDEX).exists():
        return prepared_images(inputs, path, count), None
    if path.is_dir():
        return FolderImages(path, count, inputs.size), None
    raise FileNotFoundError(
        f"there is no reference {path}; give --reference an .npz file or a folder of images"
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
    key = {"of": images.key, "features": extractor.fingerprint, "vae": inputs.vae_name}
    folder = inputs.config.out / "measures" / name
    chunks = Chunks(folder, key, len(images), inputs.config.chunk_size)
    missing = [number for number in inputs.my_chunks(chunks) if chunks.state(number) != "whole"]
    for number in tqdm(
        missing,
        desc=name.strip("_"),
        unit="chunk",
        disable=not inputs.main or not missing,
        dynamic_ncols=True,
    ):
        pixels, labels = images.get(chunks.images(number))
        chunks.write(number, measure(pixels, extractor, labels).tensors(), {})
    inputs.state.wait_for_everyone()
    return Measures.cat(read_measures(chunks, number) for number in range(len(chunks)))


def read_measures(chunks: Chunks, number: int) -> Measures:
    """Read the measures in a chunk.

    Raises:
        FileError: it holds other tensors.
    """
    tensors = chunks.read(number)[0]
    with reading(chunks.path(number), AGAIN, "holds no measures of images"):
        return Measures(**tensors)
