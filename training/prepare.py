"""Turn a folder of images into what training reads: cached VAE latents, or small pictures as they are, in shards.

    python -m training.prepare --data imagenet/train --out data/imagenet_256                             # one GPU, or the CPU
    python -m training.prepare --data imagenet/train --out data/imagenet_256 --vae FOLDER                # a VAE on the disk
    torchrun --nproc-per-node 8 -m training.prepare --data imagenet/train --out data/imagenet_256        # eight GPUs
    python -m training.prepare --data data/digits/train --out data/digits_train --size 8 --pixels --no-flip

DATA has one subfolder for each class, in whose sorted order they are numbered; images may lie deeper inside. Every image is
centre-cropped to a square, scaled to --size, flipped or not by chance, and encoded once in float32. Chance depends on the
seed and on the image alone: not on the batch size, the number of processes, or restarts.

Stopped in any way and started again with the same command, it keeps the shards that are whole and goes on. Images that cannot
be read are left out, and named at the end and in OUT/index.json. Several machines need a shared OUT.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.common.devices import on_cpu
from training.common.processes import command
from training.data.image_folder import (
    Batch,
    ImageCrops,
    ImageList,
    collate,
    leave_signals_to_main,
    list_images,
    read_class_names,
)
from training.data.shards import (
    DTYPES,
    FORMAT,
    INDEX,
    PLAN,
    read_record,
    shard_name,
    to_model,
    write_index,
    write_shard,
)
from training.encoders.load import load_vae
from training.encoders.vae import SD_VAE, VAE

NAMED = 20  # how many of the images left out are named on the screen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Preparation of images."""

    data: Path
    """Folder with one subfolder of images for each class."""
    out: Path
    """Folder for the shards and their index; what is whole there is kept."""
    size: int = 256
    """Width and height of the cropped images."""
    pixels: bool = False
    """Store the pictures themselves, without a VAE; for small ones."""
    flip: bool = True
    """Mirror every other image, by chance."""
    vae: str = SD_VAE
    """The VAE: a folder in diffusers' layout, or its name on the hub; or an RAE (see training/rae.py), such as rae-dinov2-b."""
    class_names: Path | None = None
    """JSON file of readable names: a list in the order of the class folders, or {folder: name}, or {"0": name}."""
    batch_size: int = 32
    """Images that the VAE encodes at a time."""
    shard_size: int = 4096
    """Images in a shard; what a stop can lose."""
    workers: int | None = None
    """Processes that decode images, for each GPU; by default as many as there are cores for, up to 8."""
    seed: int = 0
    """Seed of the flips and of the posterior samples."""
    device: str = "auto"
    """auto (what accelerate finds) or cpu."""
    restart: bool = False
    """Throw away the shards found in OUT."""

    def __post_init__(self):
        for name in ("size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1"
                )
        for name in ("workers", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be 0 or more")
        if self.device not in ("auto", "cpu"):
            raise ValueError(
                f"--device is {self.device!r}; give auto or cpu (choose a GPU with CUDA_VISIBLE_DEVICES)"
            )


def make_plan(config: Config, images: ImageList) -> dict:
    """What all shards of a folder must have in common."""
    listing = hashlib.sha256("\n".join(images.files).encode("utf-8", "surrogateescape")).hexdigest()
    return {
        "format": FORMAT,
        "kind": "pixels" if config.pixels else "latents",
        "size": config.size,
        "flip": config.flip,
        "vae": None if config.pixels else config.vae,
        "seed": config.seed,
        "shard_size": config.shard_size,
        "images": len(images.files),
        "files": listing,
    }


def check_plan(out: Path, plan: dict) -> None:
    """Refuse a folder that was begun with other settings, or that holds something else.

    Raises:
        ValueError: it is such a folder.
    """
    path = out / PLAN
    if not path.exists():
        if out.is_dir() and (any(out.glob("shard-*.safetensors")) or (out / INDEX).exists()):
            raise ValueError(
                f"{out} holds shards but no {PLAN}; give another --out, or --restart to throw them away"
            )
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); give --restart to throw the folder's shards away"
        ) from error
    differ = [key for key in plan if found.get(key) != plan[key]]
    if differ:
        changes = ", ".join(
            f"{key}: {found.get(key)} there, {plan[key]} here"
            if key != "files"
            else "not the same list of image files"
            for key in differ
        )
        raise ValueError(
            f"{out} was begun with other settings ({changes}); give another --out, the same settings to go on, or --restart "
            "to throw its shards away"
        )


def shard_range(number: int, plan: dict) -> range:
    """The images of shard `number`."""
    start = number * plan["shard_size"]
    return range(start, min(start + plan["shard_size"], plan["images"]))


def whole_shard(out: Path, number: int, plan: dict) -> dict | None:
    """The record of shard `number`; None if it has to be written (again)."""
    record = read_record(out / shard_name(number))
    if record is None or record.get("plan") != plan_key(plan):
        return None
    return (
        record
        if record["count"] + len(record["skipped"]) == len(shard_range(number, plan))
        else None
    )


def plan_key(plan: dict) -> str:
    """A short name of the plan, by which a shard says what it belongs to."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def write_shards(
    config: Config,
    images: ImageList,
    plan: dict,
    numbers: list[int],
    vae: VAE | None,
    state: PartialState,
) -> None:
    """Write the shards with these numbers, one after the other.

    Raises:
        OSError: an image's file cannot be read.
        FloatingPointError: the VAE gives latents that are not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, and the batch under way is done.
    """
    shape = (
        (3, config.size, config.size) if vae is None else vae.latent_shape(config.size, config.size)
    )
    noise_shape = shape if vae is not None and vae.needs_noise else None
    crops = ImageCrops(images, config.size, config.flip, config.seed, noise_shape)
    batches = [
        part for number in numbers for part in _parts(shard_range(number, plan), config.batch_size)
    ]
    workers = config.workers
    if workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        workers = min(8, (os.cpu_count() or 1) // local)
    loader = iter(
        DataLoader(
            crops,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_main,
        )
    )
    left = sum(len(batch) for batch in batches)
    one_of = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    bar = tqdm(
        total=left,
        unit="img",
        desc=config.out.name + one_of,
        disable=not state.is_main_process,
        dynamic_ncols=True,
    )
    with bar, stop_signals() as stopped:
        for number in numbers:
            members = shard_range(number, plan)
            x = torch.empty(len(members), *shape, dtype=DTYPES[plan["kind"]])
            kept: list[int] = []
            skipped: list[dict] = []
            for _ in _parts(members, config.batch_size):
                try:
                    batch: Batch = next(loader)
                except RuntimeError:
                    if stopped.is_set():  # the workers were stopped too
                        raise KeyboardInterrupt from None
                    raise
                for item in batch.failed:
                    if item.fatal:
                        raise OSError(item.reason)
                    skipped.append({"file": images.files[item.index], "reason": item.reason})
                if batch.indices:
                    values = (
                        batch.pixels if vae is None else encode(vae, batch, config, state.device)
                    )
                    x[len(kept) : len(kept) + len(values)] = values
                    kept += batch.indices
                bar.update(len(batch.indices) + len(batch.failed))
                if stopped.is_set():
                    raise KeyboardInterrupt
            labels = torch.tensor([images.labels[index] for index in kept], dtype=torch.int64)
            record = {"plan": plan_key(plan), "skipped": skipped}
            write_shard(config.out / shard_name(number), x[: len(kept)], labels, record)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the workers are never left in the middle of a message."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def encode(vae: VAE, batch: Batch, config: Config, device: torch.device) -> Tensor:
    """The latents of a batch, on the CPU.

    Raises:
        FloatingPointError: they are not finite.
    """
    noise = None if batch.noise is None else batch.noise.to(device)
    latents = vae.encode(to_model(batch.pixels.to(device)), noise).cpu()
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"the VAE {config.vae} gives latents that are not finite; its weights are damaged: get them again"
        )
    return latents


def _parts(members: range, size: int) -> Iterator[list[int]]:
    for start in range(members.start, members.stop, size):
        yield list(range(start, min(start + size, members.stop)))


def make_index(config: Config, images: ImageList, plan: dict, shards: int, vae: VAE | None) -> dict:
    """The index of a finished folder, from the shards themselves.

    Raises:
        ValueError: a shard is missing, or nothing is left of a class.
    """
    records = [whole_shard(config.out, number, plan) for number in range(shards)]
    if None in records:
        path = config.out / shard_name(records.index(None))
        raise ValueError(
            f"{path} is missing or not whole; run the same command again: it rewrites only such shards"
        )
    skipped = [entry for record in records for entry in record["skipped"]]
    left = Counter(images.labels)
    left.subtract(Counter(images.folders.index(entry["file"].split("/")[0]) for entry in skipped))
    bad = [images.root / folder for label, folder in enumerate(images.folders) if not left[label]]
    if bad:
        reason = next(e["reason"] for e in skipped if e["file"].startswith(f"{bad[0].name}/"))
        raise ValueError(
            f"none of the images in {bad[0]} can be read (the first: {reason}), and so in {len(bad)} of {len(images.folders)} "
            "class folders; replace them or remove the folder, then run again with --restart"
        )
    return {
        "format": FORMAT,
        "kind": plan["kind"],
        "shape": [3, config.size, config.size]
        if vae is None
        else list(vae.latent_shape(config.size, config.size)),
        "classes": read_class_names(config.class_names, images.folders),
        "folders": images.folders,
        "count": sum(record["count"] for record in records),
        "shards": [
            {"file": shard_name(number), "count": record["count"]}
            for number, record in enumerate(records)
        ],
        "skipped": skipped,
        "source": str(images.root),
        "size": config.size,
        "flip": config.flip,
        "seed": config.seed,
        "vae": plan["vae"],
        "space": "pixels" if vae is None else vae.space,
        "scaling_factor": None if vae is None else vae.scaling_factor,
    }


def prepare(config: Config) -> dict:
    """Prepare all of config.data; every process does its share, the main one writes the index.

    Returns:
        The index.

    Raises:
        FileNotFoundError, ValueError: the data, the VAE, the class names or the folder are not as they should be.
    """
    state = PartialState(cpu=on_cpu(config.device), timeout=timedelta(days=7))
    out, data = config.out.resolve(), config.data.resolve()
    if out == data or data in out.parents:
        raise ValueError(
            f"--out {config.out} is inside --data {config.data}, and would be taken for a class; give another"
        )
    images = list_images(config.data)
    read_class_names(config.class_names, images.folders)
    plan = make_plan(config, images)
    if state.is_main_process:
        for pattern in (".shard-*.tmp", ".*.json.*.tmp"):  # of a process killed while it wrote
            for leftover in config.out.glob(pattern):
                leftover.unlink()
        if config.restart:
            for old in (
                config.out / PLAN,
                config.out / INDEX,
                *config.out.glob("shard-*.safetensors"),
            ):
                old.unlink(missing_ok=True)
        check_plan(config.out, plan)
        write_index(config.out, plan, PLAN)
    state.wait_for_everyone()
    check_plan(config.out, plan)
    vae = None
    if not config.pixels:
        with state.local_main_process_first():
            vae = load_vae(config.vae, state.device)
        vae.latent_shape(config.size, config.size)
    shards = -(-len(images.files) // config.shard_size)
    missing = [n for n in range(shards) if whole_shard(config.out, n, plan) is None]
    state.wait_for_everyone()
    if state.is_main_process and 0 < len(missing) < shards:
        print(f"going on: {shards - len(missing)} of {shards} shards in {config.out} are whole")
    mine = [number for number in missing if number % state.num_processes == state.process_index]
    if mine:
        write_shards(config, images, plan, mine, vae, state)
    state.wait_for_everyone()
    index = make_index(config, images, plan, shards, vae)
    if state.is_main_process:
        write_index(config.out, index)
        report(config, index)
    return index


def report(config: Config, index: dict) -> None:
    """Say what was made, and what was left out."""
    shape = "x".join(str(n) for n in index["shape"])
    print(
        f"{config.out}: {index['count']:,} images of {len(index['classes'])} classes as {index['kind']} {shape} "
        f"in {len(index['shards'])} shards"
    )
    skipped = index["skipped"]
    if skipped:
        print(f"{len(skipped)} images could not be read and were left out:")
        for entry in skipped[:NAMED]:
            print(f"  {Path(index['source']) / entry['file']}: {entry['reason']}")
        if len(skipped) > NAMED:
            print(f"  ... all of them are listed in {config.out / INDEX}")
        print("to take them in once they are mended, run again with --restart")


def main(arguments: list[str] | None = None) -> None:
    with command():
        config = tyro.cli(
            Config, args=arguments, prog="python -m training.prepare", description=__doc__
        )
        prepare(config)


if __name__ == "__main__":
    main()
