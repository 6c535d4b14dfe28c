"""Prompts with mixture sources, and the sources and models that they name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gmflow_core import GaussianMixtureSource, load_checkpoint, save_checkpoint, save_source
from gmflow_core.sampling.denoisers import denoiser_of
from tests.diffusers_folder import random_model
from tests.helpers import normal

from .client import Comfy
from .graphs import latent_of, node

SHAPE, MODES = (3, 8, 8), 5
BY_LIST = {"choice": "from the list", "modes": "3, 0-1"}
ODE = node("GMFlowODESampler", order=2, substeps=4)
close = functools.partial(torch.allclose, atol=2e-4, rtol=1e-4)


def spherical() -> GaussianMixtureSource:
    """Return a source of modes far apart, with the weights .4, .3, .2, .1 and 0."""
    std = torch.tensor([0.3, 0.5, 0.7, 0.4, 0.6]).view(-1, 1, 1, 1)
    return GaussianMixtureSource(
        normal(MODES, *SHAPE, seed=5), std, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()
    )


def serve(comfy: Comfy) -> Comfy:
    """Return the server with sources, and models trained with one of them or with none.

    Models `known` and `weak` know the modes of their noise; `spectral` is `known` with a spectrum
    network; `hidden` does not know the modes; `plain` was trained with noise from N(0, I).
    """
    models, source = comfy.base / "models", spherical()
    record = {"num_modes": MODES, "shape": SHAPE, "coupling": "soft"}
    data = {"space": "pixels"}
    save_source(source, models / "gmflow_sources" / "five.safetensors", data=data)
    diagonal = GaussianMixtureSource(source.means, 0.5 * torch.ones(1, *SHAPE), source.log_weights)
    save_source(diagonal, models / "gmflow_sources" / "diagonal.safetensors", data=data)
    wide = GaussianMixtureSource(normal(MODES, 4, 8, 8), source.std, source.log_weights)
    save_source(
        wide,
        models / "gmflow_sources" / "latents.safetensors",
        data={"space": "sd-vae", "scaling_factor": 0.5},
    )
    two = GaussianMixtureSource(source.means[:2], source.std[:2], torch.tensor([0.5, 0.5]).log())
    save_source(two, models / "gmflow_sources" / "two.safetensors", data=data)
    make = functools.partial(random_model, torch.float32, channels=3, num_classes=MODES)
    for name, seed, conditioning, layers in (
        ("known", 0, "mode", None),
        ("spectral", 0, "mode", (6, 4)),
        ("weak", 1, "mode", None),
        ("hidden", 2, "hidden", None),
    ):
        about = {**data, "source": {**record, "conditioning": conditioning}}
        model = make(seed=seed, spectrum_layers=layers)
        save_checkpoint(model, models / "gmflow" / f"{name}.safetensors", data=about)
    save_checkpoint(
        make(seed=3, spectrum_layers=None), models / "gmflow" / "plain.safetensors", data=data
    )
    comfy.object_info()
    return comfy


def graph(
    model: str = "known",
    sampler: dict | None = None,
    steps: int = 4,
    denoise: float = 1.0,
    **noise: Any,
) -> dict:
    """Return a graph from GM Load Mixture Source through SamplerCustomAdvanced to a latent."""
    settings = {
        "source": ["source", 0],
        "noise_seed": 7,
        "batch_size": 3,
        "choice": "by weight",
        "modes": "",
        **noise,
    }
    wires = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    return {
        "model": node("GMFlowLoader", model_name=f"{model}.safetensors"),
        "source": node("GMFlowSourceLoader", source_name="five.safetensors"),
        "noise": node("GMFlowSourceNoise", **settings),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["noise", 1]),
        "sampler": sampler or node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("GMFlowSigmas", steps=steps, shift=1.0, denoise=denoise),
        "sample": node("SamplerCustomAdvanced", latent_image=["noise", 2], **wires),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


def noise_of(server: Comfy, prompt: dict) -> tuple[Tensor, list[int]]:
    """Return the latent after the stock Add Noise, at the share `denoise`, and the modes."""
    wires = {name: [name, 0] for name in ("model", "noise", "sigmas")}
    prompt = {**prompt, "show": node("PreviewAny", source=["noise", 3])}
    prompt["sample"] = node("AddNoise", latent_image=["noise", 2], **wires)
    (shown,) = server.run(
        {name: prompt[name] for name in ("source", "noise", "show", "image") if name in prompt}
    ).outputs["show"]["text"]
    return latent_of(server, prompt), [int(mode) for mode in shown.split(",")]


def drawn(modes: list[int], seed: int = 7) -> Tensor:
    """Return noise of these modes: around the means it is that of Random Noise."""
    noise = torch.randn(len(modes), *SHAPE, generator=torch.Generator().manual_seed(seed))
    return spherical().draw(modes, noise=noise)


def networks(server: Comfy, *names: str) -> list:
    """Load the networks of models by name."""
    return [
        load_checkpoint(
            server.base / "models" / "gmflow" / f"{name}.safetensors", dtype=torch.float32
        )[0]
        for name in names
    ]


def in_frame(network, modes: list[int]):
    """Return a denoiser in the coordinates of the modes."""
    labels = torch.tensor(modes)
    return denoiser_of(spherical().frame(modes).network(lambda x, sigma: network(x, sigma, labels)))
