"""Class-conditional image models in a running ComfyUI: labels, guidance, spectrum, folders."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gmflow_core import flow_sigmas, load_checkpoint, save_checkpoint
from gmflow_core.sampling.denoisers import class_denoiser
from gmflow_core.sampling.guidance import Guidance
from gmflow_core.sampling.solvers import solve
from tests.diffusers_folder import random_model, write_published_folder

from .client import Comfy, PromptError
from .graphs import latent_of, node

NAMES = [
    "tabby, tabby cat",
    "tiger cat",
    "golden retriever",
    "crane",
    "crane",
    "Pembroke, Pembroke Welsh corgi",
    "tench",
]
SCALING = 0.5  # of the folder's latents; not Stable Diffusion's, to show where it is read from
CFG = {"orthogonal": 1.0, "start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def pixels(comfy: Comfy) -> Path:
    """A random pixel-space model with a spectrum network, in models/gmflow."""
    path = comfy.base / "models" / "gmflow" / "pixels.safetensors"
    model = random_model(torch.float32, channels=3, num_classes=len(NAMES))
    save_checkpoint(model, path, data={"labels": NAMES, "space": "pixels"})
    comfy.object_info()
    return path


@pytest.fixture(scope="module")
def folder(comfy: Comfy) -> Path:
    """A random model of latents in the published layout, in models/gmflow."""
    path = comfy.base / "models" / "gmflow" / "group" / "published"
    labels = {str(i): f"class name {i}" for i in range(10)}
    write_published_folder(path, random_model(), labels=labels)
    config = path / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", str(SCALING)))
    comfy.object_info()
    return path


def graph(
    labels: Sequence[int | str] = (2, 5),
    model: str = "pixels.safetensors",
    repeat: int = 1,
    **sampler,
) -> dict:
    """Return GM Load Model -> GM Class Labels -> GM Sampler -> a saved latent."""
    settings = {
        "seed": 0,
        "steps": 4,
        "solver": "gm-ode",
        "order": 2,
        "substeps": 4,
        "shift": 1.0,
        "denoise": 1.0,
        **sampler,
    }
    more = "\n".join(map(str, labels[1:]))
    return {
        "model": node("GMFlowLoader", model_name=model),
        "labels": node(
            "GMFlowClassLabels",
            model=["model", 0],
            label=str(labels[0]),
            more_labels=more,
            repeat=repeat,
        ),
        "sample": node(
            "GMFlowSampler",
            model=["model", 0],
            latent_image=["labels", 2],
            positive=["labels", 0],
            **settings,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


def ksampler(prompt: dict, cfg: float, model: str = "guided", steps: int = 4) -> dict:
    """Return the prompt with GM Probabilistic Guidance and a stock KSampler."""
    names = ("positive", "negative", "latent_image")
    wires = {name: ["labels", output] for output, name in enumerate(names)} | {"model": [model, 0]}
    stock = {"sampler_name": "euler", "scheduler": "simple"}
    settings = {"seed": 0, "steps": steps, "cfg": cfg, "denoise": 1.0, **stock}
    guided = node("GMFlowProbabilisticGuidance", model=["model", 0], **CFG)
    return {**prompt, "guided": guided, "sample": node("KSampler", **settings, **wires)}


def custom(prompt: dict, guider: dict, sampler: dict, steps: int = 4) -> dict:
    """Return the prompt with SamplerCustomAdvanced."""
    nodes = {
        "noise": node("RandomNoise", noise_seed=0),
        "sigmas": node("GMFlowSigmas", steps=steps, shift=1.0, denoise=1.0),
        "guided": node("GMFlowProbabilisticGuidance", model=["model", 0], **CFG),
        "guider": guider,
        "sampler": sampler,
    }
    wires = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    return {
        **prompt,
        **nodes,
        "sample": node("SamplerCustomAdvanced", latent_image=["labels", 2], **wires),
    }


ODE, SDE = node("GMFlowODESampler", order=2, substeps=4), node("GMFlowSDESampler", order=2)
WIRES = {"positive": ["labels", 0], "negative": ["labels", 1]}


@torch.inference_mode()
def outside(
    path: Path,
    labels: Sequence[int] = (2, 5),
    solver: str = "gm-ode",
    guidance: Guidance | None = None,
    dtype: torch.dtype | None = torch.float32,
    **changes,
) -> Tensor:
    """Return samples from gmflow_core alone, with the noise that ComfyUI draws for seed 0."""
    network, config = load_checkpoint(path, dtype=dtype)
    shape = (len(labels), config.channels, config.latent_size, config.latent_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    keys = [zlib.crc32(image.numpy().tobytes()) for image in x]  # every image's own
    noise = [
        torch.Generator().manual_seed(zlib.crc32((1).to_bytes(8, "little"), key)) for key in keys
    ]
    denoiser = class_denoiser(network, torch.tensor(labels), guidance)
    settings = {"substeps": 4, "spectrum": network.spectrum_net, "noise": noise}
    return solve(solver, denoiser, x, flow_sigmas(4), **{**settings, **changes})


close = functools.partial(torch.allclose, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde", "dpmpp-2m"])
def test_gm_sampler_equals_the_library(comfy: Comfy, pixels: Path, solver: str) -> None:
    """Guidance is fused with the second order; gm-sde uses the spectrum network."""
    expected = outside(pixels, solver=solver, guidance=Guidance(0.4))
    assert close(latent_of(comfy, graph(solver=solver, guidance=0.4)), expected)
    assert not close(latent_of(comfy, graph(solver=solver)), expected)


def test_gm_sde_without_the_spectrum_equals_the_library(comfy: Comfy, pixels: Path) -> None:
    guider = node("BasicGuider", model=["model", 0], conditioning=["labels", 0])
    off = {**SDE, "inputs": {**SDE["inputs"], "spectrum": False}}
    found, other = (latent_of(comfy, custom(graph(), guider, each)) for each in (off, SDE))
    assert close(found, outside(pixels, solver="gm-sde", spectrum=None))
    assert not close(found, other)


def test_gm_guider_equals_the_library(comfy: Comfy, pixels: Path) -> None:
    """Check that of the sigmas 1, .75, .5, .25 only the middle two are guided."""
    settings = {"scale": 0.4, "orthogonal": 0.5, "start_percent": 0.2, "end_percent": 0.6}
    guidance = Guidance(0.4, orthogonal=0.5, interval=(0.4, 0.8))
    guider = node("GMFlowGuider", model=["model", 0], positive=["labels", 0], **settings)
    assert close(latent_of(comfy, custom(graph(), guider, ODE)), outside(pixels, guidance=guidance))


def test_stock_ksampler_follows_the_guided_mean(comfy: Comfy, pixels: Path) -> None:
    expected = outside(pixels, solver="euler", guidance=Guidance(0.4))
    assert close(latent_of(comfy, ksampler(graph(), cfg=0.4)), expected)
    none = latent_of(comfy, ksampler(graph(), cfg=0.0))
    assert close(none, outside(pixels, solver="euler"))
    assert close(none, latent_of(comfy, ksampler(graph(), cfg=1.0, model="model")))


def test_gm_samplers_take_the_guider_as_it_is(comfy: Comfy, pixels: Path) -> None:
    """A CFG Guider is probabilistic after the patch, and classifier-free guidance without it."""
    for model, cfg, kind in (("guided", 0.4, "probabilistic"), ("model", 3.0, "cfg")):
        guider = node("CFGGuider", model=[model, 0], cfg=cfg, **WIRES)
        assert close(
            latent_of(comfy, custom(graph(), guider, ODE)),
            outside(pixels, guidance=Guidance(cfg, kind)),
        )


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_cfg_that_is_no_weight_is_refused(comfy: Comfy, pixels: Path, cfg: float) -> None:
    with pytest.raises(PromptError, match=rf"cfg {cfg:g} does not fit: set cfg.* in \[0, 1\)"):
        comfy.run(ksampler(graph(), cfg=cfg))
    assert latent_of(comfy, graph()).isfinite().all()


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "heun", "uni_pc", "euler_cfg_pp"])
def test_stock_samplers_run_guided(comfy: Comfy, pixels: Path, name: str) -> None:
    guider = node("GMFlowGuider", model=["model", 0], positive=["labels", 0], scale=0.3, **CFG)
    sampler = node("KSamplerSelect", sampler_name=name)
    assert latent_of(comfy, custom(graph(), guider, sampler)).isfinite().all()


def test_an_image_does_not_depend_on_its_batch(comfy: Comfy, pixels: Path) -> None:
    """Latent From Batch with the third item gives the third image, its GM-SDE noise included."""
    prompt = graph([2], repeat=3, solver="gm-sde")
    whole = latent_of(comfy, prompt)
    prompt["one"] = node("GMFlowClassLabels", model=["model", 0], label="2")
    prompt["part"] = node("LatentFromBatch", samples=["labels", 2], batch_index=2, length=1)
    prompt["sample"]["inputs"] |= {"positive": ["one", 0], "latent_image": ["part", 0]}
    assert close(latent_of(comfy, prompt), whole[2:])
    assert not close(whole[0], whole[1])


def test_every_image_has_stochastic_noise_of_its_own(comfy: Comfy, pixels: Path) -> None:
    """Only that noise differs between the four: same class, no initial noise."""
    prompt = custom(
        graph([2], repeat=4),
        node("BasicGuider", model=["model", 0], conditioning=["labels", 0]),
        SDE,
    )
    prompt["noise"] = node("DisableNoise")
    images = latent_of(comfy, prompt).flatten(1)
    assert torch.pdist(images).min() > 0.1


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde"])
def test_image_to_image_and_mask(comfy: Comfy, pixels: Path, solver: str) -> None:
    """A second, guided sampler changes only the left half; less with a lower denoise."""
    mask = {
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
    }
    base = latent_of(comfy, graph())
    moved = []
    for denoise in (0.1, 0.9):
        first = graph()["sample"]["inputs"]
        settings = {
            "latent_image": ["masked", 0],
            "denoise": denoise,
            "seed": 9,
            "solver": solver,
            "guidance": 0.3,
        }
        prompt = {**graph(), **mask, "second": node("GMFlowSampler", **{**first, **settings})}
        prompt["save"]["inputs"]["samples"] = ["second", 0]
        out = latent_of(comfy, prompt)
        assert torch.allclose(out[..., 4:], base[..., 4:], atol=1e-5)
        moved.append((out - base)[..., :4].abs().mean().item())
    assert 0 < moved[0] < 0.6 * moved[1]


def guided_twice(first: dict, guider: dict) -> dict:
    """Return the prompt with GM Guider after GM Probabilistic Guidance."""
    prompt = custom(
        graph(steps=4), node("GMFlowGuider", model=["guided", 0], **WIRES, **guider), ODE
    )
    prompt["guided"]["inputs"].update(first)
    return prompt


def test_the_last_guidance_node_counts(comfy: Comfy, pixels: Path) -> None:
    wide = {"scale": 0.4, **CFG}
    prompt = guided_twice({"start_percent": 0.4, "end_percent": 0.6}, wide)
    assert close(latent_of(comfy, prompt), outside(pixels, guidance=Guidance(0.4)))


@pytest.mark.parametrize("order", ["before", "behind"])
def test_another_cfg_function_is_refused(comfy: Comfy, pixels: Path, order: str) -> None:
    """RescaleCFG would use the weight as a scale, or be dropped."""
    prompt = ksampler(graph(), 0.4, model="guided" if order == "before" else "rescaled")
    prompt["rescaled"] = node(
        "RescaleCFG", model=["model" if order == "before" else "guided", 0], multiplier=0.7
    )
    if order == "before":
        prompt["guided"]["inputs"]["model"] = ["rescaled", 0]
    with pytest.raises(PromptError, match="RescaleCFG does not go with"):
        comfy.run(prompt)


def test_a_guider_with_a_cfg_of_its_own_is_refused(comfy: Comfy, pixels: Path) -> None:
    wires = {**WIRES, "empty_conditioning": ["labels", 1]}
    guider = node("PerpNegGuider", model=["guided", 0], cfg=0.4, neg_scale=1.0, **wires)
    with pytest.raises(PromptError, match="this one computes its own cfg"):
        comfy.run(custom(graph(), guider, ODE))


def test_what_comes_after_guidance_is_obeyed(comfy: Comfy, pixels: Path) -> None:
    """A node that changes the guided prediction changes GM-ODE's samples too."""
    prompt = custom(graph(), node("CFGGuider", model=["guided", 0], cfg=0.4, **WIRES), ODE)
    plain = latent_of(comfy, prompt)
    assert close(plain, outside(pixels, guidance=Guidance(0.4)))
    prompt["norm"] = node("CFGNorm", model=["guided", 0], strength=0.5)
    prompt["guider"]["inputs"]["model"] = ["norm", 0]
    assert (latent_of(comfy, prompt) - plain).abs().max() > 0.05


def test_zeroed_labels_are_no_class(comfy: Comfy, pixels: Path) -> None:
    prompt = graph()
    prompt["zero"] = node("ConditioningZeroOut", conditioning=["labels", 0])
    prompt["sample"]["inputs"]["positive"] = ["zero", 0]
    assert close(latent_of(comfy, prompt), outside(pixels, labels=(len(NAMES), len(NAMES))))


def test_labels_in_the_text_alone(comfy: Comfy, pixels: Path) -> None:
    prompt = graph(["(only more_labels)", 2, 5])
    assert torch.equal(latent_of(comfy, prompt), latent_of(comfy, graph()))
    prompt["labels"]["inputs"]["more_labels"] = " "
    with pytest.raises(PromptError, match="there are no labels"):
        comfy.run(prompt)


def test_pixels_and_previews_show_the_colours(comfy: Comfy, pixels: Path) -> None:
    prompt = graph([2, 5, 6], steps=6)
    for name, columns in (("each", 0), ("sheet", 2)):
        prompt[name] = node("GMFlowPixels", samples=["sample", 0], scale=4, columns=columns)
        prompt[f"show {name}"] = node("PreviewImage", images=[name, 0])
    result = comfy.run(prompt)
    shown = [np.asarray(image.convert("RGB"))[::4, ::4] for image in result.images["show each"]]
    (sheet,) = (np.asarray(image.convert("RGB"))[::4, ::4] for image in result.images["show sheet"])
    np.testing.assert_array_equal(
        sheet[1:9, 10:18], shown[1]
    )  # a gap as wide as one of these pixels around each
    np.testing.assert_array_equal(sheet[10:18, 1:9], shown[2])
    assert (sheet[9:, 9:] == 255).all()
    latent = latent_of(comfy, graph([2, 5, 6], steps=6))
    expected = ((latent + 1) / 2).clamp(0, 1).movedim(1, -1).numpy() * 255
    np.testing.assert_allclose(np.stack(shown), expected, atol=1.5)
    assert result.images["show each"][0].size == (32, 32)
    assert len(result.previews) == 6


@pytest.mark.parametrize(
    ("text", "found"),
    [("tabby cat", 0), ("golden", 2), ("TENCH", 6), ("4", 4), ("crane (4)", 4), ("welsh", 5)],
)
def test_labels_are_found(comfy: Comfy, pixels: Path, text: str, found: int) -> None:
    prompt = graph([text, "tench"], repeat=2)
    prompt["names"] = node("PreviewAny", source=["labels", 3])
    assert comfy.run(prompt).outputs["names"]["text"] == [f"{NAMES[found]}\ntench"]
    assert torch.equal(latent_of(comfy, prompt), latent_of(comfy, graph([found, found, 6, 6])))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cat", "'cat' fits 2 classes: 0 tabby, tabby cat; 1 tiger cat"),
        (
            "crane",
            r"'crane' fits 2 classes: 3 crane \(3\); 4 crane \(4\). Give a whole name or a number",
        ),
        ("golden retreiver", "no class 'golden retreiver'; near it: 2 golden retriever"),
        ("7", "no class 7; .* from 0 to 6"),
        ("zebra", "no class 'zebra'.* 0 tabby"),
    ],
)
def test_labels_that_fit_no_class_are_named(
    comfy: Comfy, pixels: Path, text: str, complaint: str
) -> None:
    with pytest.raises(PromptError, match=complaint):
        comfy.run(graph([2, text]))


def test_label_list_holds_the_installed_names(comfy: Comfy, pixels: Path, folder: Path) -> None:
    schema = comfy.object_info()["GMFlowClassLabels"]["input"]["required"]["label"]
    options = schema[1].get("options") or schema[0]
    assert {"golden retriever", "class name 3"} <= set(options)
    assert len(options) == len(set(options))


def test_conditionings_that_do_not_fit_are_refused(comfy: Comfy, pixels: Path) -> None:
    """They are refused before sampling starts, by the model, with every sampler."""
    for prompt in (graph(), ksampler(graph(), cfg=0.3)):
        inputs = prompt["sample"]["inputs"]
        prompt["big"] = node("EmptyLatentImage", width=128, height=128, batch_size=2)
        prompt["one"] = node("LatentFromBatch", samples=["labels", 2], batch_index=0, length=1)
        for latent, complaint in (
            ("big", "latents of 16 x 16 do not fit.*up to 8"),
            ("one", "2 labels do not fit a batch of 1"),
        ):
            inputs["latent_image"] = [latent, 0]
            with pytest.raises(PromptError, match=f"{complaint}.*'GM Class Labels'"):
                comfy.run(prompt)
    prompt = graph()
    del prompt["sample"]["inputs"]["positive"]
    with pytest.raises(
        PromptError, match=r"no class labels in the positive conditioning.*'GM Class Labels'"
    ):
        comfy.run(prompt)
    prompt = graph()
    prompt["model"]["inputs"]["model_name"] = "checkerboard_k64.safetensors"
    with pytest.raises(PromptError, match="takes no class labels"):
        comfy.run(prompt)


def test_unconditional_is_the_null_class(comfy: Comfy, pixels: Path) -> None:
    prompt = graph()
    prompt["none"] = node("GMFlowUnconditional")
    prompt["sample"]["inputs"]["positive"] = ["none", 0]
    assert close(latent_of(comfy, prompt), outside(pixels, [len(NAMES)] * 2))


def test_published_folder(comfy: Comfy, folder: Path) -> None:
    """It is one entry in the list, in its VAE's latents; its path and hub name give the same."""
    entry = comfy.object_info()["GMFlowLoader"]["input"]["required"]["model_name"]
    options = entry[1].get("options") or entry[0]
    assert [name for name in options if "published" in name] == [str(Path("group") / "published")]
    prompt = graph(
        ["class name 2", 5], model=str(Path("group") / "published"), guidance=0.4, solver="gm-sde"
    )
    prompt["model"]["inputs"]["weight_dtype"] = "bf16"
    expected = outside(folder, [2, 5], "gm-sde", Guidance(0.4), dtype=None) / SCALING  # as stored
    assert (latent_of(comfy, prompt) - expected).norm() < 0.02 * expected.norm()
    del prompt["model"]["inputs"]["weight_dtype"]  # fp32, as the model is small
    expected = outside(folder, [2, 5], "gm-sde", Guidance(0.4)) / SCALING
    assert close(latent_of(comfy, prompt), expected, atol=1e-3)
    for name in ("someone/published", str(folder)):
        prompt["model"]["inputs"] |= {"model_name": "gone", "hub_id_or_path": name}
        assert close(latent_of(comfy, prompt), expected, atol=1e-3)


def test_missing_models_are_named(comfy: Comfy, folder: Path) -> None:
    prompt = graph()
    prompt["model"]["inputs"]["model_name"] = "gone"
    with pytest.raises(
        PromptError, match=r"model_name: there is no model 'gone'.*choose one of checkerboard_k64"
    ):
        comfy.run(prompt)
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "model_index.json").write_text("{}")
    comfy.object_info()
    prompt["model"]["inputs"]["model_name"] = str(Path("group") / "broken")
    with pytest.raises(PromptError, match=r"broken is a folder without transformer/config\.json"):
        comfy.run(prompt)
