"""Results and error messages of the extension's nodes in a running ComfyUI."""

from __future__ import annotations

import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gmflow_core import load_checkpoint, save_checkpoint
from gmflow_core.demo_command import POINTS_MODEL
from gmflow_core.toys.checkerboard import (
    board_density,
    draw_checkerboard,
    on_board,
    total_variation,
)
from gmflow_core.toys.density_picture import density_picture

from .client import Comfy, PromptError
from .graphs import NOT_FITTING, latent_of
from .installation import GGUF_HOW_TO, has_gradients
from .stand_in_files import WORKFLOWS, workflow_named, workflow_prompt, write_workflow_files

QUICKSTART = workflow_named("GM Sampler beside KSampler")
API = [path for path in sorted((WORKFLOWS / "api").glob("*.json")) if path.stem != QUICKSTART]
PIXELS = 8  # image pixels a side to one latent pixel
SMALLER = {  # settings that differ from the workflows'
    "EmptyLatentImage": {"width": 256, "height": 256},
    "EmptySD3LatentImage": {"width": 256, "height": 256},
    "GMFlowClassLabels": {"repeat": 1},
    "GMFlowSeedSpread": {"seeds": 2},
    "GMFlowTrainAdapter": {"iterations": 1, "preview_every": 1, "rank": 4},
}


def graph(side: int = 64, batch: int = 1, **sampler) -> dict:
    """Return GM Load Model -> GM Sampler on batch * side * side points -> a saved latent."""
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
    size = {"width": side * PIXELS, "height": side * PIXELS, "batch_size": batch}
    return {
        "model": {"class_type": "GMFlowLoader", "inputs": {"model_name": POINTS_MODEL.name}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": size},
        "sample": {
            "class_type": "GMFlowSampler",
            "inputs": {"model": ["model", 0], "latent_image": ["empty", 0], **settings},
        },
        "save": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["sample", 0], "filename_prefix": "latents/test"},
        },
    }


def custom(
    prompt: dict,
    sampler: dict,
    steps: int = 4,
    denoise: float = 1.0,
    cfg: float = 1.0,
    shift: float = 1.0,
) -> dict:
    """Return the prompt with SamplerCustomAdvanced, a CFG Guider and the node `sampler`."""
    nodes = {
        "none": ("GMFlowUnconditional", {}),
        "guider": (
            "CFGGuider",
            {"model": ["model", 0], "positive": ["none", 0], "negative": ["none", 0], "cfg": cfg},
        ),
        "noise": ("RandomNoise", {"noise_seed": 0}),
        "sigmas": ("GMFlowSigmas", {"steps": steps, "shift": shift, "denoise": denoise}),
    }
    wires = {
        "noise": ["noise", 0],
        "guider": ["guider", 0],
        "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
    }
    latent = prompt["sample"]["inputs"]["latent_image"]
    made = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    run = {"class_type": "SamplerCustomAdvanced", "inputs": {**wires, "latent_image": latent}}
    return {**prompt, **made, "sampler": sampler, "sample": run}


def points_of(latent: Tensor) -> Tensor:
    return latent.movedim(1, -1).reshape(-1, 2)


def share_near_board(latent: Tensor) -> float:
    return on_board(points_of(latent), slack=0.1).float().mean().item()


def levels_of(picture: np.ndarray) -> Tensor:
    """Return the densities (H, W) of a picture (H, W, 3), relative to the brightest colour's."""
    count = 256
    x = torch.arange(count).repeat_interleave(torch.arange(count) + 1)  # i + 1 points in cell i
    y = torch.zeros(len(x))
    points = torch.stack([x / count * 2 - 1 + 1 / count, y], -1)
    scale = density_picture(points, count, count, 1.0, peak=count / len(points) / (2 / count) ** 2)[
        count // 2 - 1
    ]
    flat = torch.from_numpy(picture).float().reshape(-1, 3)
    return (torch.cdist(flat, scale).argmin(1).reshape(picture.shape[:2]) + 1) / count


def test_extension_loads(comfy: Comfy) -> None:
    assert not re.search("IMPORT FAILED.*custom_nodes", comfy.log())
    nodes = {
        name: node
        for name, node in comfy.object_info().items()
        if node["category"].startswith("GMFlow")
    }
    assert len(nodes) == 27
    for name, node in nodes.items():
        assert node["description"], name
        for group in ("required", "optional"):
            for key, (_, *options) in node["input"].get(group, {}).items():
                assert options[0]["tooltip"], f"{name}.{key}"
    assert POINTS_MODEL.name in nodes["GMFlowLoader"]["input"]["required"]["model_name"][-1].get(
        "options", []
    ) or (POINTS_MODEL.name in nodes["GMFlowLoader"]["input"]["required"]["model_name"][0])


def test_quickstart_prompt_draws_the_checkerboard(comfy: Comfy) -> None:
    """Measure the picture itself, by the densities in its colours."""
    prompt, before = workflow_prompt(QUICKSTART), len(comfy.log())
    for node in ("4", "8"):
        prompt[node]["inputs"] |= {"size": 64, "bins": 64, "extent": 4.0}
    result, distance = comfy.run(prompt), {}
    for node, name in (("5", "gm"), ("9", "stock")):
        levels = levels_of(np.asarray(result.images[node][0].convert("RGB")) / 255).flip(0).double()
        distance[name] = 0.5 * (levels / levels.sum() - board_density()).abs().sum().item()
    exact = draw_checkerboard(36_864, torch.Generator().manual_seed(0))
    assert distance["gm"] < total_variation(exact) + 0.04  # the floor of as many exact samples
    assert distance["stock"] > distance["gm"] + 0.15
    assert any(node == "3" and (value, most) == (4, 4) for node, value, most in result.progress)
    assert result.previews
    assert not NOT_FITTING.search(comfy.log()[before:])


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)  # all but the one above
def test_workflows_run_headless(comfy: Comfy, path: Path) -> None:
    prompt, before = write_workflow_files(comfy.base, path.stem), len(comfy.log())
    nodes = comfy.object_info()  # as the page does after a refresh: the files are in the lists now
    if "UnetLoaderGGUF" in {about["class_type"] for about in prompt.values()} - nodes.keys():
        pytest.skip(f"no ComfyUI-GGUF: {GGUF_HOW_TO}")
    for about in prompt.values():
        about["inputs"] |= SMALLER.get(about["class_type"], {})
        if about["class_type"] == "GMFlowTrainAdapter" and not has_gradients():
            pytest.skip("this ComfyUI has no gradients, and the node says so")
        if about["class_type"] in ("ImageScale", "SolidMask", "MaskComposite"):
            sizes = {"width", "height", "x", "y"} & set(about["inputs"])
            about["inputs"] |= {name: about["inputs"][name] // 4 for name in sizes}
    shown = {
        node
        for node, about in prompt.items()
        if about["class_type"] in ("SaveImage", "PreviewImage")
    }
    images = comfy.run(prompt).images
    assert shown <= set(images)
    pictures = [picture for node in shown for picture in images[node]]
    assert len(pictures) == (4 if "ImageNet" in path.stem else len(shown))
    assert all(np.asarray(picture).std() > 1 for picture in pictures)
    assert not any(str(comfy.base) in str(picture.info) for picture in pictures)  # of nobody's disk
    assert not NOT_FITTING.search(comfy.log()[before:])


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde"])
def test_seed_decides(comfy: Comfy, solver: str) -> None:
    """A seed gives the same latent again, after the server has forgotten the first one."""
    first = latent_of(comfy, graph(16, solver=solver, seed=5))
    assert not torch.equal(first, latent_of(comfy, graph(16, solver=solver, seed=6)))
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    assert "sample" in comfy.run(graph(16, solver=solver, seed=5)).executed
    assert torch.equal(first, latent_of(comfy, graph(16, solver=solver, seed=5)))


def test_custom_sampling_equals_the_all_in_one_node(comfy: Comfy) -> None:
    ode = {"class_type": "GMFlowODESampler", "inputs": {"order": 2, "substeps": 4}}
    sde = {"class_type": "GMFlowSDESampler", "inputs": {"order": 2}}
    for solver, sampler in (("gm-ode", ode), ("gm-sde", sde)):
        one = latent_of(comfy, graph(16, solver=solver))
        for cfg in (1.0, 3.0):
            assert torch.allclose(
                one, latent_of(comfy, custom(graph(16), sampler, cfg=cfg)), atol=1e-5
            )


def test_substeps_follow_the_shift_of_the_sigmas_in_time(comfy: Comfy) -> None:
    """GM Sampler's way, which GM ODE Sampler goes with the shift of its GM Sigmas, or in sigma."""
    one = latent_of(comfy, graph(16, shift=3.0))
    ode = {"order": 2, "substeps": 4, "shift": 3.0}
    for spacing, equal in (("time", True), ("sigma", False)):
        sampler = {"class_type": "GMFlowODESampler", "inputs": {**ode, "spacing": spacing}}
        other = latent_of(comfy, custom(graph(16), sampler, shift=3.0))
        assert torch.allclose(one, other, atol=1e-5) == equal


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "uni_pc", "euler_ancestral"])
def test_stock_samplers_run_on_it(comfy: Comfy, name: str) -> None:
    prompt = custom(
        graph(32), {"class_type": "KSamplerSelect", "inputs": {"sampler_name": name}}, steps=24
    )
    assert share_near_board(latent_of(comfy, prompt)) > 0.9


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "uni_pc"])
def test_solvers_of_the_mean_are_the_stock_samplers(comfy: Comfy, name: str) -> None:
    stock = custom(graph(16), {"class_type": "KSamplerSelect", "inputs": {"sampler_name": name}})
    ours = graph(16, solver=name.replace("_", "-"))
    end = 1e-2 if name == "uni_pc" else 1e-4  # that one stops at sigma = .001
    assert torch.allclose(latent_of(comfy, stock), latent_of(comfy, ours), atol=end)


def test_batches_are_different_points(comfy: Comfy) -> None:
    latent = latent_of(comfy, graph(24, batch=3))
    assert latent.shape == (3, 2, 24, 24)
    assert not torch.allclose(latent[0], latent[1])
    assert share_near_board(latent) > 0.9


def again(first: dict, prompt: dict, **sampler) -> dict:
    """`prompt` with a second GM Sampler that works on the samples of the first."""
    second = {
        "class_type": "GMFlowSampler",
        "inputs": {**prompt["sample"]["inputs"], "latent_image": first, **sampler},
    }
    save = {**prompt["save"], "inputs": {**prompt["save"]["inputs"], "samples": ["second", 0]}}
    return {**prompt, "second": second, "save": save}


def test_image_to_image_stays_near(comfy: Comfy) -> None:
    base = latent_of(comfy, graph(32))
    near = latent_of(comfy, again(["sample", 0], graph(32), denoise=0.1, seed=9))
    far = latent_of(comfy, again(["sample", 0], graph(32), denoise=0.9, seed=9))
    moved = [(points_of(x) - points_of(base)).norm(dim=1).mean().item() for x in (near, far)]
    assert 0 < moved[0] < 0.4 < 1.5 < moved[1]
    assert share_near_board(near) > 0.9
    assert torch.equal(latent_of(comfy, again(["sample", 0], graph(32), denoise=0.0)), base)


def test_stock_ksampler_does_image_to_image(comfy: Comfy) -> None:
    base = latent_of(comfy, graph(32))
    prompt = again(["sample", 0], graph(32))
    settings = {
        "seed": 9,
        "steps": 6,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 0.1,
    }
    wires = {
        "model": ["model", 0],
        "positive": ["none", 0],
        "negative": ["none", 0],
        "latent_image": ["sample", 0],
    }
    prompt["none"] = {"class_type": "GMFlowUnconditional", "inputs": {}}
    prompt["second"] = {"class_type": "KSampler", "inputs": {**settings, **wires}}
    moved = (points_of(latent_of(comfy, prompt)) - points_of(base)).norm(dim=1).mean()
    assert 0 < moved < 0.4


def test_time_shift_nodes_work(comfy: Comfy) -> None:
    """ModelSamplingSD3 counts time in thousandths; shift 1 must change nothing."""
    plain = latent_of(comfy, graph(16))
    prompt = graph(16)
    prompt["shift"] = {
        "class_type": "ModelSamplingSD3",
        "inputs": {"model": ["model", 0], "shift": 1.0},
    }
    prompt["sample"]["inputs"]["model"] = ["shift", 0]
    assert torch.allclose(latent_of(comfy, prompt), plain, atol=1e-3)


def test_largest_seed(comfy: Comfy) -> None:
    assert latent_of(comfy, graph(16, solver="gm-sde", seed=2**64 - 1)).isfinite().all()


SAMPLERS = {
    "gm-ode": ("GMFlowODESampler", {"order": 2, "substeps": 4}),
    "gm-sde": ("GMFlowSDESampler", {"order": 2}),
    "gm-policy": (
        "GMFlowPolicySampler",
        {"substeps": 64, "temperature": 1.0, "stochasticity": 0.5},
    ),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_conditionings_that_agree_are_as_one(comfy: Comfy, sampler: str) -> None:
    """Twice the same, masks that share the latent, and a range of all steps change nothing."""
    kind, inputs = SAMPLERS[sampler]
    prompt = custom(graph(16), {"class_type": kind, "inputs": inputs})
    alone = latent_of(comfy, prompt)
    for name, value in (("mask", 0.3), ("rest", 0.7)):
        prompt[name] = {
            "class_type": "SolidMask",
            "inputs": {"value": value, "width": 64, "height": 128},
        }
    masked = {"strength": 1.0, "set_cond_area": "default", "conditioning": ["none", 0]}
    for name in ("mask", "rest"):
        prompt[f"{name}ed"] = {
            "class_type": "ConditioningSetMask",
            "inputs": {**masked, "mask": [name, 0]},
        }
    prompt["timed"] = {
        "class_type": "ConditioningSetTimestepRange",
        "inputs": {"conditioning": ["rested", 0], "start": 0.0, "end": 1.0},
    }
    both = {"conditioning_1": ["masked", 0], "conditioning_2": ["timed", 0]}
    prompt["both"] = {"class_type": "ConditioningCombine", "inputs": both}
    prompt["guider"]["inputs"]["positive"] = ["both", 0]
    result = comfy.run(prompt)
    assert "no mixture" not in " ".join(result.texts.values())
    assert torch.allclose(latent_of(comfy, prompt), alone, atol=1e-3)


def test_areas_of_points_fall_back_to_the_mean(comfy: Comfy) -> None:
    prompt = custom(
        graph(16), {"class_type": "GMFlowODESampler", "inputs": {"order": 2, "substeps": 4}}
    )
    area = {"conditioning": ["none", 0], "width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
    prompt["part"] = {"class_type": "ConditioningSetArea", "inputs": area}
    prompt["guider"]["inputs"]["positive"] = ["part", 0]
    assert "its mean is followed" in comfy.run(prompt).texts["sample"]


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde"])
def test_noise_mask_is_honoured(comfy: Comfy, solver: str) -> None:
    """Outside of the mask nothing changes; inside all points move, and land on the board."""
    side = 32 * PIXELS
    keep = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": side, "height": side}}
    change = {
        "class_type": "SolidMask",
        "inputs": {"value": 1.0, "width": side // 2, "height": side},
    }
    both = {"destination": ["keep", 0], "source": ["change", 0], "x": 0, "y": 0, "operation": "add"}
    masked = {
        "class_type": "SetLatentNoiseMask",
        "inputs": {"samples": ["sample", 0], "mask": ["mask", 0]},
    }
    nodes = {
        "keep": keep,
        "change": change,
        "mask": {"class_type": "MaskComposite", "inputs": both},
        "masked": masked,
    }
    base = latent_of(comfy, graph(32))
    out = latent_of(comfy, {**again(["masked", 0], graph(32), seed=3, solver=solver), **nodes})
    assert torch.allclose(out[..., 16:], base[..., 16:], atol=1e-5)
    assert (out[..., :16] - base[..., :16]).abs().mean() > 0.5
    assert share_near_board(out[..., :16]) > 0.9


def test_interrupt_leaves_the_server_usable(comfy: Comfy) -> None:
    prompt_id = comfy.submit(graph(128, steps=300, substeps=64))
    comfy.wait_progress(prompt_id)
    comfy.interrupt()
    assert comfy.wait(prompt_id, timeout=60).status == "interrupted"
    assert latent_of(comfy, graph(16)).isfinite().all()


def test_density_view(comfy: Comfy) -> None:
    prompt = graph(24, batch=2)
    look = {"samples": ["sample", 0], "size": 200, "bins": 50, "extent": 4.4, "outline": True}
    for name, merge in (("one", True), ("each", False)):
        prompt[name] = {"class_type": "GMFlowDensity", "inputs": {**look, "merge_batch": merge}}
        prompt["show " + name] = {"class_type": "PreviewImage", "inputs": {"images": [name, 0]}}
    images = comfy.run(prompt).images
    assert [len(images["show " + name]) for name in ("one", "each")] == [1, 2]
    assert images["show one"][0].size == (200, 200)
    prompt["one"]["inputs"]["samples"] = ["empty", 0]  # four channels
    with pytest.raises(PromptError, match="not of points: it has 4 channels"):
        comfy.run(prompt)


BAD = {
    "truncated": "not a whole safetensors file",
    "empty": "not a whole safetensors file",
    "foreign": "not a GMFlow checkpoint",
    "pickle": "pickle",
    "edited": "tensors do not fit its config",
}


@pytest.mark.parametrize(("kind", "complaint"), BAD.items())
def test_bad_checkpoints_are_named(comfy: Comfy, kind: str, complaint: str) -> None:
    folder = comfy.base / "models" / "gmflow"
    path = folder / f"{kind}{'.pt' if kind == 'pickle' else '.safetensors'}"
    if kind == "truncated":
        path.write_bytes(POINTS_MODEL.read_bytes()[:100_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "pickle":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02.")
    else:
        network, _ = load_checkpoint(POINTS_MODEL)
        network.out_means = torch.nn.Linear(3, 5)
        save_checkpoint(network, path)
    comfy.object_info()  # as the page does after a refresh: the file is in the list now
    prompt = graph(16)
    prompt["model"]["inputs"]["model_name"] = path.name
    with pytest.raises(PromptError, match=complaint) as error:
        comfy.run(prompt)
    assert path.name in str(error.value)
    assert latent_of(comfy, graph(16)).isfinite().all()


def test_extra_model_paths_are_searched(comfy: Comfy) -> None:
    network, _ = load_checkpoint(POINTS_MODEL)
    save_checkpoint(network, comfy.base / "elsewhere" / "gm" / "extra.safetensors")
    comfy.object_info()
    prompt = graph(16)
    prompt["model"]["inputs"]["model_name"] = "extra.safetensors"
    assert latent_of(comfy, prompt).isfinite().all()


def test_trained_checkpoint_replaces_the_one_loaded(comfy: Comfy) -> None:
    """A file in models/gmflow that changes on disk is read again."""
    path = comfy.base / "models" / "gmflow" / "mine.safetensors"
    network, _ = load_checkpoint(POINTS_MODEL)
    save_checkpoint(network, path)
    comfy.object_info()
    prompt = graph(16)
    prompt["model"]["inputs"]["model_name"] = path.name
    first = latent_of(comfy, prompt)
    network.out_means.bias.add_(0.5)
    save_checkpoint(network, path)
    assert not torch.allclose(latent_of(comfy, prompt), first)
