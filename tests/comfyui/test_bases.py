"""Stand-ins for published models have their layouts, and stock ComfyUI runs them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .adapters import POLICIES, adapter_shapes, write_adapter, write_lora
from .bases import (
    HIDDEN,
    flux2_shapes,
    flux_shapes,
    qwen_image_shapes,
    write_flux,
    write_gguf,
    write_qwen_image,
)
from .client import Comfy
from .graphs import latent_of, node
from .stand_in_files import write_stand_ins

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = {
    "flux": ("flux1-dev.safetensors", "ae.safetensors", "flux_style.safetensors"),
    "qwen": ("qwen_image_bf16.safetensors", "qwen_image_vae.safetensors", "qwen_style.safetensors"),
    "flux2": ("flux2-dev.safetensors", "flux2-vae.safetensors", "flux2_style.safetensors"),
    "klein": (
        "flux-2-klein-4b.safetensors",
        "flux2-vae.safetensors",
        "flux2_klein_style.safetensors",
    ),
}


def graph(base: str, text: str = "a red fox", guidance: float = 3.5, lora: float = 0.0) -> dict:
    """Return a stock workflow of two steps; its picture also goes through the VAE again."""
    model, vae, style = NAMES[base]
    latent = "EmptyFlux2LatentImage" if base in ("flux2", "klein") else "EmptySD3LatentImage"
    encoder = {
        "flux": node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl_fp16.safetensors",
            type="flux",
        ),
        "qwen": node("CLIPLoader", clip_name="qwen_2.5_vl_7b.safetensors", type="qwen_image"),
        "flux2": node("CLIPLoader", clip_name="mistral_3_small_flux2.safetensors", type="flux2"),
        "klein": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="flux2"),
    }[base]
    sampling = {
        "seed": 1,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return {
        "model": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "style": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=style, strength_model=lora
        ),
        "encoder": encoder,
        "text": node("CLIPTextEncode", clip=["encoder", 0], text=text),
        "guidance": node("FluxGuidance", conditioning=["text", 0], guidance=guidance),
        "empty": node(latent, width=80, height=64, batch_size=1),
        "sample": node(
            "KSampler",
            model=["style", 0],
            positive=["guidance", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            **sampling,
        ),
        "vae": node("VAELoader", vae_name=vae),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "picture": node("PreviewImage", images=["decode", 0]),
        "encode": node("VAEEncode", pixels=["decode", 0], vae=["vae", 0]),
        "decode again": node("VAEDecode", samples=["encode", 0], vae=["vae", 0]),
        "picture again": node("PreviewImage", images=["decode again", 0]),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
    }


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, comfy: Comfy) -> str:
    """A base with all its files; FLUX.2 came after ComfyUI 0.3.64."""
    known = comfy.object_info("EmptyFlux2LatentImage")
    if request.param in ("flux2", "klein") and not known:
        pytest.skip("this ComfyUI has no FLUX.2")
    write_stand_ins(comfy.base, graph(request.param))
    return request.param


def test_stock_workflow_runs(comfy: Comfy, base: str) -> None:
    """Every weight fits; text, guidance and a LoRA change the latent."""
    before = len(comfy.log())
    images = comfy.run(graph(base)).images
    for name in ("picture", "picture again"):
        picture = np.asarray(images[name][0], float)
        assert picture.shape == (64, 80, 3)
        assert picture.std() > 10
    latent = latent_of(comfy, graph(base))
    assert latent.isfinite().all()

    def change(**changes) -> float:
        return ((latent_of(comfy, graph(base, **changes)) - latent).std() / latent.std()).item()

    assert change(text="a blue whale") > 0.05
    assert change(lora=1.0) > 0.05
    assert (change(guidance=1.0) > 0.05) == (base in ("flux", "flux2"))
    log = comfy.log()[before:]
    assert not [
        line
        for line in log.splitlines()
        if "unet missing" in line or "unet unexpected" in line or "not loaded" in line
    ]


def test_same_text_same_picture(comfy: Comfy) -> None:
    write_stand_ins(comfy.base, graph("flux"))
    first = latent_of(comfy, graph("flux"))
    assert not torch.equal(latent_of(comfy, graph("flux", text="another")), first)
    assert torch.equal(latent_of(comfy, graph("flux")), first)


# Layouts


@pytest.mark.parametrize(("base", "depth", "single"), [("flux", 19, 38), ("qwen", 60, 0)])
def test_adapter_has_the_published_layout(base: str, depth: int, single: int) -> None:
    """Compare every name and shape at real sizes, without the weights."""
    layout = json.loads((GOLDEN / f"gm{base}_k8_adapter_layout.json").read_text())
    expected = {
        name.format(i): tuple(shape)
        for name, (copies, shape) in layout["tensors"].items()
        for i in range(copies)
    }
    found = adapter_shapes(base, 3072, depth, single)
    assert found == expected
    assert sum(math.prod(shape) for shape in found.values()) == layout["parameters"]


@pytest.mark.parametrize(
    ("shapes", "parameters"),
    [
        (flux_shapes(3072, 19, 38), 11_901_408_320),
        (qwen_image_shapes(3072, 60), 20_430_401_088),
        (flux2_shapes(6144, 8, 48), 32_223_281_152),
        (flux2_shapes(3072, 5, 20, klein=True), 3_875_544_576),
    ],
    ids=["FLUX.1 dev", "Qwen-Image", "FLUX.2 dev", "FLUX.2 klein 4B"],
)
def test_base_has_the_published_size(shapes: dict[str, tuple[int, ...]], parameters: int) -> None:
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("base", ["flux", "qwen", "flux2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_adapter_file(tmp_path: Path, base: str, policy: str) -> None:
    path = write_adapter(tmp_path / "a.safetensors", base, policy=policy)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["policy_config"])
    assert config == POLICIES[policy]
    weights = load_file(path)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == adapter_shapes(
        base, HIDDEN[base], 2, 2, 4, logstd_inner=32, policy=policy
    )
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() and weight.any() for weight in weights.values())
    assert ("norm_out.linear.bias" in weights) == (base != "flux2")
    plain = write_adapter(tmp_path / "b.safetensors", base, policy=policy, metadata={})
    with safe_open(plain, "pt") as file:
        assert not file.metadata()


def test_files_repeat_and_differ_by_seed(tmp_path: Path) -> None:
    for write in (write_flux, write_qwen_image, write_adapter, write_lora):
        one, same, other = (
            write(tmp_path / f"{i}", seed=seed).read_bytes() for i, seed in enumerate((5, 5, 6))
        )
        assert one == same
        assert len(one) == len(other)
        assert one != other


@pytest.mark.parametrize(("write", "base"), [(write_flux, "flux"), (write_qwen_image, "qwen")])
def test_gguf_has_the_same_weights(tmp_path: Path, write, base: str) -> None:
    gguf = pytest.importorskip("gguf")
    source = write(tmp_path / "a.safetensors", depth=1)
    reader = gguf.GGUFReader(write_gguf(source, tmp_path / "a.gguf", base))
    weights = load_file(source)
    assert {tensor.name for tensor in reader.tensors} == set(weights)
    for tensor in reader.tensors:
        found, expected = (
            torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)),
            weights[tensor.name].float(),
        )
        assert (found - expected).abs().max() <= expected.abs().max() / 127
