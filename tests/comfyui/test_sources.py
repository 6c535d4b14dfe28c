"""Mixture sources in a running ComfyUI: noise, modes, samples, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gmflow_core import flow_sigmas, load_source
from gmflow_core.sampling.denoisers import class_denoiser
from gmflow_core.sampling.solvers import solve

from .client import Comfy, PromptError
from .graphs import latent_of, node
from .source_prompts import (
    BY_LIST,
    MODES,
    ODE,
    close,
    drawn,
    graph,
    in_frame,
    networks,
    noise_of,
    serve,
    spherical,
)


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Comfy:
    return serve(comfy)


def test_noise_is_of_the_modes_that_were_chosen(server: Comfy) -> None:
    noise, modes = noise_of(server, graph(**BY_LIST, batch_size=7))
    assert modes == [3, 0, 1, 3, 0, 1, 3]
    assert torch.allclose(noise, drawn(modes), atol=1e-6)
    other, _ = noise_of(server, graph(**BY_LIST, batch_size=7, noise_seed=8))
    assert not close(noise, other)


def test_modes_are_drawn_by_weight(server: Comfy) -> None:
    """Check the modes' shares, and the means and deviations of the noise around them."""
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
    pixels = z[0].numel()
    spread = z.flatten(1).mean(1).square().sum() * pixels  # chi-squared if pixels are independent
    assert (spread - count).abs() < 4 * (2 * count) ** 0.5


def test_an_item_depends_on_its_place_only(server: Comfy) -> None:
    """Check items of a larger batch, and items taken out of a latent."""
    noise, modes = noise_of(server, graph(batch_size=6))
    few, few_modes = noise_of(server, graph(batch_size=2))
    assert torch.equal(few, noise[:2])
    assert few_modes == modes[:2]
    prompt = graph()
    prompt["empty"] = node("GMFlowSourceNoise", **{**prompt["noise"]["inputs"], "batch_size": 6})
    prompt["image"] = node("LatentFromBatch", samples=["empty", 2], batch_index=4, length=2)
    prompt["noise"]["inputs"]["latent_image"] = ["image", 0]
    wires = {name: [name, 0] for name in ("model", "noise", "sigmas")}
    prompt["sample"] = node("AddNoise", latent_image=["noise", 2], **wires)
    assert torch.equal(latent_of(server, prompt), noise[4:])


def test_noise_for_image_to_image(server: Comfy) -> None:
    """Compare with (1 - sigma) image + sigma noise, for the mode that the image belongs to."""
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
    """A source finds the modes of its own means, given as VAE Encode would give them.

    The source's latents are half of Stable Diffusion's here.
    """
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
    # the fifth mode has no weight, and the third is the widest
    assert server.run(prompt).outputs["show"]["text"] == ["0, 1, 2, 3, 2"]


def test_euler_follows_the_mean(server: Comfy) -> None:
    modes = [3, 0, 1]
    (network,) = networks(server, "known")
    expected = solve(
        "euler", class_denoiser(network, torch.tensor(modes)), drawn(modes), flow_sigmas(4)
    )
    assert close(latent_of(server, graph(**BY_LIST)), expected)


@pytest.mark.parametrize(
    ("model", "positive", "solver"),
    [("hidden", ["none", 0], "euler"), ("known", ["noise", 1], "gm-ode")],
)
def test_auto_is_euler_where_the_modes_are_not_known(
    server: Comfy, model: str, positive: list, solver: str
) -> None:
    """Mixture solvers have no closed form there."""
    prompt = graph(model)
    settings = {"seed": 7, "steps": 0, "order": 2, "substeps": 0, "shift": 0.0, "denoise": 1.0}
    wires = {"model": ["model", 0], "positive": positive, "latent_image": ["noise", 2]}
    prompt["none"] = node("GMFlowUnconditional")
    prompt["sample"] = node("GMFlowSampler", solver="auto", **wires, **settings)
    assert f"{solver}: 4 steps, shift 1" in server.run(prompt).texts["sample"]
    chosen = {**prompt, "sample": node("GMFlowSampler", solver=solver, **wires, **settings)}
    assert latent_of(server, prompt).equal(latent_of(server, chosen))


def test_modes_beside_another_choice_are_said(server: Comfy) -> None:
    said = server.run(graph(modes="3")).texts["noise"]
    assert (
        said == "no effect: modes, as choice is 'by weight'; for this list choose 'from the list'"
    )
    assert not server.run(graph(**BY_LIST, noise_seed=9)).texts.get("noise", "").strip()


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


def test_sigmas_that_end_above_zero(server: Comfy) -> None:
    """In two samplers, the first of which returns a latent at sigma 1/2, the samples are the same.

    With order 1, as a solver of order 2 starts anew in the second sampler.
    """
    first_order = node("GMFlowODESampler", order=1, substeps=4)
    whole = latent_of(server, graph(sampler=first_order, **BY_LIST))
    prompt = graph(sampler=first_order, **BY_LIST)
    prompt["split"] = node("SplitSigmas", sigmas=["sigmas", 0], step=2)
    prompt["quiet"] = node("DisableNoise")
    wires = prompt["sample"]["inputs"]
    prompt["first"] = node("SamplerCustomAdvanced", **{**wires, "sigmas": ["split", 0]})
    wires |= {"sigmas": ["split", 1], "noise": ["quiet", 0], "latent_image": ["first", 0]}
    assert close(latent_of(server, prompt), whole)


def test_a_spectrum_is_not_used_with_a_source(server: Comfy) -> None:
    """GM-SDE with a spectrum network gives what it gives without."""
    sde = node("GMFlowSDESampler", order=2)
    latent = latent_of(server, graph("spectral", sde, **BY_LIST))
    assert torch.equal(latent, latent_of(server, graph("known", sde, **BY_LIST)))


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde", "gm-policy", "euler", "dpmpp-2m"])
def test_gm_sampler_draws_from_the_source(server: Comfy, solver: str) -> None:
    """Compare the all-in-one node, with the modes as conditioning, to SamplerCustomAdvanced."""
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
    # five steps, as uni_pc writes into the sigmas it gets
    prompt = graph(sampler=node("KSamplerSelect", sampler_name=name), steps=5)
    assert latent_of(server, prompt).isfinite().all()


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
    with pytest.raises(PromptError, match=r"does not know the modes, .*; choose euler"):
        server.run(prompt)
    prompt["sampler"] = node("KSamplerSelect", sampler_name="euler")
    assert latent_of(server, prompt).isfinite().all()


def test_other_noise_is_noticed(server: Comfy) -> None:
    """Random noise, and labels other than the noise's modes, are noticed; fitting noise is not."""
    assert "sample" not in server.run(graph(**BY_LIST)).texts
    prompt = graph(**BY_LIST)
    prompt["random"] = node("RandomNoise", noise_seed=1)
    prompt["sample"]["inputs"]["noise"] = ["random", 0]
    assert (
        "connect GM Mixture Source Noise to noise, in the place of "
        in server.run(prompt).texts["sample"]
    )
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
    with pytest.raises(PromptError, match="connect 'modes' of 'GM Mixture Source Noise'"):
        server.run(prompt)


def test_noise_of_a_source_is_noticed_by_a_model_without_one(server: Comfy) -> None:
    prompt = graph(**BY_LIST)
    prompt["model"]["inputs"]["model_name"] = "digits_k8.safetensors"
    prompt["labels"] = node("GMFlowClassLabels", model=["model", 0], label="2", repeat=3)
    prompt["guider"]["inputs"]["conditioning"] = ["labels", 0]
    assert "connect RandomNoise to noise, in the place of " in server.run(prompt).texts["sample"]
    prompt["random"] = node("RandomNoise", noise_seed=1)
    prompt["sample"]["inputs"]["noise"] = ["random", 0]
    assert not server.run(prompt).texts.get("sample", "").strip()


@pytest.mark.parametrize(
    ("noise", "complaint"),
    [
        (
            {"choice": "from the list", "modes": "9" * 20},
            "mode 9{20} does not fit a source of 5 modes; give 0 to 4",
        ),
        (
            {"choice": "from the list", "modes": "1, 5"},
            "modes between 1 and 5 do not fit a source of 5 modes; give 0 to 4",
        ),
        ({"choice": "from the list", "modes": "1, x"}, "'x' in the list of modes is no mode"),
        ({"choice": "from the list", "modes": "3-1"}, "'3-1' in the list of modes"),
        ({"choice": "from the list"}, "the list of modes is empty"),
        ({"choice": "of the image: drawn"}, "no image is connected"),
        (
            {"choice": "of the image: drawn", "latent_image": ["empty", 2]},
            "the latent is empty",
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
    with pytest.raises(PromptError, match="'latent_image' is a LATENT whose samples hold"):
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
        with pytest.raises(PromptError, match="this model does not know modes"):
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
