"""Prepare a folder of images for training: plan, shards, index, report."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from gmflow_core.files.errors import printable
from gmflow_core.models.vae import SD_VAE, VAE
from training.common.devices import on_cpu
from training.common.processes import PATIENCE, again, together
from training.common.settings import require, require_device, require_ranges
from training.data.class_names import read_class_names
from training.data.given_files import check_kept
from training.data.image_folder import ImageList, list_images
from training.data.pictures import DECODER
from training.data.plan import (
    begin_plan,
    check_plan,
    finished_shard,
    make_plan,
    number_of_shards,
)
from training.data.shard_writer import ShardWriter, sample_shape
from training.data.shards import DTYPES, FORMAT, INDEX, PLAN, shard_name, stored_dtype, write_index
from training.encoders.fingerprints import fingerprint
from training.encoders.load import load_vae
from training.encoders.rae import RAE

NAMED = 20  # images left out that are named on the screen


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparationConfig:
    """Preparation of images."""

    data: Path
    """Folder with one subfolder of images for each class."""
    out: Path
    """Folder for the shards and their index; whole shards found there are kept."""
    size: int = 256
    """Width and height of the cropped images."""
    pixels: bool = False
    """Store the pictures themselves, without a VAE; for small ones."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    vae: str = SD_VAE
    """Folder of the VAE in diffusers' layout, or its name on the hub;
    or an RAE such as rae-dinov2-b (see training/rae.py)."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored latents; float16 takes half the space and rounds to 0.05 %.
    ImageNet's latents of an RAE (768 x 16 x 16) take 1.0 TB in float32, 0.5 TB in float16;
    those of a VAE (4 x 32 x 32) take 21 GB and 10 GB."""
    class_names: Path | None = None
    """File of readable names: a list in the order of the class folders, {folder: name}, or
    {number: name}; JSON, or a Python dict such as imagenet1000_clsidx_to_labels.txt."""
    batch_size: int = 32
    """Images that the VAE encodes at a time."""
    shard_size: int = 4096
    """Images in a shard; a stop loses the work on one shard at most."""
    workers: int | None = None
    """Processes that decode images, for each GPU; None: one for each core, up to 8."""
    seed: int = 0
    """Seed of the flips and of the posterior samples."""
    device: str = "auto"
    """auto (the device that accelerate finds) or cpu."""
    restart: bool = False
    """Throw away the shards found in OUT."""

    def __post_init__(self):
        for name in ("size", "batch_size", "shard_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("workers", "seed"):
            require((getattr(self, name) or 0) >= 0, name, getattr(self, name), "0 or more")
        default = self.dtype == DTYPES["latents"][0]
        require(default or not self.pixels, "dtype", self.dtype, "left out with --pixels")
        require(self.vae == SD_VAE or not self.pixels, "vae", self.vae, "left out with --pixels")
        require_device(self.device)
        require_ranges(self)

    def plan(self, images: ImageList, vae: VAE | RAE | None) -> dict[str, Any]:
        """Return the settings that all shards have in common."""
        kind = "pixels" if self.pixels else "latents"
        return make_plan(
            images,
            kind=kind,
            size=self.size,
            flip=self.flip,
            vae=None if self.pixels else self.vae,
            vae_fingerprint=None if vae is None else fingerprint(vae),
            seed=self.seed,
            shard_size=self.shard_size,
            dtype=DTYPES[kind][0] if self.pixels else self.dtype,
        )


def prepare(config: PreparationConfig) -> dict[str, Any]:
    """Prepare all of config.data; every process writes its share, the main one the index.

    Returns:
        The index.

    Raises:
        FileNotFoundError: the images, the VAE or the file of class names is missing.
        ValueError: one of these or the folder OUT is not as it should be.
    """
    state = PartialState(cpu=on_cpu(config.device), timeout=PATIENCE)
    check_places(config)
    images = list_images(config.data)
    read_class_names(config.class_names, images.folders)  # for its errors, before the long work
    vae = None
    if not config.pixels:
        with state.local_main_process_first():
            vae = load_vae(config.vae, state.device)
    plan = config.plan(images, vae)
    with together(state):
        if state.is_main_process:
            begin_plan(config.out, plan, config.restart)
    plan = check_plan(config.out, plan)
    writer = ShardWriter(
        config.out,
        images,
        plan,
        vae,
        state,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    shards = number_of_shards(plan)
    missing = [n for n in range(shards) if finished_shard(config.out, n, plan) is None]
    state.wait_for_everyone()
    if state.is_main_process and 0 < len(missing) < shards:
        print(f"going on: {shards - len(missing)} of {shards} shards in {config.out} are whole")
    mine = [number for number in missing if number % state.num_processes == state.process_index]
    if mine:
        writer.write(mine)
    state.wait_for_everyone()
    index = make_index(config, images, plan, vae)
    if state.is_main_process:
        write_index(config.out, index)
        report(config, index)
    return index


def check_places(config: PreparationConfig) -> None:
    """Check that the folder for the shards is not among the images, and keeps what was given.

    Raises:
        ValueError: it is, or does not.
    """
    files = [config.out / INDEX, config.out / PLAN]
    check_kept(files, "replaced", class_names=config.class_names)
    # Path.resolve raises for links in a circle
    out, data = (Path(os.path.realpath(each)) for each in (config.out, config.data))
    if out == data or data in out.parents:
        raise ValueError(
            f"--out {config.out} is inside --data {config.data}, and would be taken for a class; "
            "give another"
        )


def make_index(
    config: PreparationConfig, images: ImageList, plan: dict[str, Any], vae: VAE | RAE | None
) -> dict[str, Any]:
    """Return the index of a finished folder, from the shards' records.

    Raises:
        ValueError: a shard is missing, or no image of a class can be read.
    """
    numbers = range(number_of_shards(plan))
    records = [finished_shard(config.out, number, plan) for number in numbers]
    if None in records:
        path = config.out / shard_name(records.index(None))
        raise ValueError(f"{path} is missing or not whole; {again()}: it rewrites only such shards")
    skipped = [entry for record in records for entry in record["skipped"]]
    check_classes(images, skipped)
    return {
        "format": FORMAT,
        "kind": plan["kind"],
        "dtype": stored_dtype(plan),
        "shape": list(sample_shape(plan, vae)),
        "classes": read_class_names(config.class_names, images.folders),
        "folders": images.folders,
        "count": sum(record["count"] for record in records),
        "shards": [
            {"file": shard_name(number), "count": record["count"]}
            for number, record in zip(numbers, records, strict=True)
        ],
        "skipped": skipped,
        "source": str(images.root),
        "decoder": DECODER,
        "size": config.size,
        "flip": config.flip,
        "seed": config.seed,
        "vae": plan["vae"],
        "space": "pixels" if vae is None else vae.space,
        "scaling_factor": None if vae is None else vae.scaling_factor,
    }


def check_classes(images: ImageList, skipped: list[dict[str, str]]) -> None:
    """Check that each class has images that can be read.

    Raises:
        ValueError: one has none.
    """
    left = Counter(images.labels)
    numbers = {folder: label for label, folder in enumerate(images.folders)}
    left.subtract(Counter(numbers[entry["file"].split("/")[0]] for entry in skipped))
    bad = [images.root / folder for label, folder in enumerate(images.folders) if not left[label]]
    if bad:
        reason = next(e["reason"] for e in skipped if e["file"].startswith(f"{bad[0].name}/"))
        raise ValueError(
            f"none of the images in {bad[0]} can be read (the first: {reason}), and so in "
            f"{len(bad)} of {len(images.folders)} class folders; replace them or remove the "
            "folder, then run again with --restart"
        )


def report(config: PreparationConfig, index: dict[str, Any]) -> None:
    """Print what was written, and which images were left out."""
    shape = "x".join(str(n) for n in index["shape"])
    out = printable(str(config.out))
    print(
        f"{out}: {index['count']:,} images of {len(index['classes'])} classes as "
        f"{index['kind']} {shape} ({index['dtype']}) in {len(index['shards'])} shards"
    )
    skipped = index["skipped"]
    if skipped:
        print(f"{len(skipped)} images were left out:")
        for entry in skipped[:NAMED]:
            file = printable(str(Path(index["source"]) / entry["file"]))
            print(f"  {file}: {printable(entry['reason'])}")
        if len(skipped) > NAMED:
            print(f"  ... all of them are listed in {printable(str(config.out / INDEX))}")
        print("to add them once they are mended, run again with --restart")
