"""Mixture sources and autoguidance in a running ComfyUI: noise, modes, the samples they lead to, and what does not fit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core import (
    GaussianMixtureSource,
    flow_sigmas,
    load_checkpoint,
    load_source,
    save_checkpoint,
    save_source,
)
from gmflow_core.sampling.denoisers import autoguided, class_denoiser, denoiser_of
from gmflow_core.sampling.solvers import solve
from tests.diffusers_folder import random_model
from tests.helpers import normal

from .adapters import write_lora
from .bases import write_flux
from .client import Comfy, PromptError
from .graphs import latent_of, node
from .stand_in_files import write_text_encoder

SHAPE, MODES = (3, 8, 8), 5
BY_LIST = {"choice": "from the list", "modes": "3, 0-1"}
close = functools.partial(torch.allclose, atol=2e-4, rtol=1e-4)


def spherical() -> GaussianMixtureSource:
    """Modes far apart, with the weights .4, .3, .2, .1 and 0."""
    std = torch.tensor([0.3, 0.5, 0.7, 0.4, 0.6]).view(-1, 1, 1, 1)
    return GaussianMixtureSource(
        normal(MODES, *SHAPE, seed=5), std, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()
    )


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Comfy:
    """With a source, and models that know its modes, do not know them, and were trained on plain noise."""
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
    make = functools.partial(
        random_model, torch.float32, channels=3, num_classes=MODES, spectrum_layers=None
    )
    for name, seed, conditioning in (
        ("known", 0, "mode"),
        ("weak", 1, "mode"),
        ("hidden", 2, "hidden"),
    ):
        about = {**data, "source": {**record, "conditioning": conditioning}}
        save_checkpoint(make(seed=seed), models / "gmflow" / f"{name}.safetensors", data=about)
    save_checkpoint(make(seed=3), models / "gmflow" / "plain.safetensors", data=data)
    comfy.object_info()
    return comfy


def graph(
    model: str = "known",
    sampler: dict | None = None,
    steps: int = 4,
    denoise: float = 1.0,
    **noise: Any,
) -> dict:
    """Load Mixture Source -> Mixture Source Noise -> SamplerCustomAdvanced -> a saved latent."""
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
    """What the stock Add Noise makes of it on the latent, at the share `denoise`; and the modes."""
    wires = {name: [name, 0] for name in ("model", "noise", "sigmas")}
    prompt = {**prompt, "show": node("PreviewAny", source=["noise", 3])}
    prompt["sample"] = node("AddNoise", latent_image=["noise", 2], **wires)
    (shown,) = server.run(
        {name: prompt[name] for name in ("source", "noise", "show", "image") if name in prompt}
    ).outputs["show"]["text"]
    return latent_of(server, prompt), [int(mode) for mode in shown.split(",")]


def drawn(modes: list[int], seed: int = 7) -> Tensor:
    """Noise of these modes: around the means as Random Noise draws it."""
    noise = torch.randn(len(modes), *SHAPE, generator=torch.Generator().manual_seed(seed))
    return spherical().draw(modes, noise=noise)


def networks(server: Comfy, *names: str) -> list:
    return [
        load_checkpoint(
            server.base / "models" / "gmflow" / f"{name}.safetensors", dtype=torch.float32
        )[0]
        for name in names
    ]


def in_frame(network, modes: list[int]):
    """A denoiser in the coordinates of the modes."""
    labels = torch.tensor(modes)
    return denoiser_of(spherical().frame(modes).network(lambda x, sigma: network(x, sigma, labels)))


ODE = node("GMFlowODESampler", order=2, substeps=4)


# Noise and modes


def test_noise_is_of_the_modes_that_were_chosen(server: Comfy) -> None:
    noise, modes = noise_of(server, graph(**BY_LIST, batch_size=7))
    assert modes == [3, 0, 1, 3, 0, 1, 3]
    assert torch.allclose(noise, drawn(modes), atol=1e-6)
    other, _ = noise_of(server, graph(**BY_LIST, batch_size=7, noise_seed=8))
    assert not close(noise, other)


def test_modes_are_drawn_by_weight(server: Comfy) -> None:
    """Their shares, and the means and deviations of what is drawn around them."""
    count = 800
    noise, modes = noise_of(server, graph(batch_size=count))
    source, modes = spherical(), torch.tensor(modes)
    shares = torch.bincount(modes, minlength=MODES) / count
    deviation = (source.weights * (1 - source.weights) / count).sqrt()
    assert ((shares - source.weights).abs() <= 4 * deviation).all()
    mean, std = source.moments(modes)
    z = (noise - mean) / std
    assert z.mean().abs() < 4 / z.numel() ** 0.5
    assert abs(z.var() - 1) < 4 * (2 / z.numel()) ** 0.5
    assert (z.flatten(1).mean(1).square().sum() * SHAPE[0] * 64 - count).abs() < 4 * (
        2 * count
    ) ** 0.5  # independent


def test_an_item_depends_on_its_place_only(server: Comfy) -> None:
    """In a larger batch, and alone, taken out of the latent."""
    noise, modes = noise_of(server, graph(batch_size=6))
    few, few_modes = noise_of(server, graph(batch_size=2))
    assert torch.equal(few, noise[:2])
    assert few_modes == modes[:2]
    prompt = graph()
    prompt["empty"] = node("GMFlowSourceNoise", **{**prompt["noise"]["inputs"], "batch_size": 6})
    prompt["image"] = node("LatentFromBatch", samples=["empty", 2], batch_index=4, length=2)
    prompt["noise"]["inputs"]["latent_image"] = ["image", 0]
    assert torch.equal(
        latent_of(
            server,
            {
                **prompt,
                "sample": node(
                    "AddNoise",
                    model=["model", 0],
                    noise=["noise", 0],
                    sigmas=["sigmas", 0],
                    latent_image=["noise", 2],
                ),
            },
        ),
        noise[4:],
    )


def test_noise_for_image_to_image(server: Comfy) -> None:
    """(1 - sigma) image + sigma noise, for the mode that the image belongs to."""
    prompt = graph(denoise=0.6, choice="of the image: likeliest")
    prompt["other"] = node(
        "GMFlowSourceNoise", source=["source", 0], noise_seed=3, batch_size=4, **BY_LIST
    )
    prompt["clean"] = node(
        "AddNoise",
        model=["model", 0],
        noise=["other", 0],
        sigmas=["one", 0],
        latent_image=["other", 2],
    )
    prompt["one"] = node("GMFlowSigmas", steps=1, shift=1.0, denoise=1.0)
    prompt["noise"]["inputs"]["latent_image"] = ["clean", 0]
    prompt["sample"] = node(
        "AddNoise",
        model=["model", 0],
        noise=["noise", 0],
        sigmas=["sigmas", 0],
        latent_image=["clean", 0],
    )
    image, noise = drawn([3, 0, 1, 3], seed=3), drawn([3, 0, 1, 3])
    assert torch.allclose(latent_of(server, prompt), 0.4 * image + 0.6 * noise, atol=1e-5)
    prompt["noise"]["inputs"]["choice"] = "of the image: drawn"  # the modes are far apart
    assert torch.allclose(latent_of(server, prompt), 0.4 * image + 0.6 * noise, atol=1e-5)


def test_an_image_is_compared_in_the_models_own_space(server: Comfy) -> None:
    """The source's latents are half of Stable Diffusion's here: the modes of its own means, as VAE Encode would give them."""
    means = load_source(server.base / "models" / "gmflow_sources" / "latents.safetensors").means
    save_file(
        {"latent_tensor": means / 0.5, "latent_format_version_0": torch.tensor([])},
        server.base / "input" / "means.latent",
    )
    noise = {
        "noise_seed": 0,
        "batch_size": 1,
        "choice": "of the image: likeliest",
        "latent_image": ["image", 0],
    }
    prompt = {
        "source": node("GMFlowSourceLoader", source_name="latents.safetensors"),
        "image": node("LoadLatent", latent="means.latent"),
        "noise": node("GMFlowSourceNoise", source=["source", 0], **noise),
        "show": node("PreviewAny", source=["noise", 3]),
    }
    assert server.run(prompt).outputs["show"]["text"] == [
        "0, 1, 2, 3, 2"
    ]  # the fifth has no weight; the third is the widest


# Samples


def test_euler_follows_the_mean(server: Comfy) -> None:
    modes = [3, 0, 1]
    (network,) = networks(server, "known")
    expected = solve(
        "euler", class_denoiser(network, torch.tensor(modes)), drawn(modes), flow_sigmas(4)
    )
    assert close(latent_of(server, graph(**BY_LIST)), expected)


@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_gm_ode_works_in_the_coordinates_of_the_modes(server: Comfy, denoise: float) -> None:
    modes = [3, 0, 1]
    (network,) = networks(server, "known")
    frame, prompt = spherical().frame(modes), graph(sampler=ODE, denoise=denoise, **BY_LIST)
    x, sigmas = drawn(modes), flow_sigmas(4, start=denoise)
    if denoise < 1:
        prompt["first"] = node(
            "SamplerCustomAdvanced", **{**prompt["sample"]["inputs"], "sigmas": ["all", 0]}
        )
        prompt["all"] = node("GMFlowSigmas", steps=2, shift=1.0, denoise=1.0)
        prompt["sample"]["inputs"]["latent_image"] = ["first", 0]
        clean = frame.leave(
            solve(
                "gm-ode", in_frame(network, modes), frame.enter(x, 1.0), flow_sigmas(2), substeps=4
            ),
            0.0,
        )
        x = (1 - denoise) * clean + denoise * x
    y = solve("gm-ode", in_frame(network, modes), frame.enter(x, denoise), sigmas, substeps=4)
    latent = latent_of(server, prompt)
    assert close(latent, frame.leave(y, 0.0))
    wrong = solve("gm-ode", class_denoiser(network, torch.tensor(modes)), x, sigmas, substeps=4)
    assert not close(latent, wrong, atol=0.02)


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde", "gm-policy", "euler", "dpmpp-2m"])
def test_gm_sampler_draws_from_the_source(server: Comfy, solver: str) -> None:
    """The all-in-one node, with the modes as its conditioning; and it equals SamplerCustomAdvanced."""
    prompt = graph(**BY_LIST)
    settings = {
        "seed": 7,
        "steps": 4,
        "solver": solver,
        "order": 2,
        "substeps": 4,
        "shift": 1.0,
        "denoise": 1.0,
    }
    wires = {"model": ["model", 0], "latent_image": ["noise", 2], "positive": ["noise", 1]}
    prompt["sample"] = node("GMFlowSampler", **wires, **settings, final_step_size=1.0)
    result = server.run(prompt)
    assert "expect" not in result.texts.get("sample", "")
    latent = latent_of(server, prompt)
    assert latent.isfinite().all()
    if solver in ("gm-ode", "euler"):
        sampler = ODE if solver == "gm-ode" else node("KSamplerSelect", sampler_name="euler")
        assert close(latent, latent_of(server, graph(sampler=sampler, **BY_LIST)))


@pytest.mark.parametrize(
    "sampler", [ODE, node("KSamplerSelect", sampler_name="euler")], ids=["gm-ode", "euler"]
)
def test_inpainting_keeps_the_rest(server: Comfy, sampler: dict) -> None:
    prompt = graph(sampler=sampler, **BY_LIST)
    base = latent_of(server, prompt)
    prompt |= {
        "keep": node("SolidMask", value=0.0, width=64, height=64),
        "change": node("SolidMask", value=1.0, width=32, height=64),
        "mask": node(
            "MaskComposite",
            destination=["keep", 0],
            source=["change", 0],
            x=0,
            y=0,
            operation="add",
        ),
        "masked": node("SetLatentNoiseMask", samples=["sample", 0], mask=["mask", 0]),
        "again": node("GMFlowSourceNoise", **{**prompt["noise"]["inputs"], "noise_seed": 11}),
    }
    prompt["second"] = node(
        "SamplerCustomAdvanced",
        **{**prompt["sample"]["inputs"], "noise": ["again", 0], "latent_image": ["masked", 0]},
    )
    prompt["save"]["inputs"]["samples"] = ["second", 0]
    out = latent_of(server, prompt)
    assert torch.allclose(out[..., 4:], base[..., 4:], atol=1e-4)
    assert (out - base)[..., :4].abs().mean() > 0.05


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "heun", "uni_pc", "euler_ancestral"])
def test_stock_samplers_run(server: Comfy, name: str) -> None:
    prompt = graph(
        sampler=node("KSamplerSelect", sampler_name=name), steps=5
    )  # uni_pc writes into the sigmas it gets
    assert latent_of(server, prompt).isfinite().all()


# What does not fit


@pytest.mark.parametrize(
    "sampler",
    [
        ODE,
        node("GMFlowSDESampler", order=1),
        node("GMFlowPolicySampler", substeps=8, temperature=0.0, stochasticity=0.0),
    ],
    ids=["ode", "sde", "policy"],
)
def test_hidden_modes_and_exact_samplers_do_not_go_together(server: Comfy, sampler: dict) -> None:
    prompt = graph("hidden", sampler)
    prompt["labels"] = node("GMFlowClassLabels", model=["model", 0], label="2", repeat=3)
    prompt["guider"]["inputs"]["conditioning"] = ["labels", 0]
    with pytest.raises(PromptError, match=r"does not know the modes; choose euler"):
        server.run(prompt)
    prompt["sampler"] = node("KSamplerSelect", sampler_name="euler")
    assert latent_of(server, prompt).isfinite().all()


def test_other_noise_is_noticed(server: Comfy) -> None:
    """Random noise; labels that are not the noise's modes; not the noise that fits."""
    assert "sample" not in server.run(graph(**BY_LIST)).texts
    prompt = graph(**BY_LIST)
    prompt["random"] = node("RandomNoise", noise_seed=1)
    prompt["sample"]["inputs"]["noise"] = ["random", 0]
    assert "connect 'Mixture Source Noise' to noise" in server.run(prompt).texts["sample"]
    prompt = graph(**BY_LIST)
    prompt["labels"] = node("GMFlowClassLabels", model=["model", 0], label="2", repeat=3)
    prompt["guider"]["inputs"]["conditioning"] = ["labels", 0]
    assert "conditioning says [2, 2, 2]" in server.run(prompt).texts["sample"]
    both = graph(**BY_LIST)
    both["labels"] = prompt["labels"]
    both["both"] = node(
        "ConditioningCombine", conditioning_1=["noise", 1], conditioning_2=["labels", 0]
    )
    both["guider"]["inputs"]["conditioning"] = ["both", 0]
    assert "conditioning says [2, 2, 2]" in server.run(both).texts["sample"]
    prompt["sampler"] = ODE
    with pytest.raises(PromptError, match="connect 'modes' of 'Mixture Source Noise'"):
        server.run(prompt)


def test_noise_of_a_source_is_noticed_by_a_model_without_one(server: Comfy) -> None:
    prompt = graph(**BY_LIST)
    prompt["model"]["inputs"]["model_name"] = "digits_k8.safetensors"
    prompt["labels"] = node("GMFlowClassLabels", model=["model", 0], label="2", repeat=3)
    prompt["guider"]["inputs"]["conditioning"] = ["labels", 0]
    assert "connect 'RandomNoise' to noise" in server.run(prompt).texts["sample"]
    prompt["random"] = node("RandomNoise", noise_seed=1)
    prompt["sample"]["inputs"]["noise"] = ["random", 0]
    assert not server.run(prompt).texts.get("sample", "").strip()


@pytest.mark.parametrize(
    ("noise", "complaint"),
    [
        (
            {"choice": "from the list", "modes": "9" * 20},
            "modes between 9{20} and 9{20} do not fit a source of 5 modes",
        ),
        (
            {"choice": "from the list", "modes": "1, 5"},
            "modes between 1 and 5 do not fit a source of 5 modes; give 0 to 4",
        ),
        ({"choice": "from the list", "modes": "1, x"}, "'x' in the list of modes is no mode"),
        ({"choice": "from the list", "modes": "3-1"}, "'3-1' in the list of modes"),
        ({"choice": "from the list"}, "the list of modes is empty"),
        ({"choice": "of the image: drawn"}, "connect it to latent_image"),
        (
            {"choice": "of the image: drawn", "latent_image": ["empty", 2]},
            "the latent is empty; connect VAE Encode",
        ),
        (
            {"latent_image": ["big", 0]},
            r"samples are \(3, 8, 8\), but the latents are \(3, 16, 16\)",
        ),
        ({"source": ["latents", 0]}, r"samples are \(4, 8, 8\), but the latents are \(3, 8, 8\)"),
        (
            {"source": ["two", 0]},
            r"trained with a source of 5 modes .* and this one has 2 modes of .*; give that one",
        ),
    ],
)
def test_what_does_not_fit_is_named(server: Comfy, noise: dict, complaint: str) -> None:
    prompt = graph(**noise)
    for name in ("latents", "two"):
        prompt[name] = node("GMFlowSourceLoader", source_name=f"{name}.safetensors")
    prompt["empty"] = node(
        "GMFlowSourceNoise", source=["source", 0], noise_seed=0, batch_size=1, choice="by weight"
    )
    prompt["big"] = node(
        "LatentUpscale",
        samples=["empty", 2],
        upscale_method="nearest-exact",
        width=128,
        height=128,
        crop="disabled",
    )
    with pytest.raises(PromptError, match=complaint):
        server.run(prompt)


def test_a_broken_latent_is_named(server: Comfy) -> None:
    prompt = graph(choice="of the image: drawn")
    prompt["first"] = node(
        "AddNoise",
        model=["model", 0],
        noise=["random", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 2],
    )
    prompt["empty"] = node(
        "GMFlowSourceNoise", source=["source", 0], noise_seed=0, batch_size=1, choice="by weight"
    )
    prompt["random"] = node("RandomNoise", noise_seed=1)
    for i in range(40):  # up to infinity
        prompt[f"m{i}"] = node(
            "LatentMultiply", samples=[f"m{i - 1}" if i else "first", 0], multiplier=10.0
        )
    prompt["noise"]["inputs"]["latent_image"] = ["m39", 0]
    with pytest.raises(PromptError, match="rows 0 of 1 are not finite"):
        server.run(prompt)


def test_modes_that_do_not_fit_the_batch(server: Comfy) -> None:
    prompt = graph(**BY_LIST)
    prompt["part"] = node("LatentFromBatch", samples=["noise", 2], batch_index=1, length=1)
    prompt["sample"]["inputs"]["latent_image"] = ["part", 0]
    with pytest.raises(
        PromptError, match=r"3 modes do not fit a batch of 1 latents.*connect the latent"
    ):
        server.run(prompt)


def test_models_that_do_not_know_the_modes(server: Comfy) -> None:
    for model in ("plain", "hidden"):
        with pytest.raises(PromptError, match="this model was not trained to know them"):
            server.run(graph(model))


def test_diagonal_modes(server: Comfy) -> None:
    prompt = graph(sampler=ODE)
    prompt["source"]["inputs"]["source_name"] = "diagonal.safetensors"
    with pytest.raises(PromptError, match="sample with euler"):
        server.run(prompt)
    prompt["sampler"] = node("KSamplerSelect", sampler_name="euler")
    assert latent_of(server, prompt).isfinite().all()


def test_missing_and_foreign_sources(server: Comfy) -> None:
    prompt = graph()
    prompt["source"]["inputs"]["source_name"] = "gone.safetensors"
    with pytest.raises(PromptError, match=r"there is no mixture source 'gone.*diagonal"):
        server.run(prompt)
    folder = server.base / "models"
    (folder / "gmflow_sources" / "model.safetensors").write_bytes(
        (folder / "gmflow" / "known.safetensors").read_bytes()
    )
    server.object_info()
    prompt["source"]["inputs"]["source_name"] = "model.safetensors"
    with pytest.raises(PromptError, match="not a Gaussian-mixture source"):
        server.run(prompt)


# Autoguidance


def auto(prompt: dict, guide: str = "guide", scale: float = 1.5, **settings) -> dict:
    """The same with Autoguidance."""
    about = {"scale": scale, "start_percent": 0.0, "end_percent": 1.0, **settings}
    wires = {
        "model": ["model", 0],
        "guide": [guide, 0],
        "positive": prompt["guider"]["inputs"]["conditioning"],
    }
    return {**prompt, "guider": node("GMFlowAutoguidance", **wires, **about)}


@pytest.mark.parametrize(
    ("solver", "sampler"),
    [("euler", node("KSamplerSelect", sampler_name="euler")), ("gm-ode", ODE)],
)
def test_autoguidance_is_the_formula(server: Comfy, solver: str, sampler: dict) -> None:
    """With modes, of which model and guide are told the same; GM-ODE's mixture moves as a whole."""
    modes = [3, 0, 1]
    prompt = auto(
        {
            **graph(sampler=sampler, **BY_LIST),
            "guide": node("GMFlowLoader", model_name="weak.safetensors"),
        }
    )
    main, weak = networks(server, "known", "weak")
    frame = spherical().frame(modes)
    denoiser = autoguided(in_frame(main, modes), in_frame(weak, modes), 1.5)
    y = solve(solver, denoiser, frame.enter(drawn(modes), 1.0), flow_sigmas(4), substeps=4)
    assert close(latent_of(server, prompt), frame.leave(y, 0.0))


def test_interval_and_scale_one(server: Comfy) -> None:
    """Of the sigmas 1, .75, .5, .25 the middle two are guided; at scale 1, or in no interval, the guide is not even loaded."""
    modes = [3, 0, 1]
    prompt = {**graph(**BY_LIST), "guide": node("GMFlowLoader", model_name="weak.safetensors")}
    main, weak = (
        class_denoiser(network, torch.tensor(modes))
        for network in networks(server, "known", "weak")
    )
    both = autoguided(main, weak, 3.0)
    expected = solve(
        "euler",
        lambda x, sigma: (both if 0.4 < sigma[0] < 0.8 else main)(x, sigma),
        drawn(modes),
        flow_sigmas(4),
    )
    assert close(
        latent_of(server, auto(prompt, scale=3.0, start_percent=0.2, end_percent=0.6)), expected
    )
    prompt["guide"]["inputs"]["weight_dtype"] = "bf16"  # one that is not loaded yet
    plain = latent_of(server, prompt)
    for count, settings in (
        (1, {"scale": 1.0}),
        (1, {"start_percent": 0.1, "end_percent": 0.2}),
        (2, {"scale": 2.0}),
    ):
        before = server.log().count("Requested to load")
        assert torch.equal(latent_of(server, auto(prompt, **settings)), plain) == (count == 1)
        assert server.log().count("Requested to load") == before + count


@pytest.fixture(scope="module")
def flux(server: Comfy) -> Comfy:
    models = server.base / "models"
    for name, seed in (("flux1-dev", 0), ("flux1-copy", 0), ("flux1-small", 4)):
        write_flux(
            models / "diffusion_models" / f"{name}.safetensors", seed=seed, dtype=torch.float32
        )
    write_lora(models / "loras" / "flux_style.safetensors", "flux")
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(models / "text_encoders" / f"{name}.safetensors")
    server.object_info()
    return server


LOADERS = {
    "UNETLoader": {"weight_dtype": "default"},
    "GMFlowLoadDiffusionModel8bit": {"compute": "16 bit"},
}


def flux_graph(steps: int = 3) -> dict:
    wires = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    return {
        "model": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
        "guide": node("UNETLoader", unet_name="flux1-small.safetensors", weight_dtype="default"),
        "weak": node(
            "LoraLoaderModelOnly",
            model=["model", 0],
            lora_name="flux_style.safetensors",
            strength_model=-1.0,
        ),
        "clip": node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl.safetensors",
            type="flux",
        ),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="a lighthouse at dusk"),
        "other": node("CLIPTextEncode", clip=["clip", 0], text="a fox"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "noise": node("RandomNoise", noise_seed=0),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["text", 0]),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("GMFlowSigmas", steps=steps, shift=1.0, denoise=1.0),
        "sample": node("SamplerCustomAdvanced", latent_image=["latent", 0], **wires),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


@pytest.mark.parametrize("guide", ["guide", "weak"])
def test_autoguidance_of_flux(flux: Comfy, guide: str) -> None:
    """One step is linear in the two models' own: with another FLUX, and with the same one weakened by a LoRA."""
    prompt = flux_graph(steps=1)
    main = latent_of(flux, prompt)
    prompt["guider"]["inputs"]["model"] = [guide, 0]
    weak = latent_of(flux, prompt)
    assert not close(main, weak, atol=0.02)
    assert close(latent_of(flux, auto(flux_graph(steps=1), guide)), weak + 1.5 * (main - weak))
    assert close(
        latent_of(flux, auto(flux_graph(steps=1), guide, scale=2.0)), weak + 2.0 * (main - weak)
    )
    assert close(
        latent_of(
            flux,
            flux_graph(steps=1) | {"sigmas": node("GMFlowSigmas", steps=1, shift=2.0, denoise=1.0)},
        ),
        main,
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_models_in_turn_are_what_they_are_apart(flux: Comfy, loader: str) -> None:
    """A guide that is the model with a LoRA: the same samples as with the LoRA on a copy of the file; and afterwards the model
    is what it was. The model as its own guide changes nothing."""
    base = {
        **flux_graph(),
        "model": node(loader, unet_name="flux1-dev.safetensors", **LOADERS[loader]),
    }
    plain = latent_of(flux, base)
    before = flux.log().count("loaded in turn")
    in_turn = latent_of(flux, auto(base, "weak", start_percent=0.2))
    assert flux.log().count("loaded in turn") == before + 1
    prompt = auto(base, "weak", start_percent=0.2)
    prompt["copy"] = node(loader, unet_name="flux1-copy.safetensors", **LOADERS[loader])
    prompt["weak"] = {
        **prompt["weak"],
        "inputs": {**prompt["weak"]["inputs"], "model": ["copy", 0]},
    }
    assert close(in_turn, latent_of(flux, prompt))
    assert flux.log().count("loaded in turn") == before + 1
    assert not close(in_turn, plain, atol=0.02)
    assert close(latent_of(flux, auto(base, "model")), plain)
    ddim = node(
        "KSamplerSelect", sampler_name="ddim"
    )  # Euler by another name, so that nothing is cached
    assert close(latent_of(flux, {**base, "sampler": ddim}), plain)


def test_the_guide_can_have_a_conditioning_of_its_own(flux: Comfy) -> None:
    prompt = flux_graph(steps=1)
    main = latent_of(flux, prompt)
    prompt["guider"]["inputs"] |= {"model": ["guide", 0], "conditioning": ["other", 0]}
    weak = latent_of(flux, prompt)
    other = auto(flux_graph(steps=1))
    other["guider"]["inputs"]["guide_positive"] = ["other", 0]
    assert close(latent_of(flux, other), weak + 1.5 * (main - weak))


def test_what_is_patched_before_guidance_applies(flux: Comfy) -> None:
    """Adaptive Projected Guidance: the part of their difference that is orthogonal to the main one, and the main one."""
    prompt = flux_graph(steps=1)
    main = latent_of(flux, prompt)
    prompt["guider"]["inputs"]["model"] = ["guide", 0]
    difference = main - latent_of(flux, prompt)
    direction = torch.nn.functional.normalize(
        main - 0.1159, dim=(1, 2, 3)
    )  # of the latent as FLUX sees it
    parallel = (difference * direction).sum((1, 2, 3), keepdim=True) * direction
    prompt = auto(flux_graph(steps=1))
    prompt["apg"] = node("APG", model=["model", 0], eta=0.0, norm_threshold=0.0, momentum=0.0)
    prompt["guider"]["inputs"]["model"] = ["apg", 0]
    assert close(latent_of(flux, prompt), main + 1.5 * (difference - parallel), atol=1e-3)


def test_models_that_do_not_go_together(flux: Comfy) -> None:
    prompt = flux_graph()
    prompt["guide"] = node("GMFlowLoader", model_name="known.safetensors")
    with pytest.raises(
        PromptError,
        match="the model's latents have 16 channels and 2 dimensions, the guide's 3 and 2",
    ):
        flux.run(auto(prompt))
    prompt["guide"] = node("ModelSamplingDiscrete", model=["model", 0], sampling="eps", zsnr=False)
    with pytest.raises(PromptError, match=r"\(flow matching\) and the guide \(diffusion"):
        flux.run(auto(prompt))
    prompt = auto(
        {**graph(), "guide": node("GMFlowLoader", model_name="weak.safetensors")},
        start_percent=0.6,
        end_percent=0.4,
    )
    with pytest.raises(PromptError, match=r"start_percent 0\.6 comes after"):
        flux.run(prompt)
