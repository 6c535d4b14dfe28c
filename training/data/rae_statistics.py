"""Measure the mean and the variance of an RAE's latents over a folder of images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.errors import quoted
from gmflow_core.files.safetensors_files import peek_header, write_safetensors
from gmflow_core.files.targets import check_is_own
from gmflow_core.models.settings import MOST, is_count
from gmflow_core.source.moments import RunningMoments
from gmflow_core.source.source import widest
from training.common.devices import on_cpu
from training.common.processes import PATIENCE, loader_workers, together
from training.common.settings import require, require_device
from training.data.image_folder import ImageCrops, ImageList, image_loader, list_images
from training.data.shards import to_model
from training.encoders.fingerprints import fingerprint
from training.encoders.rae import RAE
from training.encoders.rae_files import load_rae

FORMAT = "gmflow-rae-statistics-1"
KEEP_EVERY = 600.0  # seconds between two saves of the sums over the images


def statistics(
    data: Path,
    out: Path,
    vae: str = "rae-dinov2-b",
    flip: bool = True,
    batch_size: int = 32,
    workers: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure mean and variance of an RAE's latents at every position.

    Args:
        data: Folder of images, as training.prepare takes it.
        out: File to write, .safetensors.
        vae: The RAE; its own statistics are not applied.
        flip: Mirror half of the images, chosen at random.
        batch_size: Images per batch, on each process.
        workers: Processes that decode images, for each GPU; None: one for each core, up to 8.
        seed: Seed of the flips.
        device: auto (what accelerate finds) or cpu.

    After a stop it goes on from OUT.parts, and loses ten minutes of work at most.
    """
    check_is_own(out, is_statistics, "training.rae statistics")
    require_device(device)
    require(1 <= batch_size <= MOST, "batch_size", quoted(batch_size), f"from 1 to {MOST:,}")
    state = PartialState(cpu=on_cpu(device), timeout=PATIENCE)
    loader_workers(workers, state)  # checks it before the network is loaded
    images = list_images(data)
    with state.local_main_process_first():
        rae = load_rae(vae, state.device, measured=True)
    side = rae.encoder.grid * rae.factor
    settings = settings_of(images, rae, side, state) | {"flip": flip, "seed": seed}
    moments = new_moments(rae.latent_shape(side, side), state.device)
    crops, path = ImageCrops(images, side, flip, seed, None), part_file(out, state.process_index)
    mine = range(state.process_index, len(crops), state.num_processes)
    with together(state):
        begun = resume(moments, path, settings, len(mine))
        batches = [list(mine[i : i + batch_size]) for i in range(begun, len(mine), batch_size)]
        loader = image_loader(crops, batches, workers, state)
        measure(rae, loader, moments, lambda done: keep(moments, path, settings, begun + done))
    moments.add_up_processes()
    count = int(moments.counts)
    if count < 2:
        raise ValueError(f"{data} has {count} images that can be read; statistics need at least 2")
    if state.is_main_process:
        save_statistics(moments, out)
        remove_parts(out)
        print(
            f"{out}: mean and variance of {count:,} latents; "
            'name the file in rae.json as "statistics"'
        )


def measure(rae: RAE, loader: Any, moments: RunningMoments, save: Callable[[int], None]) -> None:
    """Add the latents of a loader's batches to the moments.

    Args:
        save: called now and then, with the number of images that are done.

    Raises:
        OSError: a file cannot be read, though it is there.
        FloatingPointError: as `add_latents`.
    """
    done, kept, device = 0, time.monotonic(), moments.means.device
    bar = {"disable": not PartialState().is_main_process, "dynamic_ncols": True}
    for batch in tqdm(loader, **bar):
        for item in batch.failed:
            if item.fatal:
                raise OSError(item.reason)
        if batch.indices:
            pixels = to_model(batch.pixels.to(device))
            add_latents(moments, rae.encoder.latents(rae.encoder(pixels)))
        done += len(batch.indices) + len(batch.failed)
        if time.monotonic() - kept > KEEP_EVERY:
            save(done)
            kept = time.monotonic()


def settings_of(images: ImageList, rae: RAE, side: int, state: PartialState) -> dict[str, Any]:
    """Return what the sums over this process's images depend on, beside --flip and --seed."""
    names = "\n".join(images.files).encode("utf-8", "surrogateescape")
    return {
        "images": hashlib.sha256(names).hexdigest(),
        "autoencoder": fingerprint(rae),
        "size": side,
        "process": [state.process_index, state.num_processes],
    }


def part_file(out: Path, process: int) -> Path:
    """Return the file where a process keeps its sums until the statistics are written."""
    return out.with_name(f"{out.name}.parts") / f"moments_{process}.safetensors"


def keep(moments: RunningMoments, path: Path, settings: dict[str, Any], done: int) -> None:
    """Write the sums over the first `done` images of this process, some of which are left out."""
    moments.save(path, {**settings, "done": done})


def resume(moments: RunningMoments, path: Path, settings: dict[str, Any], most: int) -> int:
    """Load the sums that `keep` wrote; return the number of images that are done.

    Raises:
        FileError: the file is damaged, or of other images, settings or processes.
    """
    done = 0
    with suppress(ValueError, AttributeError, RecursionError):
        header = peek_header(path).get("__metadata__", {})
        done = json.loads(header.get("settings", "{}")).get("done")
    done = done if is_count(done, most=most) else 0
    moments.restore(path, {**settings, "done": done}, done)
    return done


def remove_parts(out: Path) -> None:
    """Remove the sums of all processes, of this run and of runs on more of them."""
    folder = part_file(out, 0).parent
    for path in folder.glob("moments_*.safetensors"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or it holds other files
        folder.rmdir()


def new_moments(shape: tuple[int, ...], device: torch.device) -> RunningMoments:
    """Return empty moments of latents `shape`, in float64 where the device has it."""
    return RunningMoments(1, shape, spherical=False, dtype=widest(device), device=device)


def add_latents(moments: RunningMoments, latents: Tensor) -> None:
    """Add latents (B, C, h, w) to the moments.

    Raises:
        FloatingPointError: some are not finite.
    """
    if not latents.isfinite().all():
        raise FloatingPointError(
            "the encoder gives latents that are not finite; its weights are damaged: get them again"
        )
    zeros = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
    moments.add(latents, zeros)


def save_statistics(moments: RunningMoments, path: Path) -> None:
    """Write the file that `load_statistics` reads: "mean" and "var" in float32, (C, h, w) each."""
    mean, var = moments.means[0], moments.squares[0] / moments.counts[0]
    tensors = {"mean": mean.float().cpu(), "var": var.float().cpu()}
    write_safetensors(tensors, path, {"format": FORMAT})


def is_statistics(path: Path) -> bool:
    """Return whether a file is one that `save_statistics` wrote."""
    return peek_header(path).get("__metadata__", {}).get("format") == FORMAT
