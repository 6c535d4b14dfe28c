"""Measure the time-averaged negative log-likelihood of image models.

The command is `training.likelihood --data`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gmflow_core.flow.losses import nll, spectral_nll
from gmflow_core.flow.path import diffuse, velocity_to_x0
from gmflow_core.gaussians.density import LOG_2PI
from gmflow_core.gaussians.quantile import normal_cdf
from gmflow_core.models.precision import chosen_precision, set_precision
from training.common.devices import cuda_or_cpu
from training.common.settings import SMALLEST_SIGMA
from training.common.tables import write_table
from training.data.batches import draw_noise
from training.data.shards import LatentDataset
from training.evaluation.config import short_names
from training.evaluation.models import Model, Space
from training.experiments.likelihood import Config

FILE = "time_averaged.csv"
COLUMNS = (
    *("checkpoint", "num_components", "width", "count", "images", "nll", "nll_error"),
    *("spectral_nll", "spectral_nll_error", "difference", "difference_error"),
)


def write_images(config: Config) -> list[dict[str, Any]]:
    """Measure all models, and write the table to OUT/time_averaged.csv.

    Returns:
        Its lines. `nll` and `spectral_nll` are in bits per dimension, see `bits_of_images`;
        `spectral_nll` is empty for a model without a spectrum. `difference` is the nll's to that
        of the first line, whose images, times and noises are the same; `width` is a factor of the
        components' standard deviations. Errors are standard errors of the means.

    Raises:
        FileNotFoundError, ValueError: an input is missing, or they do not fit each other.
    """
    space, data = Space.of_data(config.data), LatentDataset(config.data)
    models = [checked(Model(checkpoint, space)) for checkpoint in config.checkpoint]
    device, lines, first = cuda_or_cpu(config.device), [], None
    for name, model in zip(short_names(config.checkpoint), models, strict=True):
        network = set_precision(model.load(device), chosen_precision(config.precision, device))
        for width in config.widths:
            bits, spectral = bits_of_images(network, model.unlabelled, data, config, name, width)
            first = bits if first is None else first
            line = {
                "checkpoint": name,
                "num_components": model.num_components,
                "width": width,
                "count": len(bits),
                "images": min(len(bits), len(data)),
                **mean_and_error("nll", bits),
                **({} if spectral is None else mean_and_error("spectral_nll", spectral)),
                **mean_and_error("difference", bits - first),
            }
            found = f"{line['nll']:.4f} bits per dimension, standard error {line['nll_error']:.4f}"
            wide = "" if width == 1 else f", {width:g} times as wide"
            print(f"{name}{wide}: {found}")
            lines.append(line)
    write_table(lines, COLUMNS, config.out / FILE)
    print(f"figures: {config.out / FILE}")
    return lines


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

    Returns:
        (count,), and the same under the model's spectrum, which is the paper's q^S; None if the
        network has no spectrum. float64.
    """
    device, dimensions = next(network.parameters()).device, math.prod(data.shape)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    found: list[Tensor] = []
    spectral: list[Tensor] = []
    starts = range(0, config.count, config.batch_size)
    for start in tqdm(starts, desc=name, unit="batch", dynamic_ncols=True):
        rows = range(start, min(start + config.batch_size, config.count))
        x0, labels = data.__getitems__([int(order[row % len(order)]) for row in rows])
        drawn = draw_noise(config.seed, 0, rows, (1 + dimensions,), torch.device("cpu"))
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


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """Return the mean of values (n,) under this name, and its standard error."""
    error = values.std().item() / math.sqrt(len(values))
    return {name: values.mean().item(), f"{name}_error": error}
