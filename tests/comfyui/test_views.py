"""What nodes show: previews, the mixture inspector, samplers side by side, the spread of seeds."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gmflow_core import load_checkpoint
from gmflow_core.demo_command import POINTS_MODEL
from gmflow_core.pictures import image_grid, layout_of, mean_pairwise_distance
from gmflow_core.toys.density_picture import density_picture

from .adapter_prompts import FILES, graph, serve
from .client import Comfy
from .graphs import latent_of, node
from .vaes import write_vae

DIGITS = POINTS_MODEL.parent / "digits_k8.safetensors"
STOCK = {"seed": 3, "steps": 4, "cfg": 1.0, "scheduler": "simple", "denoise": 1.0}


def digits(kind: str, label: str = "3", more: str = "", **settings) -> dict:
    """Return a prompt with a node of this kind, "sample", on the digits."""
    wires = {"model": ["model", 0], "latent_image": ["labels", 2], "positive": ["labels", 0]}
    return {
        "model": node("GMFlowLoader", model_name=DIGITS.name),
        "labels": node(
            "GMFlowClassLabels", model=["model", 0], label=label, more_labels=more, repeat=1
        ),
        "sample": node(kind, **wires, **settings),
    }


def board(kind: str, side: int = 64, **settings) -> dict:
    """Return a prompt with a node of this kind, "sample", on side * side points."""
    size = {"width": 8 * side, "height": 8 * side, "batch_size": 1}
    wires = {"model": ["model", 0], "latent_image": ["empty", 0]}
    return {
        "model": node("GMFlowLoader", model_name=POINTS_MODEL.name),
        "empty": node("EmptyLatentImage", **size),
        "none": node("GMFlowUnconditional"),
        "sample": node(kind, **wires, **settings),
    }


def inspector(**settings) -> dict:
    usual = {"seed": 3, "steps": 4, "step": 2, "item": 0, "place": "x, y", "x": 2.0, "y": 5.0}
    return {**usual, **settings}


def comparison(**settings) -> dict:
    return {"seed": 3, "samplers": "euler\ngm-ode", "steps": "1, 2", "size": 64, **settings}


def spread(**settings) -> dict:
    usual = {"seed": 3, "seeds": 3, "steps": 2, "solver": "auto", "size": 64}
    return {**usual, **settings}


def array(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).float() / 255


def saved(prompt: dict) -> dict:
    return {
        **prompt,
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


def stock(prompt: dict, positive: list) -> dict:
    """Return the prompt with KSampler's Euler, whose last prediction is its result."""
    inputs = {**STOCK, "sampler_name": "euler", "positive": positive, "negative": positive}
    wires = {key: prompt["sample"]["inputs"][key] for key in ("model", "latent_image")}
    return {**prompt, "sample": node("KSampler", **wires, **inputs)}


def last_preview(comfy: Comfy, prompt: dict, steps: int) -> Tensor:
    """Run a prompt, and return its last preview, of one after each step."""
    previews = comfy.run(prompt).previews
    assert len(previews) == steps
    return array(Image.open(io.BytesIO(previews[-1])))


def test_previews_of_points_are_their_density(comfy: Comfy) -> None:
    prompt = saved(stock(board("KSampler"), ["none", 0]))
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    shown = last_preview(comfy, prompt, 4)
    points = latent_of(comfy, prompt).movedim(1, -1).reshape(-1, 2)
    expected = density_picture(points, 512, bins=32)
    assert (shown - expected).abs().mean() < 0.002  # a point at the edge of a cell


def test_previews_of_pixels_are_all_images_as_squares(comfy: Comfy) -> None:
    prompt = saved(stock(digits("KSampler", more="5\n7"), ["labels", 0]))
    shown = last_preview(comfy, prompt, 4)
    images = ((latent_of(comfy, prompt) + 1) / 2).clamp(0, 1)
    expected = image_grid(images, columns=2, scale=31, gap=2)
    assert torch.allclose(shown, expected, atol=1 / 255)


def test_gm_samplers_send_the_same_kind_of_preview(comfy: Comfy) -> None:
    settings = {"seed": 4, "steps": 3, "solver": "gm-ode", "order": 2, "substeps": 2}
    sampler = {**settings, "shift": 1.0, "denoise": 1.0}
    shown = last_preview(comfy, saved(digits("GMFlowSampler", **sampler)), 3)
    assert shown.shape == (512, 512, 3)
    squares = shown.reshape(8, 64, 8, 64, 3).movedim(2, 1).flatten(2, 3)
    assert (squares == squares[:, :, :1]).all()


def test_the_inspector_shows_what_the_network_predicts(comfy: Comfy) -> None:
    """At the first step the network sees ComfyUI's noise for the seed, and is called once."""
    result = comfy.run(digits("GMFlowInspector", **inspector(step=1)))
    assert [(p.value, p.max) for p in result.progress if p.node == "sample"] == [(1, 1)]
    (text,) = result.outputs["sample"]["text"]
    network, _ = load_checkpoint(DIGITS)
    noise = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(3))
    with torch.no_grad():
        mixture = network(noise, torch.ones(1), torch.tensor([3]))
    for name, values in (
        ("entropy of the weights (nats)", mixture.weight_entropy()),
        ("effective components", mixture.effective_components()),
        ("spread (standard deviation of the mixture)", mixture.spread()),
    ):
        found = re.search(rf"{re.escape(name)}: mean ([0-9.]+), from ([0-9.]+) to ([0-9.]+)", text)
        expected = (values.mean(), values.min(), values.max())
        assert [float(f) for f in found.groups()] == pytest.approx(
            [*map(float, expected)], abs=2e-3
        )
    weight = float(mixture.weights[0, :, 0, 5, 2].max())
    assert f"weight {weight:.3f}" in text
    assert "pixel x 2, y 5" in text
    (maps,) = result.outputs["sample"]["gmflow_maps"]
    assert maps["area"] == [0, 8, 0, 8]
    assert len(maps["boxes"]) == 4
    (picture,) = result.images["sample"]
    left, top, width, height = maps["boxes"][1]
    entropy = array(picture)[top : top + height, left : left + width]
    middles = entropy[20::40, 20::40].sum(-1).flatten()  # brighter where the entropy is higher
    order = mixture.weight_entropy()[0, 0].flatten()
    assert torch.corrcoef(torch.stack([middles, order]))[0, 1] > 0.9


def test_the_inspector_looks_at_the_chosen_item_where_it_is_least_certain(comfy: Comfy) -> None:
    settings = inspector(step=1, item=1, place="most uncertain")
    result = comfy.run(digits("GMFlowInspector", more="7", **settings))
    (text,) = result.outputs["sample"]["text"]
    network, _ = load_checkpoint(DIGITS)
    noise = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(3))
    with torch.no_grad():
        entropy = network(noise, torch.ones(2), torch.tensor([3, 7])).weight_entropy()[1]
    y, x = divmod(int(entropy.argmax()), 8)
    found = re.search(rf"pixel x {x}, y {y}: entropy ([0-9.]+) nats", text)
    assert float(found[1]) == pytest.approx(float(entropy.max()), abs=2e-3)
    assert "no effect: x and y, as place is most uncertain" in result.texts["sample"]


def test_another_pixel_needs_no_sampling(comfy: Comfy) -> None:
    first = comfy.run(digits("GMFlowInspector", **inspector(seed=5)))
    second = comfy.run(digits("GMFlowInspector", **inspector(seed=5, x=6.0)))
    other = comfy.run(digits("GMFlowInspector", **inspector(seed=6, x=6.0)))
    assert [any(p.node == "sample" for p in r.progress) for r in (first, second, other)] == [
        *(True, False, True)
    ]
    texts = [r.outputs["sample"]["text"][0] for r in (first, second, other)]
    assert "pixel x 6, y 5" in texts[1]
    assert texts[1].startswith("step 2 of 4 (gm-ode), sigma 0.7500\n")
    assert texts[0].splitlines()[:5] == texts[1].splitlines()[:5] != texts[2].splitlines()[:5]


def test_the_inspector_takes_the_point_that_is_nearest(comfy: Comfy) -> None:
    prompt = board("GMFlowInspector", side=32, **inspector(x=1.0, y=-1.0))
    output = comfy.run(prompt).outputs["sample"]
    (text,), (maps,) = output["text"], output["gmflow_maps"]
    assert (len(maps["boxes"]), maps["area"]) == (3, [-4.4, 4.4, 4.4, -4.4])
    x, y = map(float, re.search(r"point \((\S+), (\S+)\)", text).groups())
    assert abs(x - 1) < 0.3
    assert abs(y + 1) < 0.3
    assert "64 components" in text


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("GMFlowInspector", inspector(step=5), "there is no step 5 in 4 steps"),
        ("GMFlowInspector", inspector(item=1), "there is no item 1"),
        ("GMFlowInspector", inspector(x=8.0), "no pixel at x 8, y 5 in 8 x 8"),
        ("GMFlowCompare", comparison(samplers="gm-ode\nnone"), "no sampler 'none'"),
        ("GMFlowCompare", comparison(samplers=" "), "0 samplers"),
        ("GMFlowCompare", comparison(steps="4, x"), "'x' in steps is no number"),
        ("GMFlowCompare", comparison(steps="9000"), "the most is 10,000"),
    ],
)
def test_wrong_settings_are_named(comfy: Comfy, kind: str, settings: dict, message: str) -> None:
    assert message in comfy.run(digits(kind, **settings), expect_error=True).errors["sample"]


def test_a_comparison_shows_what_gm_sampler_makes(comfy: Comfy) -> None:
    """Its cells are the pictures of GM Sampler, with rows in order and steps across.

    Heun's single step is Euler's.
    """
    wanted = comparison(samplers="gm-ode, heun", steps="1 3", size=64)
    result = comfy.run(digits("GMFlowCompare", **wanted))
    sheet, (table,) = array(result.images["sample"][0]), result.outputs["sample"]["text"]
    found = re.findall(r"\| (\S+) \| (\d+) \| (\d+) \| [0-9.e-]+ \|", table)
    assert found == [
        *(("gm-ode", "1", "1"), ("gm-ode", "3", "3")),
        *(("heun", "1", "1"), ("heun", "3", "5")),
    ]
    tile = torch.zeros(64, 64, 3)
    layout = layout_of([("row", [("", tile)] * 2)] * 2, False, "title", 64)
    for row, column, solver, steps in (
        (0, 0, "gm-ode", 1),
        (0, 1, "gm-ode", 3),
        (1, 0, "euler", 1),
    ):
        settings = {"seed": 3, "steps": steps, "solver": solver, "order": 2, "substeps": 0}
        sampler = {**settings, "shift": 0.0, "denoise": 1.0}
        prompt = digits("GMFlowSampler", **sampler)
        prompt["pixels"] = node("GMFlowPixels", samples=["sample", 0], scale=8, columns=0)
        prompt["show"] = node("PreviewImage", images=["pixels", 0])
        x, y = layout.place(row, column)
        cell = sheet[y : y + 64, x : x + 64]
        assert torch.allclose(cell, array(comfy.run(prompt).image), atol=2 / 255)
    left, tops = layout.place(0, 0)[0], [layout.place(row, 0)[1] for row in (0, 1)]
    names = [sheet[top : top + 64, :left] for top in tops]
    assert not torch.equal(*names)
    assert all((name < 0.5).any() for name in names)


def test_any_sampler_can_be_compared(comfy: Comfy) -> None:
    prompt = board("GMFlowCompare", side=16, **comparison(steps="2", sampler_2=["sampler", 0]))
    prompt["sampler"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    (table,) = comfy.run(prompt).outputs["sample"]["text"]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        *("| euler", "| gm-ode", "| sampler_2")
    ]


def test_a_place_without_effect_is_said(comfy: Comfy) -> None:
    result = comfy.run(digits("GMFlowInspector", **inspector(place="most uncertain")))
    assert "no effect: x and y, as place is most uncertain" in result.texts["sample"]


@pytest.mark.parametrize("more", ["", "8"], ids=["one item", "two items"])
def test_variety_is_the_mean_distance_of_the_pictures(comfy: Comfy, more: str) -> None:
    """Each item of a batch is compared with itself; the pictures come seed after seed."""
    prompt = digits("GMFlowSeedSpread", more=more, **spread())
    prompt["show"] = node("PreviewImage", images=["sample", 1])
    prompt["again"] = node(
        "GMFlowSeedSpread", **prompt["sample"]["inputs"], reference=["sample", 1]
    )
    result = comfy.run(prompt)
    pictures = torch.stack([array(image) for image in result.images["show"]])
    items = 2 if more else 1
    assert pictures.shape == (3 * items, 256, 256, 3)
    (text,) = result.outputs["sample"]["text"]
    found = float(re.match(r"variety ([0-9.]+)", text)[1])
    distances = [mean_pairwise_distance(pictures[item::items]) for item in range(items)]
    assert found == pytest.approx(sum(distances) / items, abs=2e-3)
    assert "100% of it" in result.outputs["again"]["text"][0]


def test_of_a_large_batch_some_items_are_drawn(comfy: Comfy) -> None:
    """The sheet has ten rows, and the figure is of all items."""
    more = "\n".join("123456789012345")
    prompt = digits("GMFlowSeedSpread", label="0", more=more, **spread(seeds=2))
    prompt["show"] = node("PreviewImage", images=["sample", 1])
    result = comfy.run(prompt)
    sheet = result.images["sample"][0]
    assert 10 * 64 < sheet.height < 16 * 64
    pictures = torch.stack([array(image) for image in result.images["show"]]).unflatten(0, (2, 16))
    variety = sum(map(mean_pairwise_distance, pictures.unbind(1))) / 16
    (text,) = result.outputs["sample"]["text"]
    assert float(re.match(r"variety ([0-9.]+)", text)[1]) == pytest.approx(variety, abs=2e-3)


def test_seeds_of_points_are_refused(comfy: Comfy) -> None:
    result = comfy.run(board("GMFlowSeedSpread", **spread()), expect_error=True)
    assert "use GM Density" in result.errors["sample"]


@pytest.fixture(scope="module")
def adapted(comfy: Comfy) -> Iterator[Comfy]:
    """The server with tiny base models, adapters, and FLUX.1's VAE."""
    write_vae(comfy.base / "models" / "vae" / "ae_flux.safetensors", "flux")
    yield from serve(comfy)


@pytest.mark.parametrize("with_vae", [True, False])
def test_the_mixture_of_an_adapted_model_is_shown(adapted: Comfy, with_vae: bool) -> None:
    prompt = graph("flux", width=96, height=64)
    del prompt["save"], prompt["negative"]
    wires = {"model": ["model", 0], "latent_image": ["latent", 0], "positive": ["positive", 0]}
    prompt["sample"] = node("GMFlowInspector", **wires, **inspector(steps=0, step=3, x=11.0, y=7.0))
    prompt["show"] = node("PreviewImage", images=["sample", 1])
    if with_vae:
        prompt["vae"] = node("VAELoader", vae_name="ae_flux.safetensors")
        prompt["sample"]["inputs"]["vae"] = ["vae", 0]
    result = adapted.run(prompt)
    (text,), pictures = result.outputs["sample"]["text"], result.images["show"]
    assert text.startswith("step 3 of 4 (gm-policy)")
    assert "pixel x 11, y 7" in text
    assert text.count("component ") == 8
    assert [picture.size for picture in pictures] == [(192, 128) if with_vae else (252, 168)] * 8
    assert not np.array_equal(*map(np.asarray, pictures[:2]))
    assert result.outputs["sample"]["gmflow_maps"][0]["area"] == [0, 12, 0, 8]
    prompt["model"]["inputs"]["adapter_name"] = "dxflux_n10_piid_4step.safetensors"
    refused = adapted.run(prompt, expect_error=True).errors["sample"]
    assert "DX policy, which is no single mixture" in refused


def test_a_saved_model_tells_where_it_is(adapted: Comfy) -> None:
    prefix = "diffusion_models/seen"
    prompt = {
        "base": node("GMFlowLoadDiffusionModel8bit", unet_name=FILES["flux"]),
        "save": node("GMFlowSaveDiffusionModel8bit", model=["base", 0], filename_prefix=prefix),
    }
    result = adapted.run(prompt)
    (where,) = result.outputs["save"]["text"]
    assert where == "output/diffusion_models/seen_00001_.safetensors"
    assert (adapted.base / where).is_file()
    assert f"saved: {where}" in result.texts["save"]


def test_what_the_seeds_do_not_use_is_said(adapted: Comfy) -> None:
    prompt = digits(
        "GMFlowSeedSpread",
        **spread(seeds=2, solver="gm-sde", sampler=["euler", 0], vae=["vae", 0]),
    )
    prompt["euler"] = node("KSamplerSelect", sampler_name="euler")
    prompt["vae"] = node("VAELoader", vae_name="ae_flux.safetensors")
    said = adapted.run(prompt).texts["sample"]
    assert "no effect: solver gm-sde, as a sampler is connected" in said
    assert "no effect: vae, as this model samples no latents" in said
