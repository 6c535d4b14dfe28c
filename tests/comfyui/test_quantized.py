"""Loader and saver for 8 bit in a running ComfyUI: accuracy, LoRA, files, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapters import write_adapter, write_lora
from .client import Comfy
from .graphs import latent_of, node
from .stand_in_files import write_stand_in, write_text_encoder

LORA = "int8_style.safetensors"
FILES = {"flux": "int8_flux.safetensors", "qwen": "int8_qwen.safetensors"}


@pytest.fixture(scope="module")
def models(comfy: Comfy) -> Path:
    folder = comfy.base / "models"
    for base, name in FILES.items():
        write_stand_in(folder / "diffusion_models" / name, "base", dtype=torch.bfloat16)
        assert base in name
    write_lora(folder / "loras" / LORA, strength=0.1)
    write_text_encoder(folder / "text_encoders" / "int8_text.safetensors")
    return folder


def graph(model: dict, base: str = "flux", lora: float | None = None) -> dict:
    """Return a prompt of four stock Euler steps on the MODEL of a node."""
    encoder = {
        "flux": node(
            "DualCLIPLoader",
            clip_name1="int8_text.safetensors",
            clip_name2="int8_text.safetensors",
            type="flux",
        ),
        "qwen": node("CLIPLoader", clip_name="int8_text.safetensors", type="qwen_image"),
    }[base]
    style = {
        "style": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=lora
        )
    }
    settings = {
        "seed": 1,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    wires = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        "model": model,
        **({} if lora is None else style),
        "encoder": encoder,
        "text": node("CLIPTextEncode", clip=["encoder", 0], text="a red fox"),
        "empty": node("EmptySD3LatentImage", width=128, height=96, batch_size=1),
        "sample": node(
            "KSampler", model=["model" if lora is None else "style", 0], **wires, **settings
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
    }


@pytest.fixture(scope="module")
def sample(comfy: Comfy, models: Path) -> Callable[..., Tensor]:
    def run(model: dict, base: str = "flux", lora: float | None = None) -> Tensor:
        return latent_of(comfy, graph(model, base, lora))

    return run


def stock(name: str = FILES["flux"], weight_dtype: str = "default") -> dict:
    return node("UNETLoader", unet_name=name, weight_dtype=weight_dtype)


def eight_bit(name: str = FILES["flux"], **inputs: Any) -> dict:
    return node("GMFlowLoadDiffusionModel8bit", unet_name=name, **inputs)


def relative(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def version(comfy: Comfy) -> tuple[int, ...]:
    number = comfy.get("/system_stats")["system"]["comfyui_version"]
    return tuple(int(part) for part in number.split(".")[:2])


@pytest.mark.parametrize("base", FILES)
def test_near_sixteen_bit_and_far_below_fp8(sample: Callable, base: str) -> None:
    """Compare the latents of four steps; the aim is half of fp8's error."""
    exact = sample(stock(FILES[base]), base)
    fp8 = relative(sample(stock(FILES[base], "fp8_e4m3fn"), base), exact)
    precise, fast = (
        relative(sample(eight_bit(FILES[base], compute=name), base), exact)
        for name in ("16 bit", "int8")
    )
    assert 0 < precise < 0.5 * fp8
    assert 0 < fast < 0.5 * fp8


def test_default_is_the_precise_product(sample: Callable) -> None:
    assert torch.equal(sample(eight_bit()), sample(eight_bit(compute="16 bit")))
    assert not torch.equal(sample(eight_bit()), sample(eight_bit(compute="int8")))


def test_lora_moves_as_on_sixteen_bit(sample: Callable) -> None:
    exact, moved = sample(stock()), sample(stock(), lora=1.0)
    eight, eight_moved = sample(eight_bit()), sample(eight_bit(), lora=1.0)
    assert relative(moved, exact) > 0.02
    assert relative(eight_moved, moved) < 0.5 * relative(moved, exact)
    assert relative(eight_moved - eight, moved - exact) < 0.25
    assert torch.equal(sample(eight_bit()), eight)  # the LoRA is gone again


def test_unload_and_run_again(comfy: Comfy, sample: Callable) -> None:
    before = sample(eight_bit(), lora=1.0)
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    assert torch.equal(sample(eight_bit(), lora=1.0), before)


def test_model_stays_loaded(comfy: Comfy, sample: Callable) -> None:
    """A second prompt finds the model in ComfyUI's cache."""
    sample(eight_bit())
    prompt = graph(eight_bit())
    prompt["sample"]["inputs"]["seed"] = 77
    assert "model" in comfy.run(prompt).cached


def test_progress_while_loading(comfy: Comfy, sample: Callable) -> None:
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    sample(stock())
    steps = [
        step
        for step in comfy.run(graph(eight_bit(compute="int8"))).progress
        if step.node == "model"
    ]
    layers = 2 * 10 + 2 * 3  # in two blocks of either kind
    assert {step.max for step in steps} == {layers}
    assert steps[-1].value == steps[-1].max


def test_gm_adapter_on_an_8_bit_base(comfy: Comfy, models: Path) -> None:
    """LoRA changes the int8 weights, not the head; saving base and LoRA alone is refused."""
    adapter = "gmflux_int8.safetensors"
    write_adapter(models / "loras" / adapter, strength=0.1)

    def prompt(base: dict) -> dict:
        nodes = graph(base)
        wires = {"model": ["adapted", 0], "positive": ["text", 0], "latent_image": ["empty", 0]}
        settings = {
            "seed": 1,
            "steps": 4,
            "solver": "gm-ode",
            "order": 2,
            "substeps": 4,
            "shift": 1.0,
            "denoise": 1.0,
        }
        nodes["adapted"] = node(
            "GMFlowAdapter", model=["model", 0], adapter_name=adapter, strength=1.0
        )
        return {**nodes, "sample": node("GMFlowSampler", **wires, **settings)}

    exact, eight = latent_of(comfy, prompt(stock())), latent_of(comfy, prompt(eight_bit()))
    assert exact.isfinite().all()
    assert 0 < relative(eight, exact) < 0.05
    nodes = prompt(eight_bit())
    keep = node(
        "GMFlowSaveDiffusionModel8bit",
        model=["adapted", 0],
        filename_prefix="diffusion_models/adapted",
    )
    errors = comfy.run(
        {"model": nodes["model"], "adapted": nodes["adapted"], "keep": keep}, expect_error=True
    ).errors
    assert "connect the model from before GM Adapter" in errors["keep"]
    assert torch.equal(latent_of(comfy, prompt(eight_bit())), eight)


@pytest.mark.parametrize("lora", [None, 1.0])
def test_saved_and_loaded_back(comfy: Comfy, sample: Callable, lora: float | None) -> None:
    """A saved file gives the same latents, also with the loader of newer versions of ComfyUI."""
    prefix = f"diffusion_models/saved_{lora}"
    source = "model" if lora is None else "style"
    prompt = graph(eight_bit(), lora=lora)
    before = latent_of(comfy, prompt)
    keep = node("GMFlowSaveDiffusionModel8bit", model=[source, 0], filename_prefix=prefix)
    comfy.run(
        {name: prompt[name] for name in ("model", "style") if name in prompt} | {"keep": keep}
    )
    (path,) = (comfy.base / "output" / "diffusion_models").glob(f"saved_{lora}_*")
    saved, bf16 = (
        load_file(path),
        load_file(comfy.base / "models" / "diffusion_models" / FILES["flux"]),
    )
    assert set(bf16) <= set(saved)
    assert {weight.dtype for name, weight in saved.items() if name.endswith("qkv.weight")} == {
        torch.int8
    }
    assert not [name for name in saved if name.endswith(".comfy_quant") and "_blocks." not in name]
    for name in (
        "img_in.weight",
        "txt_in.weight",
        "time_in.in_layer.weight",
        "final_layer.linear.weight",
    ):
        assert torch.equal(saved[name], bf16[name])
    assert torch.equal(sample(eight_bit(path.name)), before)
    if version(comfy) >= (0, 27):
        assert torch.equal(sample(stock(path.name)), sample(eight_bit(path.name, compute="int8")))
    assert torch.equal(latent_of(comfy, prompt), before)  # saving leaves the model as it was


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


INT8 = {  # parts of an int8 layer, spoiled
    "scale nan": {"weight_scale": torch.full((768, 1), float("nan"))},
    "scale shape": {"weight_scale": torch.ones(5, 1)},
    "scale gone": {"weight_scale": None},
    "group": {
        "comfy_quant": bytes_of(
            '{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1000000000}'
        )
    },
    "deep": {"comfy_quant": bytes_of("[" * 100_000)},
    "list": {"comfy_quant": bytes_of("[5]")},
}


def spoiled(models: Path, kind: str) -> str:
    """Write a file that is not for the 8-bit loader, and return its name."""
    path = models / "diffusion_models" / f"spoiled_{kind}.safetensors"
    weights = load_file(models / "diffusion_models" / FILES["flux"])
    if kind == "fp8":
        save_file({name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}, path)
    elif kind == "scaled fp8":
        save_file({**weights, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)
    elif kind == "nvfp4":
        about = json.dumps({"format": "nvfp4"}).encode()
        save_file(
            {
                **weights,
                "double_blocks.0.img_attn.qkv.comfy_quant": torch.tensor(
                    list(about), dtype=torch.uint8
                ),
            },
            path,
        )
    elif kind == "4 bit":
        packed = {
            "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": torch.zeros(
                4, dtype=torch.uint8
            )
        }
        save_file({**weights, **packed}, path)
    elif kind == "text":
        save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 8)}, path)
    elif kind == "nan":
        weights["single_blocks.1.linear2.weight"][3, 5] = float("nan")
        save_file(weights, path)
    elif kind == "no norm":
        del weights["single_blocks.1.norm.query_norm.scale"]
        save_file(weights, path)
    elif kind == "norm nan":
        weights["single_blocks.1.norm.query_norm.scale"][2] = float("inf")
        save_file(weights, path)
    elif kind == "int":
        name = "double_blocks.1.img_mlp.0.weight"
        save_file({**weights, name: weights[name].int()}, path)
    elif kind in INT8:
        weight = weights["double_blocks.0.img_attn.qkv.weight"]
        layer = {"weight": weight.to(torch.int8), "weight_scale": torch.ones(len(weight), 1)}
        about = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
        layer["comfy_quant"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        layer |= INT8[kind]
        layer = {name: each for name, each in layer.items() if each is not None}
        save_file(
            {**weights, **{f"double_blocks.0.img_attn.qkv.{n}": t for n, t in layer.items()}}, path
        )
    elif kind == "half":
        whole = (models / "diffusion_models" / FILES["flux"]).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "long":
        header = json.dumps({"a": "x" * 100_000}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path.name


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("fp8", ["float8_e4m3fn", "Load it with Load Diffusion Model", "bf16 or fp16 file"]),
        ("scaled fp8", ["scaled fp8", "Load it with Load Diffusion Model"]),
        ("nvfp4", ["ComfyUI's nvfp4"]),
        ("4 bit", ["bitsandbytes 4 bit"]),
        ("text", ["no diffusion model", "text_model.encoder.layers.0.mlp.fc1.weight"]),
        ("nan", ["'single_blocks.1.linear2.weight'", "not finite", "damaged"]),
        ("half", ["cannot be read", "download"]),
        ("long", ["cannot be read", "invalid type", "download"]),
        ("no norm", ["single_blocks.1.norm.query_norm.", "lacks 1 of"]),
        ("norm nan", ["'single_blocks.1.norm.query_norm.scale'", "1 numbers", "not finite"]),
        ("int", ["'double_blocks.1.img_mlp.0.weight'", "torch.int32"]),
        ("scale nan", ["qkv.weight_scale'", "not finite"]),
        ("scale shape", ["qkv.weight_scale'", "(5, 1)", "768 rows"]),
        ("scale gone", ["qkv.weight_scale'", "is missing"]),
        ("group", ["qkv.comfy_quant'", "1000000000", "256 inputs"]),
        ("deep", ["qkv.comfy_quant'", "no description"]),
        ("list", ["qkv.comfy_quant'", "no description"]),
    ],
)
def test_refuses_with_a_reason(
    comfy: Comfy, models: Path, sample: Callable, kind: str, says: list[str]
) -> None:
    name = spoiled(models, kind)
    text = "\n".join(comfy.run(graph(eight_bit(name)), expect_error=True).errors.values())
    assert all(
        part in text for part in [repr(name), *says] if kind != "nan" or part != repr(name)
    ), text
    assert len(text) < 5000
    assert sample(eight_bit()).isfinite().all()  # ComfyUI goes on


def test_refuses_a_file_that_is_not_there(comfy: Comfy, models: Path) -> None:
    result = comfy.run(graph(eight_bit("nowhere.safetensors")), expect_error=True)
    assert result.status == "rejected"
    assert "there is no diffusion model 'nowhere.safetensors' in " in result.errors["model"]
    assert "models/diffusion_models" in result.errors["model"].replace(os.sep, "/")


def test_saves_8_bit_models_only(comfy: Comfy, models: Path) -> None:
    keep = node(
        "GMFlowSaveDiffusionModel8bit", model=["model", 0], filename_prefix="diffusion_models/no"
    )
    errors = comfy.run({"model": stock(), "keep": keep}, expect_error=True).errors
    assert "not in 8 bit" in errors["keep"]
    assert not list((comfy.base / "output").glob("diffusion_models/no_*"))


def test_a_float64_file_is_rounded_alike(comfy: Comfy, models: Path, sample: Callable) -> None:
    folder = models / "diffusion_models"
    weights = load_file(folder / FILES["flux"])
    double = {name: weight.double() for name, weight in weights.items()}
    save_file(double, folder / "int8_double.safetensors")
    assert torch.equal(sample(eight_bit("int8_double.safetensors")), sample(eight_bit()))


@pytest.mark.parametrize("lora", [None, 1.0])
def test_freed_and_run_again(comfy: Comfy, sample: Callable, lora: float | None) -> None:
    """ComfyUI unloads for /free outside of inference mode."""
    before = sample(eight_bit(), lora=lora)
    for _ in range(2):
        comfy.post("/free", {"unload_models": True})
        prompt = graph(eight_bit(), lora=lora)
        prompt["sample"]["inputs"]["seed"] = 2  # else nothing would run
        latent_of(comfy, prompt)
        assert torch.equal(sample(eight_bit(), lora=lora), before)


def test_merging_and_hooks(comfy: Comfy, models: Path) -> None:
    """As model1 of a merge it works; as model2, and with LoRA hooks, the reason is said."""
    prompt = graph(eight_bit(), lora=1.0)
    prompt["other"] = stock()
    for first, second in (("model", "other"), ("other", "model")):
        prompt["style"] = node("ModelMergeSimple", model1=[first, 0], model2=[second, 0], ratio=0.5)
        result = comfy.run(prompt, expect_error=True)
        if first == "model":
            assert result.status == "success", result.errors
            assert relative(latent_of(comfy, prompt), latent_of(comfy, graph(stock()))) < 0.05
        else:
            assert "cannot be merged" in result.errors["style"]
    del prompt["style"], prompt["other"]
    prompt["hook"] = node("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    prompt["hooked"] = node(
        "ConditioningSetProperties",
        cond_NEW=["text", 0],
        hooks=["hook", 0],
        strength=1.0,
        set_cond_area="default",
    )
    prompt["sample"]["inputs"] |= {"model": ["model", 0], "positive": ["hooked", 0]}
    errors = comfy.run(prompt, expect_error=True).errors
    assert "take no LoRA hooks" in errors["sample"]


@pytest.mark.parametrize(
    "prefix", ["../outside", "/outside", "a\u0000b", "\ud800", "x" * 5000, "x/" * 3000]
)
def test_a_prefix_that_is_no_place_for_a_file(comfy: Comfy, models: Path, prefix: str) -> None:
    keep = node("GMFlowSaveDiffusionModel8bit", model=["model", 0], filename_prefix=prefix)
    result = comfy.run({"model": eight_bit(), "keep": keep}, expect_error=True)
    text = result.errors["keep"]
    assert "filename_prefix" in text or "cannot be written" in text, text
    assert "Error: " in text
    assert not list(comfy.base.glob("**/.gmflow-*.tmp"))
