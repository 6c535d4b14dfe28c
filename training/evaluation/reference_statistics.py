"""Measure a set of images, and write its statistics as a reference. The command: reference.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from gmflow_core.files.atomic import check_target, remove_leftovers
from gmflow_core.files.errors import FileError, printable
from gmflow_core.files.targets import check_is_own
from training.common.processes import together
from training.common.settings import require, require_device, require_ranges, require_unused
from training.data.given_files import check_kept
from training.data.shards import LatentDataset
from training.encoders.fingerprints import MARK, fingerprint
from training.encoders.load import load_vae
from training.evaluation.chunks import Chunks, remove_chunks
from training.evaluation.classifier import ClassifierFeatures
from training.evaluation.config import check_features
from training.evaluation.extractors import Extractor
from training.evaluation.inception import InceptionFeatures
from training.evaluation.metrics import Measures, Statistics, Sums
from training.evaluation.real_images import PreparedImages
from training.evaluation.reference import (
    feature_key,
    measure_chunks,
    open_reference,
    read_measures,
)
from training.evaluation.reference_file import (
    is_own_reference,
    read_made_from,
    write_reference,
)

ALL = 10**9  # images
SAID = {  # of what a file is made from, in messages
    "of": "images (--data, --size, --count)",
    "features": "features",
    "spatial": "features",
    "vae": "decoder (--vae)",
    MARK: "decoder (--vae)",
    "keep": "--keep",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Statistics of a set of images."""

    data: Path = Path("data/imagenet_256")
    """Folder written by training.prepare, folder of images, or .npz file with images as arr_0."""
    out: Path = Path("outputs/reference.npz")
    """File to write, .npz."""
    features: str = "inception"
    """inception, or the .safetensors file of a small classifier of training.evaluate."""
    inception_weights: Path | None = None
    """torch-fidelity's weight file; downloaded if not given."""
    size: int = 256
    """Width and height that images of a folder are cropped and scaled to; a small classifier has
    its own."""
    count: int | None = None
    """Images at most, chosen at random; all if not given."""
    keep: int = 50_000
    """Images whose features are kept in the file, for precision and recall; 0 keeps none."""
    vae: str | None = None
    """Folder or hub name of the VAE that decodes latents; by default the one that the data was
    prepared with."""
    batch_size: int = 100
    """Latents that a process decodes at a time."""
    chunk_size: int = 500
    """Images of a part; a stop loses at most one part for each process."""
    replace: bool = False
    """Replace a finished file of other images, features or settings."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""

    def __post_init__(self):
        for name, least in (("size", 1), ("keep", 0), ("batch_size", 1), ("chunk_size", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        require(self.count is None or self.count >= 2, "count", self.count, "at least 2")
        require(self.out.suffix == ".npz", "out", self.out, "a file name that ends in .npz")
        check_features(self.features)
        require_device(self.device)
        require_ranges(self)


PRESETS = {"default": Config()}


def write_statistics(config: Config, state: PartialState) -> None:
    """Measure the images in all processes, and write the file in the main one.

    A file of the same images, features and settings is left as it is.

    Raises:
        FileExistsError: --out is a file that this command did not write, or one of other images,
            features or settings, and --replace is not given.
        FileNotFoundError: there are no such images, or no such features.
        ValueError: there are no images, they do not fit the features, or --out is one of the
            inputs.
    """
    main = state.is_main_process
    with together(state):
        if main:
            check_target(config.out)
            weights = {"features": config.features, "inception_weights": config.inception_weights}
            check_kept([config.out], "replaced", data=config.data, **weights)
            check_is_own(config.out, is_own_reference, "training.reference")
    extractor = load_features(config.features, config.inception_weights, state)
    size = config.size
    if isinstance(extractor, ClassifierFeatures):
        size = extractor.network.config.height
    count = config.count or ALL
    images, _ = open_reference(
        config.data,
        count,
        size,
        lambda folder: open_prepared(folder, count, config.vae, config.batch_size, state),
        "data",
    )
    if not isinstance(images, PreparedImages) or images.vae is None:
        require_unused(config, PRESETS["default"], ("vae",), "on pictures, which need no decoder")
    if images is None:
        raise FileError(config.data, "holds no images, only statistics", "give images as --data")
    key = {"of": images.key, **feature_key(extractor), "vae": config.vae}
    if isinstance(images, PreparedImages) and images.vae is not None:
        key[MARK] = fingerprint(images.vae, decoding=True)
    made_from = {**key, "keep": config.keep}
    if is_finished(config, made_from):
        if main:
            print(f"{config.out} is there already, of these images and features")
        return
    parts = config.out.with_name(f"{config.out.name}.parts")
    chunks = Chunks(parts, key, len(images), config.chunk_size)
    if main:
        remove_leftovers(parts)
    measure_chunks(chunks, images, extractor, state, config.data.name)
    if main:
        found, spatial, kept = combine(chunks, config.keep)
        write_reference(config.out, found, spatial, kept, extractor.fingerprint, made_from)
        remove_chunks(parts)
        print(f"{config.out}: statistics of {len(images):,} images by {extractor.name}")
    state.wait_for_everyone()


def is_finished(config: Config, wanted: dict[str, Any]) -> bool:
    """Return whether the file is there, and is of these images, features and settings.

    Args:
        wanted: what it is to be made from.

    Raises:
        FileExistsError: it is of others, and --replace is not given.
        FileError: it is damaged.
    """
    if not config.out.exists():
        return False
    found = read_made_from(config.out)
    if found == wanted or config.replace:
        return found == wanted
    how = "of a version that did not say of what"
    if found is not None:
        differ = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        how = f"of other {' and '.join(sorted({SAID.get(name, name) for name in differ}))}"
    text = f"{config.out} is finished, and {how}; give another --out, or --replace to replace it"
    raise FileExistsError(printable(text))


def load_features(features: str, weights: Path | None, state: PartialState) -> Extractor:
    """Load Inception, or a classifier that exists; the main process downloads first.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the features, or torch-fidelity, are missing.
        ValueError: the file is damaged.
    """
    if features == "inception":
        with torch.random.fork_rng(), state.main_process_first():
            return InceptionFeatures(weights, state.device)
    if not Path(features).exists():
        raise FileNotFoundError(
            f"there is no {features} (--features); training.evaluate trains it with --data"
        )
    return ClassifierFeatures.load(features, state.device)


def open_prepared(
    folder: Path, count: int, vae: str | None, batch_size: int, state: PartialState
) -> PreparedImages:
    """Open a prepared folder, with the VAE of its latents.

    Args:
        vae: name of the VAE; that of the folder if None.

    Raises:
        ValueError: it is of latents, and no VAE is known; or as `PreparedImages`.
    """
    data, decoder = LatentDataset(folder, in_memory=False), None
    if data.kind == "latents":
        name = vae or data.index.get("vae")
        if not name:
            raise ValueError(f"{folder} has latents, but does not say of which VAE; give --vae")
        with state.local_main_process_first():
            decoder = load_vae(name, state.device)
    return PreparedImages(folder, count, decoder, state.device, batch_size)


def combine(chunks: Chunks, keep: int) -> tuple[Statistics, Statistics, Measures | None]:
    """Return statistics of the features and spatial features, and measures of the first images.

    Only one part is in memory at a time, beside the measures that are kept.

    Args:
        keep: number of these images.
    """
    sums, spatial = Sums(), Sums()
    features: list[Tensor] = []
    saturation: list[Tensor] = []
    for number in range(len(chunks)):
        part = read_measures(chunks, number)
        sums.add(part.features)
        spatial.add(part.spatial)
        left = max(0, keep - chunks.images(number).start)
        features.append(part.features[:left])
        saturation.append(part.saturation[:left])
    kept = torch.cat(features)
    measures = Measures(kept, torch.empty(len(kept), 0), torch.cat(saturation))
    return sums.statistics(), spatial.statistics(), measures if keep else None
