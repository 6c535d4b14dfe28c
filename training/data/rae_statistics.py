"""Measure the mean and the variance of an RAE's latents over a folder of images."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from gmflow_core.files.errors import quoted
from gmflow_core.files.safetensors_files import peek_header, write_safetensors
from gmflow_core.files.targets import check_is_own
from gmflow_core.models.settings import MOST
from gmflow_core.source.moments import RunningMoments
from gmflow_core.source.source import widest
from training.common.devices import on_cpu
from training.common.processes import loader_workers
from training.common.settings import require, require_device
from training.data.image_folder import ImageCrops, image_loader, list_images
from training.data.shards import to_model
from training.encoders.rae_files import load_rae

FORMAT = "gmflow-rae-statistics-1"


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
    """
    check_is_own(out, is_statistics, "training.rae statistics")
    require_device(device)
    require(1 <= batch_size <= MOST, "batch_size", quoted(batch_size), f"from 1 to {MOST:,}")
    state = PartialState(cpu=on_cpu(device))
    loader_workers(workers, state)  # checks it before the network is loaded
    images = list_images(data)
    with state.local_main_process_first():
        rae = load_rae(vae, state.device)
    side = rae.encoder.grid * rae.factor
    crops = ImageCrops(images, side, flip, seed, None)
    mine = range(state.process_index, len(crops), state.num_processes)
    batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    loader = image_loader(crops, batches, workers, state)
    moments = new_moments(rae.latent_shape(side, side), state.device)
    for batch in tqdm(loader, disable=not state.is_main_process, dynamic_ncols=True):
        for item in batch.failed:
            if item.fatal:
                raise OSError(item.reason)
        if batch.indices:
            pixels = to_model(batch.pixels.to(state.device))
            add_latents(moments, rae.encoder.latents(rae.encoder(pixels)))
    moments.add_up_processes()
    count = int(moments.counts)
    if count < 2:
        raise ValueError(f"{data} has {count} images that can be read; statistics need at least 2")
    if state.is_main_process:
        save_statistics(moments, out)
        print(
            f"{out}: mean and variance of {count:,} latents; "
            'name the file in rae.json as "statistics"'
        )


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
