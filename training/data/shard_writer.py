"""Write shards: load the images of each in workers, encode them, and stop between batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from gmflow_core.files.errors import printable
from gmflow_core.models.vae import VAE
from training.common.processes import stop_signals
from training.data.image_folder import Batch, ImageCrops, ImageList, image_loader
from training.data.plan import plan_key, shard_range
from training.data.shards import shard_name, stored_dtype, to_model, write_shard
from training.encoders.rae import RAE


class ShardWriter:
    """Write the shards of one process.

    Args:
        out: the prepared folder.
        images: all images of the plan.
        plan: from `make_plan`.
        vae: a VAE or an RAE on the device of `state`; None stores the pixels themselves.
        batch_size: images that the VAE encodes at a time.
        workers: processes that decode images; see `loader_workers`.
    """

    def __init__(
        self,
        out: Path,
        images: ImageList,
        plan: dict[str, Any],
        vae: VAE | RAE | None,
        state: PartialState,
        *,
        batch_size: int,
        workers: int | None,
    ):
        self.out, self.images, self.plan, self.vae, self.state = out, images, plan, vae, state
        self.batch_size, self.workers = batch_size, workers
        self.shape = sample_shape(plan, vae)
        self.dtype: torch.dtype = getattr(torch, stored_dtype(plan))

    def write(self, numbers: Sequence[int]) -> None:
        """Write the shards with these numbers, one after the other.

        Raises:
            OSError: an image's file cannot be read.
            FloatingPointError: the VAE gives latents that are not finite.
            KeyboardInterrupt: Ctrl-C or SIGTERM came; the batch under way is done.
        """
        noise_shape = self.shape if self.vae is not None and self.vae.needs_noise else None
        plan = self.plan
        crops = ImageCrops(self.images, plan["size"], plan["flip"], plan["seed"], noise_shape)
        parts = [part for number in numbers for part in self._batches(number)]
        loader = image_loader(crops, parts, self.workers, self.state)
        processes = self.state.num_processes
        bar = tqdm(
            total=sum(map(len, parts)),
            unit="img",
            desc=printable(self.out.name)
            + (f" (process 1 of {processes})" if processes > 1 else ""),
            disable=not self.state.is_main_process,
            dynamic_ncols=True,
        )
        with bar, stop_signals() as stopped:
            batches = until_stopped(loader, stopped)
            for number in numbers:
                self._write_one(number, batches, bar)

    def _batches(self, number: int) -> list[list[int]]:
        """Return the images of one shard as batches of indices."""
        members = list(shard_range(number, self.plan))
        starts = range(0, len(members), self.batch_size)
        return [members[start : start + self.batch_size] for start in starts]

    def _write_one(self, number: int, batches: Iterator[Batch], bar: tqdm) -> None:
        """Write shard `number` from the next batches."""
        x = torch.empty(len(shard_range(number, self.plan)), *self.shape, dtype=self.dtype)
        kept: list[int] = []
        skipped: list[dict[str, str]] = []
        for _ in self._batches(number):
            batch = next(batches)
            for item in batch.failed:
                if item.fatal:
                    raise OSError(item.reason)
                skipped.append({"file": self.images.files[item.index], "reason": item.reason})
            if batch.indices:
                values = batch.pixels if self.vae is None else self._encode(batch)
                x[len(kept) : len(kept) + len(values)] = values
                kept += batch.indices
            bar.update(len(batch.indices) + len(batch.failed))
        labels = torch.tensor([self.images.labels[index] for index in kept], dtype=torch.int64)
        record = {"plan": plan_key(self.plan), "skipped": skipped}
        write_shard(self.out / shard_name(number), x[: len(kept)], labels, record)

    def _encode(self, batch: Batch) -> Tensor:
        """Return the latents of a batch in the stored type, on the CPU."""
        device, name = self.state.device, self.plan["vae"]
        noise = None if batch.noise is None else batch.noise.to(device)
        latents = self.vae.encode(to_model(batch.pixels.to(device)), noise).cpu()
        if not latents.isfinite().all():
            raise FloatingPointError(
                f"the VAE {name} gives latents that are not finite; its weights are damaged: get "
                "them again"
            )
        stored = latents.to(self.dtype)
        if not stored.isfinite().all():
            raise FloatingPointError(
                f"the VAE {name} gives latents up to {latents.abs().max():.3g}, which float16 "
                "cannot hold; give --dtype float32"
            )
        return stored


def sample_shape(plan: dict[str, Any], vae: VAE | RAE | None) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of a stored sample.

    Raises:
        ValueError: pictures of the plan's size do not fit the VAE.
    """
    size = plan["size"]
    return (3, size, size) if vae is None else vae.latent_shape(size, size)


def until_stopped(loader: DataLoader, stopped: threading.Event) -> Iterator[Batch]:
    """Yield the loader's batches until the event is set.

    The event is checked between batches, so that no worker is stopped in the middle of a message.

    Raises:
        KeyboardInterrupt: the event is set; the batch under way is done.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError:
            if stopped.is_set():  # the workers were stopped too
                raise KeyboardInterrupt from None
            raise
        yield batch
        if stopped.is_set():
            raise KeyboardInterrupt
