"""Read a folder of images as latents that are encoded on the way, without a cache on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from gmflow_core.files.errors import FileError, printable
from gmflow_core.models.vae import VAE
from training.data.image_folder import ImageCrops, ImageList, Item, image_loader
from training.data.shards import to_model
from training.data.tokens import check_settings, fitted_settings
from training.encoders.encoder import FAMILIES
from training.encoders.fingerprints import fingerprint
from training.encoders.rae import RAE

PART = 64  # images that are encoded at a time
MOST_IN_A_ROW = 100  # images that cannot be read before the command ends


class CropBatch(NamedTuple):
    """Images on their way from a loader's worker to the encoder."""

    pixels: Tensor  # (n, 3, size, size) uint8
    labels: Tensor  # (n,) int64
    noise: Tensor | None  # for the posterior samples, (n, C, h, w)
    left_out: list[str]  # images that could not be read, with the reason


class NumberedCrops(Dataset):
    """Images by number, epoch * len + index; flip and noise depend on the number and the seed.

    In the place of an image that cannot be read comes the next one of the list.
    """

    def __init__(self, crops: ImageCrops):
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

    def __getitems__(self, numbers: Sequence[int]) -> CropBatch:
        """Return the images with these numbers.

        Raises:
            OSError: an image's file cannot be read, though it is there.
            FileError: `MOST_IN_A_ROW` images in a row cannot be decoded.
        """
        left_out: list[str] = []
        items = [self._readable(number, left_out) for number in numbers]
        labels = [self.crops.images.labels[item.index] for item in items]
        noise = None if items[0].noise is None else torch.stack([item.noise for item in items])
        pixels = torch.stack([item.pixels for item in items])
        return CropBatch(pixels, torch.tensor(labels), noise, left_out)

    def _readable(self, number: int, left_out: list[str]) -> Item:
        """Return the image with this number, or the next one that can be read."""
        images, (epoch, index) = self.crops.images, divmod(number, len(self))
        for _ in range(MOST_IN_A_ROW):
            item = self.crops.item(index, epoch)
            if item.pixels is not None:
                return item
            if item.fatal:
                raise OSError(item.reason)
            left_out.append(f"{images.root / images.files[index]} ({item.reason})")
            index = (index + 1) % len(self)
        found = f"has {MOST_IN_A_ROW} images in a row that cannot be read, such as {left_out[-1]}"
        raise FileError(images.root, found, "replace them")


class EncodedImages:
    """A folder of images as latents, with the members of `LatentDataset` that training needs.

    In epoch 0 the latents are those that training.prepare writes with the same settings and seed;
    later ones draw other flips, and of a VAE other samples of the posterior.

    Attributes:
        shape: (C, h, w) of a latent.
        classes: names of the classes.
        labels: (n,) int64, of all images.
        kind: "latents".
        index: what index.json of a prepared folder would say about them.
        crops: the images as a loader reads them, for `encode`.

    Args:
        images: from `list_images`.
        vae: a VAE or an RAE on the device.
        classes: names of the classes.
        name: of the VAE.
        size: width and height of the images' crops.
        flip: mirror each image with probability 1/2.
        seed: of flips and posterior samples.
        precision: "fp32", or "bf16" for the encoder's matrix products in bfloat16.

    Raises:
        ValueError: images of this size do not fit the VAE.
    """

    kind = "latents"

    def __init__(
        self,
        images: ImageList,
        vae: VAE | RAE,
        classes: list[str],
        *,
        name: str,
        size: int = 256,
        flip: bool = False,
        seed: int = 0,
        precision: str = "fp32",
    ):
        self.images, self.vae, self.classes, self.precision = images, vae, classes, precision
        self.shape, self.labels = vae.latent_shape(size, size), torch.tensor(images.labels)
        self.crops = NumberedCrops(
            ImageCrops(images, size, flip, seed, self.shape if vae.needs_noise else None)
        )
        space = {"space": vae.space, "scaling_factor": vae.scaling_factor}
        self.index: dict[str, Any] = {**space, "vae": name, "size": size, "flip": flip}
        self.with_tokens = False
        self._named: set[str] = set()  # images that were left out

    def __len__(self) -> int:
        return len(self.images.files)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of what makes the latents."""
        return fingerprint(self.vae)

    @property
    def decoder(self) -> VAE | RAE | None:
        """The VAE if it decodes latents; None for an RAE without a decoder."""
        blind = isinstance(self.vae, RAE) and self.vae.decoder is None
        return None if blind else self.vae

    def find_tokens(self, fitted: dict[str, Any], source: str) -> None:
        """Make `encode` return the tokens by which a source finds its modes.

        They are those of the RAE's encoder, of the very image that is encoded.

        Args:
            fitted: how the source was fitted, the "training" of its metadata.
            source: name of the source, for the error.

        Raises:
            ValueError: the VAE is no RAE, or its encoder is not the one of the source.
        """
        if not isinstance(self.vae, RAE):
            raise ValueError(
                f"{source} finds its modes by tokens, and {self.index['vae']} makes none; give an "
                "RAE as --vae, or a source without tokens"
            )
        encoder, there = self.vae.encoder, fitted_settings(fitted)
        here = {"input_size": encoder.input_size, "size": self.index["size"]}
        there.setdefault("input_size", None)
        there["input_size"] = there["input_size"] or FAMILIES[encoder.kind].input_size
        names = (encoder.source, there.get("encoder"))
        if all(names) and not any(Path(name).exists() for name in names):  # the hub's names
            here["encoder"] = encoder.source
        if "encoder" in there:
            advice = "or the --vae and --image-size of the latter"
            there = {key: there.get(key) for key in here}
            check_settings(here, there, f"{self.index['vae']} makes", source, advice)
        self.with_tokens = True

    @torch.no_grad()
    def encode(self, batch: CropBatch, device: torch.device) -> tuple[Tensor, ...]:
        """Encode a batch of the loader.

        Returns:
            Latents (n, C, h, w) float32 and labels (n,), and after `find_tokens` tokens (n, D).
        """
        self._name(batch.left_out)
        parts = []
        noise = batch.noise if batch.noise is None else batch.noise.split(PART)
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        for number, pixels in enumerate(batch.pixels.split(PART)):
            images = to_model(pixels.to(device, non_blocking=True))
            with bf16:
                if self.with_tokens:
                    found = self.vae.encode_with_tokens(images)
                else:
                    drawn = None if noise is None else noise[number].to(device, non_blocking=True)
                    found = (self.vae.encode(images, drawn),)
            parts.append([each.float() for each in found])
        latents, *tokens = (torch.cat(each) for each in zip(*parts, strict=True))
        return latents, batch.labels.to(device, non_blocking=True), *tokens

    def read(
        self, rows: range, state: PartialState, batch_size: int, workers: int | None
    ) -> Iterator[Tensor]:
        """Yield the latents of these images, as they are in epoch 0, on the device.

        Raises:
            FileError: an image cannot be read.
        """
        batches = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        for batch in image_loader(self.crops.crops, batches, workers, state):
            if batch.failed:
                failed = batch.failed[0]
                path = self.images.root / self.images.files[failed.index]
                raise FileError(path, f"cannot be read ({failed.reason})", "mend it")
            labels = torch.zeros(len(batch.indices), dtype=torch.int64)
            yield self.encode(CropBatch(batch.pixels, labels, batch.noise, []), state.device)[0]

    def _name(self, left_out: list[str]) -> None:
        """Print which images are left out, each once."""
        for each in left_out:
            if each not in self._named:
                self._named.add(each)
                tqdm.write(printable(f"note: {each} is left out; the next image takes its place"))
