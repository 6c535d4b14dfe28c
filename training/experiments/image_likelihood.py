"""Measure the time-averaged negative log-likelihood of image models.

The command is `training.likelihood --data`.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.files.atomic import remove_leftovers
from gmflow_core.flow.losses import nll, spectral_nll
from gmflow_core.flow.path import diffuse, velocity_to_x0
from gmflow_core.gaussians.density import LOG_2PI
from gmflow_core.gaussians.quantile import normal_cdf
from gmflow_core.models.precision import chosen_precision, set_precision
from training.common.devices import cuda_or_cpu
from training.common.settings import SMALLEST_SIGMA
from training.common.tables import check_table, write_table
from training.data.batches import draw_noise
from training.data.shards import LatentDataset
from training.evaluation.chunks import Chunks
from training.evaluation.config import short_names
from training.evaluation.models import Model, Space
from training.evaluation.real_images import prepared_digest
from training.experiments.likelihood import MODULE, SHIPPED, Config

FILE = "time_averaged.csv"
PART = 5000  # draws that a stop loses at most, or one batch
COLUMNS = (
    *("checkpoint", "num_components", "width", "count", "images", "nll", "nll_error"),
    *("spectral_nll", "spectral_nll_error", "difference", "difference_error"),
)


def write_images(config: Config) -> list[dict[str, Any]]:
    """Measure all models, and write the table to OUT/time_averaged.csv after each.

    What was measured before a stop is kept in OUT/draws, and is not measured again.

    Returns:
        Its lines. `nll` and `spectral_nll` are in bits per dimension, see `bits_of_images`;
        `spectral_nll` is empty for a model without a spectrum. `difference` is the nll's to that
        of the first line, whose images, times and noises are the same; `width` is a factor of the
        components' standard deviations. For the errors see `mean_and_error`.

    Raises:
        FileExistsError: the table is not of this command.
        FileNotFoundError, ValueError: an input is missing, or they do not fit each other; or as
            `draws`.
    """
    if config.checkpoint == (str(SHIPPED),):
        raise ValueError(
            "give --checkpoint with --data: image models that were trained on such data"
        )
    space, data = Space.of_data(config.data), LatentDataset(config.data)
    if len(data) < 2:
        raise ValueError(f"{config.data} has one image; a standard error needs at least 2")
    models = [checked(Model(checkpoint, space)) for checkpoint in config.checkpoint]
    remove_leftovers(config.out)
    path = config.out / FILE
    check_table(path, COLUMNS, MODULE)
    lines, first, total = [], None, len(data)
    for name, model in zip(short_names(config.checkpoint), models, strict=True):
        measured = Measured(config, data, model, name)
        for width in config.widths:
            bits, spectral = measured.draws(width)
            first = bits if first is None else first
            line = {
                "checkpoint": name,
                "num_components": model.num_components,
                "width": width,
                "count": len(bits),
                "images": min(len(bits), len(data)),
                **mean_and_error("nll", bits, total),
                **({} if spectral is None else mean_and_error("spectral_nll", spectral, total)),
                **mean_and_error("difference", bits - first, total),
            }
            lines.append(line)
            write_table(lines, COLUMNS, path)
            found = f"{line['nll']:.4f} bits per dimension, standard error {line['nll_error']:.4f}"
            wide = "" if width == 1 else f", {width:g} times as wide"
            print(f"{name}{wide}: {found}")
    print(f"figures: {path}")
    return lines


class Measured:
    """The draws of one model, measured in parts that stay in OUT/draws.

    Args:
        config: settings.
        data: the images.
        model: the model, which is loaded on demand.
        name: its short name.
    """

    def __init__(self, config: Config, data: LatentDataset, model: Model, name: str):
        self.config, self.data, self.model, self.name = config, data, model, name
        self.device = cuda_or_cpu(config.device)
        self.precision = chosen_precision(config.precision, self.device)
        self.prepared = prepared_digest(config.data, data)

    @cached_property
    def network(self) -> nn.Module:
        """The network, on the device."""
        return set_precision(self.model.load(self.device), self.precision)

    def draws(self, width: float) -> tuple[Tensor, Tensor | None]:
        """Return the bits of all draws, as `bits_of_images`; parts that are there are read.

        Args:
            width: factor of the components' standard deviations.

        Raises:
            ValueError: some are not finite.
        """
        config, size = self.config, self.config.batch_size
        size *= -(-PART // size)
        key = {"checkpoint": self.model.fingerprint, "data": self.prepared, "width": width}
        key |= {"seed": config.seed, "precision": self.precision}
        chunks = Chunks(config.out / "draws" / f"{self.name}_{width:g}", key, config.count, size)
        remove_leftovers(chunks.folder)
        missing = [n for n in range(len(chunks)) if chunks.state(n) != "whole"]
        for number in tqdm(
            missing, desc=self.name, unit="part", dynamic_ncols=True, disable=len(missing) < 2
        ):
            found = bits_of_images(
                self.network,
                self.model.unlabelled,
                self.data,
                config,
                self.name,
                width,
                chunks.images(number),
            )
            parts = {
                k: v for k, v in zip(("bits", "spectral"), found, strict=True) if v is not None
            }
            bad = sum(int((~values.isfinite()).sum()) for values in parts.values())
            if bad:
                raise ValueError(
                    f"{self.model.checkpoint}: {bad} of {len(found[0])} likelihoods are not "
                    "finite; the checkpoint may have diverged, or try --precision fp32"
                )
            chunks.write(number, parts, {})
        read = [chunks.read(number)[0] for number in range(len(chunks))]
        spectral = [part["spectral"] for part in read if "spectral" in part]
        return torch.cat([part["bits"] for part in read]), torch.cat(spectral) if spectral else None


def checked(model: Model) -> Model:
    """Return a model that predicts p(x_0 | x_t) of noise from N(0, I) at every time.

    Raises:
        ValueError: it does not.
    """
    if model.record is not None:
        raise ValueError(
            f"{model.checkpoint} was trained with a mixture source; this measures models whose "
            "noise is N(0, I)"
        )
    few = model.data.get("few_steps")
    if few:
        raise ValueError(
            f"{model.checkpoint} is a student of {few['steps']} calls, which predicts a policy for "
            "its own segments, and no density at every time; give the model that it was distilled "
            "from"
        )
    return model


@torch.inference_mode()
def bits_of_images(
    network: nn.Module,
    unlabelled: bool,
    data: LatentDataset,
    config: Config,
    name: str = "",
    width: float = 1.0,
    rows: range | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return -log2 q(x_0 | x_t) / D of images at random times.

    Their mean is the time-averaged NLL of GMFlow (Chen et al., ICML 2025, eq. 21): D = C h w, t
    uniform in (0, 1). As q(x_0 | x_t) = q(u | x_t) / t^D with the velocity u, it is the NLL of u
    plus log2 t, of which the mean is taken, -1 / ln 2: that has the same expectation, and a smaller
    error. The density is one of pixels in [-1, 1] or of latents, as the model sees them.

    Draw i has image i of a random order, which begins anew after the last one, and its own time
    and noise; so all models are measured on the same draws.

    Args:
        network: an image model in evaluation mode.
        unlabelled: give it no classes.
        name: of the model, for the progress bar.
        width: factor of the components' standard deviations.
        rows: numbers of the draws; all `config.count` if None.

    Returns:
        (n,), and the same under the model's spectrum, which is the paper's q^S; None if the
        network has no spectrum. float64.
    """
    device, dimensions = next(network.parameters()).device, math.prod(data.shape)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    found: list[Tensor] = []
    spectral: list[Tensor] = []
    rows = range(config.count) if rows is None else rows
    starts = range(rows.start, rows.stop, config.batch_size)
    for start in tqdm(starts, desc=name, unit="batch", dynamic_ncols=True, leave=False):
        batch = range(start, min(start + config.batch_size, rows.stop))
        x0, labels = data.__getitems__([int(order[row % len(order)]) for row in batch])
        drawn = draw_noise(config.seed, 0, batch, (1 + dimensions,), torch.device("cpu"))
        sigma = normal_cdf(drawn[:, 0]).clamp(SMALLEST_SIGMA, 1).to(device)
        noise = drawn[:, 1:].unflatten(1, data.shape).to(device)
        x0, labels = x0.to(device), labels.to(device)
        if unlabelled:
            labels = torch.full_like(labels, network.config.num_classes)
        x = diffuse(x0, sigma, noise)
        mixture = network(x, sigma, labels)
        mixture = dataclasses.replace(mixture, log_std=mixture.log_std + math.log(width))
        nats = nll(mixture, noise - x0).double().flatten(1).sum(1)
        found.append(nats.cpu())
        if network.spectrum_net is not None:
            gaussian = velocity_to_x0(mixture.moment_match(), x, sigma)
            gain = spectral_nll(mixture, noise - x0, network.spectrum_net(gaussian))
            spectral.append((nats + gain.double().flatten(1).sum(1)).cpu())
    return _bits(found, dimensions), _bits(spectral, dimensions) if spectral else None


def _bits(parts: list[Tensor], dimensions: int) -> Tensor:
    """Return NLLs of velocities in nats, without their constant, as those of x_0 in bits."""
    return (torch.cat(parts) / dimensions + 0.5 * LOG_2PI - 1) / math.log(2)


def mean_and_error(name: str, values: Tensor, images: int) -> dict[str, float]:
    """Return the mean of the draws' values (n,) under this name, and its standard error.

    Draw i is one of image i % `images`, see `bits_of_images`. Draws of the same image depend on
    each other, so the error is that of a mean over images: each counts with the mean of its draws,
    and as often as it was drawn. Where no image is drawn twice it is std / sqrt(n).

    Args:
        images: number of images, at least 2.
    """
    image = torch.arange(len(values)) % images
    used, mean = min(images, len(values)), values.mean()
    away = torch.zeros(used, dtype=values.dtype).index_add(0, image, values - mean) / len(values)
    error = (away.square().sum() * used / (used - 1)).sqrt().item()
    return {name: mean.item(), f"{name}_error": error}
