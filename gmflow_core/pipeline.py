"""Images of classes from one model: its network, the names of its classes, and its VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from .files.checkpoint import load_checkpoint, read_metadata
from .files.diffusers_vae import load_vae, load_vae_folder, own_vae
from .files.errors import FileError, printable, quoted
from .files.hub import tidy_source
from .files.labels import label_numbers
from .models.devices import usable_device
from .models.image_network import ImageNetwork
from .models.precision import chosen_precision, set_precision
from .models.vae import SD_VAE, VAE
from .pictures import to_image
from .sampling.few_steps import Choice, choose_sampling
from .sampling.guidance import Guidance
from .sampling.images import sample_images
from .sampling.seeds import seed_list
from .source.files import load_source
from .source.source import GaussianMixtureSource

MOST_AT_ONCE = 64  # images that the network samples together
MOST_DECODED = 4  # latents that the VAE decodes together
OF_SAMPLE_IMAGES = {  # settings of `sample_images` that `ImagePipeline` has no use for
    *("sigmas", "return_trajectory", "source", "modes", "callback", "noise")
}
CLOSE = 1e-3  # relative difference of two scaling factors of the same VAE
VAE_ADVICE = (
    f"give one as --vae, a folder or hub id such as {SD_VAE}; or an --out that ends in "
    ".safetensors; or use the model in ComfyUI"
)
RAE_ADVICE = (
    "`training.evaluate` decodes those of RAEs; in Python, give what "
    "`training.encoders.load.load_vae` returns as the `vae` of ImagePipeline"
)


class Decoder(Protocol):
    """Decodes latents, as `gmflow_core.models.vae.VAE` does."""

    scaling_factor: float

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1], of scaled latents (B, C, h, w)."""


class ImagePipeline:
    """A model of images of classes, from names of classes to pictures.

    `load` is the usual way to get one.

    Args:
        network: a `GMDiT` or `DiTDH`.
        data: what its samples are, see `save_checkpoint`.
        name: the model's name in messages.
        vae: decodes its latents: a folder or hub id for `load_vae`; an AutoencoderKL of diffusers,
            which is put on the model's device in float32; or a `Decoder`. None: that of the folder
            or hub id `name`.
        source: mixture source that the model was trained with, if any.

    Attributes:
        labels: names of the classes by number; empty if the model names none.
        num_classes: number of classes, or of the source's modes where these are the labels.
        knows_modes: the labels are the modes of the source.

    Raises:
        ValueError: the source or the VAE is not the model's.
    """

    def __init__(
        self,
        network: nn.Module,
        data: dict[str, Any],
        *,
        name: str = "the model",
        vae: str | Path | Decoder | None = None,
        source: GaussianMixtureSource | None = None,
    ):
        self.network, self.data, self.name, self.source = network, data, name, source
        self.labels: list[str] = list(data.get("labels") or [])
        self.num_classes: int = network.config.num_classes
        record = data.get("source")
        if source is not None:
            source.require_record(record, name)
        elif record is not None:
            raise ValueError(
                f"{name} was trained with a mixture source; give it as --source "
                "(`source` of ImagePipeline)"
            )
        self.knows_modes = record is not None and record.get("conditioning") == "mode"
        if vae is not None and self.makes_pixels:
            raise ValueError(f"{name} makes pixels, which need no VAE; leave it out")
        if hasattr(vae, "post_quant_conv"):  # diffusers' own
            vae = VAE(vae).to(next(network.parameters()).device)
            self._check_vae(vae)
        self._vae = vae

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        vae: str | Path | Decoder | None = None,
        source: str | Path | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
    ) -> ImagePipeline:
        """Load a model; its VAE is loaded when the first picture is asked for.

        Args:
            model: a checkpoint, a folder in the layout of diffusers, or the hub id of one.
            vae: VAE of its latents: a folder in diffusers' layout, a hub id, or a `Decoder`. None:
                that of the model's own folder.
            source: mixture source that the model was trained with: a file, folder or hub id.
            device: where it runs; None: a GPU if there is one.
            precision: of the network's products: "bf16", "fp32", or "auto", bf16 on a GPU.

        Raises:
            FileNotFoundError, ValueError, OSError: as `load_checkpoint`; or it is no model of
                images, or was trained with a source that is not given; or there is no such
                precision.
        """
        model, device = tidy_source(model), usable_device(device)
        precision = chosen_precision(precision, device)  # before the long work
        data = read_metadata(model)["data"]
        network, _ = load_checkpoint(model, device=device)
        if not isinstance(network, ImageNetwork):
            raise FileError(model, "is a model of points, not of images", "use `gmflow sample`")
        set_precision(network, precision)
        loaded = None if source is None else load_source(source, device)
        return cls(network, data, name=model, vae=vae, source=loaded)

    @property
    def makes_pixels(self) -> bool:
        """True if the samples are pixels, not latents."""
        return self.data.get("space") == "pixels"

    def label_ids(self, labels: Sequence[str | int]) -> list[int]:
        """Return the numbers of classes that are given by name or number.

        Args:
            labels: a list or one alone. A whole number is a class's number, whatever the classes
                are called; a text is looked up by `find_label`, among the names first.

        Raises:
            ValueError: one fits no class, or several (the message lists the nearest), or is
                neither text nor whole number.
        """
        return label_numbers(labels, self.labels, self.num_classes)

    def __call__(self, labels: Sequence[str | int] | None, **settings: Any) -> list[Image.Image]:
        """Sample pictures, one for each label; the arguments are those of `sample`.

        Raises:
            ModuleNotFoundError: diffusers, which decodes latents, is not installed.
            ValueError: as `sample`; or there is no VAE for the model's latents.
        """
        self.require_vae()  # before the long work
        images = self.decode(self.sample(labels, **settings))
        return [to_image(image.permute(1, 2, 0)) for image in images]

    def sample(
        self,
        labels: Sequence[str | int] | None,
        *,
        seeds: Sequence[int] | None = None,
        solver: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | Guidance = 0.0,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Sample images in the model's own space: latents, or pixels in [-1, 1].

        Args:
            labels: class of each image, by name or number; None for images of no class. Of a model
                that knows its source's modes: their numbers.
            seeds: one for each image, which all its noise comes from, from 0 to 2**63 - 1; 0 to
                B - 1 if None. Seeds that are equal modulo 2**32 give the same noise.
            solver, steps, shift: see `choose_sampling`, which fills in what is left out.
            guidance: weight of probabilistic guidance in [0, 1), or a `Guidance`.
            progress: called with the network calls that are done and those in all.
            settings: further settings of `sample_images`: `order`, `substeps`, `spacing`,
                `temperature`, `stochasticity`, `size`, `guide`, `guide_scale`, `constrain`, `blend`
                and `check`. `sample_images` alone gives a trajectory and takes your own `sigmas`.

        Returns:
            (B, C, h, w) float32, on the CPU.

        Raises:
            ValueError: a label is unknown, a setting is out of range, or the samples are not
                finite.
            TypeError: there is no setting of that name, or it is one of `sample_images` alone.
        """
        given = {"seeds": seeds, "solver": solver, "steps": steps, "shift": shift}
        given |= {"guidance": guidance, "progress": progress}
        return torch.cat(list(self.sample_in_parts(labels, **given, **settings)))

    def sample_in_parts(
        self,
        labels: Sequence[str | int] | None,
        *,
        seeds: Sequence[int] | None = None,
        solver: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | Guidance = 0.0,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Iterator[Tensor]:
        """Return an iterator that samples the images in order, MOST_AT_ONCE at a time.

        Arguments and errors are those of `sample`. Labels, seeds and steps are checked at once, the
        rest with the first part.

        Yields:
            (b, C, h, w) float32, on the CPU.
        """
        not_here = sorted(settings.keys() & OF_SAMPLE_IMAGES)
        if not_here:
            raise TypeError(
                f"ImagePipeline takes no {', '.join(not_here)}; call sample_images for that, with "
                "the pipeline's network"
            )
        seeds = None if seeds is None else seed_list(seeds)
        ids = self._label_numbers(labels, seeds)
        seeds = list(range(len(ids))) if seeds is None else seeds
        if not ids:
            raise ValueError("there are no labels; give one for each image")
        if len(seeds) != len(ids):
            raise ValueError(f"{len(seeds)} seeds do not fit {len(ids)} labels; give one for each")
        own = choose_sampling(self.data, solver=solver, steps=steps, shift=shift)
        if not isinstance(guidance, Guidance):
            guidance = Guidance(guidance) if guidance else None
        if labels is None and guidance is not None and not guidance.idle:
            raise ValueError(
                "guidance needs classes, away from which it steers; give labels, or no guidance"
            )
        settings |= {"guidance": guidance, "sigmas": own.sigmas() if own.steps else None}
        settings.setdefault("temperature", own.temperature)
        return self._parts(ids, seeds, own, progress, settings)

    def _parts(
        self,
        ids: Sequence[int],
        seeds: Sequence[int],
        own: Choice,
        progress: Callable[[int, int], None] | None,
        settings: dict[str, Any],
    ) -> Iterator[Tensor]:
        """Sample the images of these labels and seeds, MOST_AT_ONCE at a time."""
        calls = own.steps * -(-len(ids) // MOST_AT_ONCE)
        for start in range(0, len(ids), MOST_AT_ONCE):
            done = own.steps * (start // MOST_AT_ONCE)
            part = torch.tensor(ids[start : start + MOST_AT_ONCE])
            x = sample_images(
                self.network,
                None if self.knows_modes else part,
                source=self.source,
                modes=part if self.knows_modes else None,
                solver=own.solver,
                steps=own.steps,
                shift=own.shift,
                seeds=seeds[start : start + MOST_AT_ONCE],
                callback=progress and _counting(progress, done, calls),
                **settings,
            )
            yield self._checked(x.float().cpu())

    def decode(self, x: Tensor) -> Tensor:
        """Decode samples (B, C, h, w) to images (B, 3, H, W) in [0, 1], on the CPU.

        Raises:
            ModuleNotFoundError: diffusers, which decodes latents, is not installed.
            ValueError: there is no VAE for the model's latents, or it is for others.
        """
        if self.makes_pixels:
            images = x[:, :3].float().cpu()
        else:
            vae, device = self.require_vae(), next(self.network.parameters()).device
            images = torch.cat([vae.decode(p.to(device)).cpu() for p in x.split(MOST_DECODED)])
        return (images.float() + 1).clamp(0, 2) / 2

    def require_vae(self) -> Decoder | None:
        """Return the VAE, loaded if need be; None for a model of pixels.

        Raises:
            ModuleNotFoundError: diffusers is not installed.
            ValueError: there is none, or it is for other latents.
            OSError: it is on the hub and cannot be downloaded.
        """
        if self.makes_pixels or hasattr(self._vae, "decode"):
            return self._vae
        device = next(self.network.parameters()).device
        if self._vae is not None:
            vae = load_vae(self._vae, device)
        elif (folder := own_vae(self.name)) is not None:
            vae = load_vae_folder(folder).to(device)
        else:
            space = quoted(self.data.get("space") or "of an unknown kind")
            advice = RAE_ADVICE if self.data.get("space") == "rae" else VAE_ADVICE
            found = f"makes latents ({space}), which need a VAE to be seen, and brings none"
            raise FileError(self.name, found, advice)
        self._check_vae(vae)
        self._vae = vae
        return vae

    def _check_vae(self, vae: Any) -> None:
        """Check that a VAE is for the model's latents.

        Raises:
            ValueError: its channels or its scaling factor are others.
        """
        channels, mine = vae.network.config.latent_channels, self.network.config.channels
        factor, wanted = vae.scaling_factor, self.data.get("scaling_factor")
        if channels != mine:
            raise ValueError(
                f"the VAE decodes latents of {channels} channels, but {self.name} makes {mine}; "
                "give the one that it was trained on"
            )
        if wanted is not None and abs(factor - wanted) > CLOSE * wanted:
            raise ValueError(
                f"the VAE's scaling_factor is {factor:g}, but {self.name} was trained with "
                f"{wanted:g}; give the one that it was trained on"
            )

    def _label_numbers(
        self, labels: Sequence[str | int] | None, seeds: Sequence[int] | None
    ) -> list[int]:
        """Return the number of each image's label; `num_classes` stands for no class."""
        if labels is not None:
            if self.data.get("unlabelled"):
                raise ValueError(f"{self.name} was trained without classes; give it no labels")
            return self.label_ids(labels)
        if self.knows_modes:
            raise ValueError(
                f"the labels of {self.name} are modes of its source, so every image has one; give "
                "labels"
            )
        if seeds is None:
            raise ValueError("give labels, or seeds for images of no class")
        return [self.num_classes] * len(seeds)

    def _checked(self, x: Tensor) -> Tensor:
        """Return samples after a check that they are finite."""
        if not x.isfinite().all():
            raise FileError(
                self.name,
                "makes samples that are not finite",
                "its weights are damaged or too large; with the precision bf16, try fp32",
            )
        return x

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.network.parameters())
        kind = type(self.network).__name__
        return printable(f"ImagePipeline({self.name}: {kind}, {size:,} parameters)")


def _counting(progress: Callable[[int, int], None], done: int, total: int) -> Callable[..., None]:
    """Return a solver's callback that reports network calls, `done` of them before it."""

    def report(step: int, x: Tensor, x0: Tensor) -> None:
        progress(done + step + 1, total)

    return report
