"""The representation autoencoder (RAE, arXiv 2510.11690): a frozen vision transformer makes latents, a trained one pictures.

Wherever a VAE can be named (--vae), so can an RAE:

    rae-dinov2-b, rae-siglip2-b, rae-mae-b    the published ones, their parts fetched from the hub
    OWNER/NAME or FOLDER                      with config.json and safetensors of diffusers' AutoencoderRAE, such as
                                              nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08
    FOLDER                                    with rae.json, which names the parts: {"encoder": "facebook/vit-mae-base",
                                              "decoder": "decoder.safetensors", "statistics": "statistics.safetensors"}

An encoder is a folder or hub id for transformers; the other parts are files, in FOLDER or as OWNER/NAME/PATH on the hub, and
may be missing: without a decoder there are latents but no pictures. Statistics for images of one's own, to be named in such a
rae.json, and published DiT^DH networks (.pt) as GMFlow's checkpoints:

    python -m training.rae statistics --data IMAGES --vae FOLDER --out FOLDER/statistics.safetensors
    torchrun --nproc-per-node 8 -m training.rae statistics --data IMAGES --vae FOLDER --out FOLDER/statistics.safetensors
    python -m training.rae convert --source stage2_model.pt --out ditdh_xl.safetensors
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from gmflow_core.files.atomic import atomic_write
from gmflow_core.files.checkpoint import save_checkpoint
from gmflow_core.models.ditdh import DiTDH
from training.common.devices import on_cpu
from training.common.processes import leave
from training.data.image_folder import ImageCrops, collate, list_images
from training.data.shards import to_model
from training.encoders.rae_files import COLLECTION, load_rae, read_tensors
from training.encoders.rae_networks import RAE


class RunningStatistics:
    """Mean and variance of every entry of latents, in one pass: moments of each batch in float32 about its own mean, of all in
    float64 (Chan et al. 1979).

    Args:
        shape: (C, h, w).
    """

    def __init__(self, shape: tuple[int, ...]):
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(
            shape, dtype=torch.float64
        )  # sum of squared distances from the mean

    def update(self, latents: Tensor) -> None:
        """Take in (B, C, h, w).

        Raises:
            FloatingPointError: they are not finite.
        """
        var, mean = torch.var_mean(latents.float(), 0, correction=0)
        mean, squares = mean.cpu().double(), var.cpu().double() * len(latents)
        if not (mean.isfinite().all() and squares.isfinite().all()):
            raise FloatingPointError(
                "the encoder gives latents that are not finite; its weights are damaged: get them again"
            )
        total = self.count + len(latents)
        difference = mean - self.mean
        self.squares += squares + difference**2 * (self.count * len(latents) / total)
        self.mean += difference * (len(latents) / total)
        self.count = total

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have taken in; every process has the sum then."""
        if not torch.distributed.is_initialized():
            return
        total, mean = self.count.to(device), (self.count * self.mean).to(device)
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(mean)
        mean /= total
        squares = (
            self.squares.to(device) + self.count.to(device) * (self.mean.to(device) - mean) ** 2
        )
        torch.distributed.all_reduce(squares)
        self.count, self.mean, self.squares = total.cpu(), mean.cpu(), squares.cpu()

    def save(self, path: str | Path) -> None:
        """Write the file that `load_statistics` reads, with "mean" and "var"."""
        with atomic_write(Path(path)) as temporary:
            save_file(
                {"mean": self.mean.float(), "var": (self.squares / self.count).float()}, temporary
            )


def statistics(
    data: Path,
    out: Path,
    vae: str = "rae-dinov2-b",
    flip: bool = True,
    batch_size: int = 32,
    workers: int = 4,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure mean and variance of an RAE's latents, at every position.

    Args:
        data: Folder of images, as training.prepare takes it.
        out: File to write, .safetensors.
        vae: The RAE; statistics that it has are not applied.
        flip: Mirror every other image, by chance.
        batch_size: Images at a time, on each process.
        workers: Processes that decode images, for each GPU.
        seed: Seed of the flips.
        device: auto (what accelerate finds) or cpu.
    """
    state = PartialState(cpu=on_cpu(device))
    images = list_images(data)
    with state.local_main_process_first():
        rae = load_rae(vae, state.device)
    side = rae.encoder.grid * rae.factor
    crops = ImageCrops(images, side, flip, seed, None)
    mine = range(state.process_index, len(crops), state.num_processes)
    batches = [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    loader = DataLoader(crops, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    running = RunningStatistics(rae.latent_shape(side, side))
    for batch in tqdm(loader, disable=not state.is_main_process, dynamic_ncols=True):
        for item in batch.failed:
            if item.fatal:
                raise OSError(item.reason)
        if batch.indices:
            running.update(
                rae.encoder.latents(rae.encoder(to_model(batch.pixels.to(state.device))))
            )
    running.reduce(state.device)
    if running.count < 2:
        raise ValueError(
            f"{data} has {int(running.count)} images that can be read; statistics need at least 2"
        )
    if state.is_main_process:
        running.save(out)
        print(
            f'{out}: mean and variance of {int(running.count):,} latents; name the file in rae.json as "statistics"'
        )


def convert(source: Path, out: Path, null_class: bool = True) -> None:
    """Write a published DiT^DH network as a checkpoint of GMFlow, in float32.

    Args:
        source: Its state dict, .pt or .safetensors; of the averaged weights if the file has several.
        out: File to write, .safetensors.
        null_class: Whether the last row of its label embedding stands for no label, as after training with label dropout.
    """

    if not source.exists():
        raise FileNotFoundError(
            f"there is no {source}; download it first (hf download {COLLECTION} --local-dir FOLDER)"
        )
    network = DiTDH.from_published(read_tensors(source), null_class)
    save_checkpoint(network, out, data={"space": RAE.space})
    print(f"{out}: {network.config}")


def main(arguments: list[str] | None = None) -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"statistics": statistics, "convert": convert},
            prog="python -m training.rae",
            description=__doc__,
            args=arguments,
        )
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        leave()


if __name__ == "__main__":
    main()
