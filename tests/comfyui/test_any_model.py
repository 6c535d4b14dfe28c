"""Models without an adapter, of every kind, in the real ComfyUI: in its process and by its server.

The models are tiny and random, in the layouts of FLUX.1, Qwen-Image, Stable Diffusion 3.5, Z-Image,
Wan 2.1 (video), and Stable Diffusion 1.5 (which predicts epsilon); ComfyUI's own loader reads them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .bases import Shapes
from .client import Comfy
from .graphs import NOT_FITTING, node
from .installation import COMFYUI
from .plain_bases import (
    KINDS,
    lumina_shapes,
    sd3_shapes,
    sd15_shapes,
    text_encoder,
    wan_shapes,
    write_plain_base,
    write_texts,
)
from .scripts import of, results_of

SCRIPT = Path(__file__).with_name("any_model_inside.py")
SAMPLERS = {"gm_ode": "gm-ode", "gm_sde": "gm-sde", "gm_policy": "gm-policy"}
STEPS = 2
DETECTION = COMFYUI / "comfy" / "model_detection.py"
# ComfyUI 0.3.64 knows Lumina 2, but not the layout of Z-Image
UNKNOWN = {"lumina"} if DETECTION.exists() and "z_image" not in DETECTION.read_text() else set()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, with a base of each kind."""
    folder = tmp_path_factory.mktemp("any_model")
    for kind in KINDS:
        write_plain_base(folder, kind)
    about = {kind: asdict(each) for kind, each in KINDS.items() if kind not in UNKNOWN}
    (folder / "kinds.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def found(models: Path) -> dict[str, Any]:
    """Results of all cases, from one process."""
    return results_of(SCRIPT, models, NOT_FITTING)  # each weight must have its layer


@pytest.fixture(scope="module")
def server(comfy: Comfy, models: Path) -> Comfy:
    """The server, with the same models."""
    for path in (models / "diffusion_models").iterdir():
        place = comfy.base / "models" / "diffusion_models" / f"any_{path.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    write_texts(comfy.base / "models")
    comfy.object_info()
    return comfy


@pytest.mark.parametrize(
    ("shapes", "parameters"),
    [
        (sd15_shapes((1, 2, 4, 4), blocks=2, flat=1), 859_520_964),
        (sd3_shapes(heads=24, self_attentions=13, positions=384), 2_469_663_936),
        (lumina_shapes(dim=3840, layers=30), 6_154_908_736),
        (wan_shapes(dim=1536, wide=8960, layers=30), 1_418_996_800),
    ],
    ids=["SD 1.5", "SD 3.5 medium", "Z-Image", "Wan 2.1 1.3B"],
)
def test_layout_has_the_size_of_the_real_model(shapes: Shapes, parameters: int) -> None:
    assert sum(map(math.prod, shapes.values())) == parameters


def test_stock_names_on_every_kind_give_the_latents_of_our_own_nodes(found: dict) -> None:
    names = of(found, "names")
    assert set(names) == set(KINDS) - UNKNOWN
    for kind, about in names.items():
        assert about.pop("custom"), kind
        assert about.pop("shape"), kind
        for name, each in about.items():
            assert each["same"], (kind, name)
            assert each["effect"] > 1e-3, (kind, name)


def test_every_kind_is_sampled_in_stages_in_parts_and_in_batches(found: dict) -> None:
    for kind, about in of(found, "as any sampler").items():
        assert about["two stages"] < 0.03, kind
        assert about["part"] < 0.9, kind
        assert about["outside the mask"] < 1e-6, kind
        assert about["inside the mask"] > 0.5, kind
        assert about["first of a batch"] < 1e-5, kind
        assert about["second of a batch"] < 1e-5, kind


def test_loras_controlnets_and_compiled_models_take_effect(found: dict) -> None:
    about = of(found, "patched")
    assert about["LoRA"] > 0.05
    assert about["ControlNet"] > 0.05
    assert about["compiled"] < 1e-5


def test_guidance_with_a_negative_on_any_flow_model(found: dict) -> None:
    """By each node, with any spread, on videos too; what would misread its weight is refused."""
    says = {name: f"{name} does not go with" for name in ("RescaleCFG", "APG", "CFGZeroStar")}
    says |= {"cfg 4": "is the weight w"}
    says |= {"PerpNegGuider": "another guider", "no negative": "no negative conditioning"}
    for kind, about in of(found, "guided").items():
        assert about["off"] < 1e-5, kind
        assert about["same by GM Guider"], kind
        assert about["same by CFGGuider"], kind
        assert about["dual"], kind
        assert about["wide"] > about["effect"] > 0.03, kind
        assert min(about["stock"], about["cfg"]) > 0.03, kind
        for name, error in about["refused"].items():
            assert says[name] in error, (kind, name, error)


def test_views_show_one_gaussian(found: dict) -> None:
    for kind, about in of(found, "views").items():
        assert "1 component of standard deviation" in about["inspector"], kind
        assert "| gm_sde | 2 | 2 |" in about["table"], kind
        assert about["variety"] > 0, kind


def test_any_scheduler_and_any_sampling(found: dict) -> None:
    """On each path GM-ODE ends near Euler, if both take many steps."""
    about = of(found, "neighbours")
    assert len(about["schedulers"]) > 8
    assert all(about["schedulers"].values()), about["schedulers"]
    assert len(about["samplings"]) > 6
    for name, (far, finite) in about["samplings"].items():
        assert finite, name
        assert far < 0.25, name


def test_other_guiders_samplers_and_odd_conditionings(found: dict) -> None:
    about = of(found, "guiders")
    for name, far in about["far"].items():
        assert 0.05 < far < 100, name
    assert about["basic"]
    assert about["lying"] > 0.01
    assert "no guider" in about["hidden"]
    assert "the latent that is sampled holds 1 of 1024" in about["nan"]


# By the server


def prompt_of(kind: str, steps: int = STEPS) -> dict[str, Any]:
    """Return a prompt with KSampler and GM Sampler side by side, for each solver."""
    about = KINDS[kind]
    prompt = {
        "model": node("UNETLoader", unet_name=f"any_{about.file}", weight_dtype="default"),
        "clip": text_encoder(kind),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a red fox"),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text="blurry"),
        "latent": about.empty,
    }
    wires = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    wires |= {"latent_image": ["latent", 0], "seed": 5, "steps": steps, "denoise": 1.0}
    own = {"order": 2, "substeps": 0, "shift": 0.0, "final_step_size": 1.0}
    for name, solver in SAMPLERS.items():
        stock = {"cfg": 1.0, "sampler_name": name, "scheduler": "gm"}
        prompt[name] = node("KSampler", **wires, **stock)
        prompt[solver] = node("GMFlowSampler", solver=solver, **wires, **own)
        for each in (name, solver):
            prompt[f"save {each}"] = node(
                "SaveLatent", samples=[each, 0], filename_prefix=f"any/{kind}_{each}"
            )
    return prompt


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_gives_the_same_latents_by_ksampler_and_gm_sampler(server: Comfy, kind: str) -> None:
    if kind in UNKNOWN:
        pytest.skip("this ComfyUI does not know the layout of Z-Image")
    folder, before = server.base / "output" / "any", len(server.log())
    result = server.run(prompt_of(kind))
    assert "K = 1" in result.texts["gm_ode"]
    assert not NOT_FITTING.search(server.log()[before:])
    latents = {
        name: load_file(next(folder.glob(f"{kind}_{name}_*.latent")))["latent_tensor"]
        for name in (*SAMPLERS, *SAMPLERS.values())
    }
    for name, solver in SAMPLERS.items():
        assert latents[name].shape[1:] == KINDS[kind].latent
        assert latents[name].isfinite().all()
        assert torch.equal(latents[name], latents[solver]), name


def test_interrupt_and_previews(server: Comfy) -> None:
    """An interrupted run ends early and leaves the server usable; steps report and preview."""
    prompt = {
        name: about
        for name, about in prompt_of("sd3", steps=2000).items()
        if name in ("model", "clip", "positive", "negative", "latent", "gm_ode", "save gm_ode")
    }
    started = server.submit(prompt)
    server.wait_progress(started, 3)
    server.interrupt()
    result = server.wait(started, expect_error=True)
    assert result.status == "interrupted"
    assert result.progress[-1].value < 2000
    prompt["gm_ode"]["inputs"] |= {"steps": 6, "seed": 6}
    again = server.run(prompt)
    assert [step.value for step in again.progress if step.node == "gm_ode"][-1] == 6
    assert again.previews
