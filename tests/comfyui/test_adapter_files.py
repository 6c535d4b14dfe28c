"""Files of GM adapters that are damaged, unreadable, or made for another base model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter_prompts import ADAPTERS, EMPTY, graph, inserted, serve
from .adapters import write_adapter
from .client import Comfy, PromptError
from .graphs import latent_of, node

LORA = "single_transformer_blocks.1.proj_mlp.lora_B.weight"


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


def edited(server: Comfy, name: str, source: str, **changes: Tensor | None) -> str:
    """Write an adapter's file with tensors replaced, or removed if None; return its name."""
    folder = server.base / "models" / "loras"
    tensors = {
        key: tensor
        for key, tensor in {**load_file(folder / source), **changes}.items()
        if tensor is not None
    }
    save_file(tensors, folder / name)
    server.object_info()
    return name


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        (
            "no_std",
            {"proj_out_logstds.3.weight": None},
            r"proj_out_logstds\.3\.weight': expected \(1, 32\), found none",
        ),
        (
            "no_norm",
            {"norm_out.linear.bias": None},
            r"norm_out\.linear\.bias': expected \(512,\), found none",
        ),
        (
            "half_pair",
            {LORA: None},
            r"neither a head nor a whole pair.*single_transformer_blocks\.1\.proj_mlp\.lora_A",
        ),
        (
            "wide",
            {LORA: torch.zeros(7, 4)},
            r"1 tensors do not fit this FLUX\.1 model, first '.*proj_mlp': expected .*\(7, 256\)",
        ),
        (
            "ranks",
            {LORA: torch.zeros(1024, 3)},
            r"proj_mlp is no product of matrices: lora_B is \(1024, 3\), lora_A \(4, 256\)",
        ),
        ("nan", {LORA: torch.full((1024, 4), float("nan"))}, r"4096 numbers in '.*not finite"),
        ("ints", {LORA: torch.zeros(1024, 4, dtype=torch.int8)}, "type I8 .* no array of floats"),
        ("text", {"\x1b[31m.lora_A.weight": torch.zeros(4, 2)}, r"keys are neither.*\\x1b\[31m"),
        (
            "extra",
            {"attn9.lora_A.weight": torch.zeros(4, 2), "attn9.lora_B.weight": torch.zeros(4, 4)},
            r"first 'attn9': expected none, found \(4, 2\)",
        ),
    ],
)
def test_damaged_adapters_are_refused_with_the_key(
    server: Comfy, name: str, changes: dict, complaint: str
) -> None:
    prompt = graph()
    prompt["model"]["inputs"]["adapter_name"] = edited(
        server, f"{name}.safetensors", ADAPTERS["flux"], **changes
    )
    with pytest.raises(PromptError, match=complaint) as error:
        server.run(prompt)
    assert f"{name}.safetensors" in str(error.value)
    assert latent_of(server, graph()).isfinite().all()


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        ("{GMFlow", r"policy_config in its metadata is '\{GMFlow', which is no JSON object"),
        ("[1]", "which is no JSON object"),
        ("[" * 100_000, "which is no JSON object"),
        ('{"type": ["DX"]}', "this version knows GMFlow, DX and ArcFlow"),
        ('{"type": "GMFlow", "shift": NaN}', "whose shift is no number"),
        ('{"type": "Flow3"}', "this version knows GMFlow, DX and ArcFlow"),
        ('{"type": "DX", "segment_size": 0.25}', "without shift"),
        ('{"type": "DX", "segment_size": "0.25", "shift": 3.2}', "segment_size '0.25'"),
        ('{"type": "GMFlow", "shift": 0}', r"whose shift is no number from 0\.01 to 100"),
        (None, "no policy_config in its metadata, which a DX policy"),
    ],
)
def test_bad_metadata_is_quoted(server: Comfy, policy: str | None, complaint: str) -> None:
    metadata = {} if policy is None else {"policy_config": policy}
    write_adapter(
        server.base / "models" / "loras" / "bad_4step.safetensors", policy="DX", metadata=metadata
    )
    server.object_info()
    prompt = graph()
    prompt["model"]["inputs"]["adapter_name"] = "bad_4step.safetensors"
    with pytest.raises(PromptError, match=f"bad_4step.*{complaint}"):
        server.run(prompt)


@pytest.mark.parametrize(("base", "shape"), [("flux", (1, 4, 8, 8)), ("qwen", (1, 4, 1, 8, 8))])
def test_latents_of_other_channels_are_named(server: Comfy, base: str, shape: tuple) -> None:
    """They are named by the adapter's own wrapper, with every sampler, before the first step."""
    save_file(
        {"latent_tensor": torch.ones(shape), "latent_format_version_0": torch.tensor([])},
        server.base / "input" / f"{base}.latent",
    )
    prompt = graph(base)
    prompt["given"] = node("LoadLatent", latent=f"{base}.latent")
    prompt["sample"]["inputs"]["latent_image"] = ["given", 0]
    stock = node(
        "KSampler",
        **{key: prompt["sample"]["inputs"][key] for key in ("model", "positive", "latent_image")},
        **{"negative": prompt["sample"]["inputs"]["positive"], "seed": 0, "steps": 1, "cfg": 1.0},
        **{"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
    )
    for sampler in (prompt["sample"], stock):
        with pytest.raises(PromptError, match=r"it has the shape \(1, 4.* takes \(batch, 16"):
            server.run({**prompt, "sample": sampler})


def test_unreadable_files_and_names_without_steps(server: Comfy) -> None:
    loras, prompt = server.base / "models" / "loras", graph()
    (loras / "short_4step.safetensors").write_bytes((loras / ADAPTERS["flux"]).read_bytes()[:5000])
    write_adapter(loras / "diffusion_pytorch_model.safetensors")
    server.object_info()
    prompt["model"]["inputs"]["adapter_name"] = "short_4step.safetensors"
    with pytest.raises(
        PromptError, match=r"short_4step\.safetensors is not a whole safetensors file"
    ):
        server.run(prompt)
    prompt["model"]["inputs"]["adapter_name"] = "diffusion_pytorch_model.safetensors"
    assert "does not say how many steps" in server.run(prompt).texts["model"]
    del prompt["sample"]["inputs"]["positive"]
    with pytest.raises(PromptError, match=r"conditioned on text; connect a prompt .* to positive"):
        server.run(prompt)


def test_wrong_pairings_are_refused(server: Comfy) -> None:
    cases = (
        ("flux", "qwen", r"do not fit this FLUX\.1 model.*it looks like an adapter for Qwen-Image"),
        ("qwen", "flux", r"do not fit this Qwen-Image model.*it looks like an adapter for FLUX\.1"),
        ("flux2", "flux", "tensors do not fit a base model of width"),
    )
    for base, other, complaint in cases if server.object_info(EMPTY["flux2"]) else cases[:2]:
        prompt = graph(base)
        prompt["model"]["inputs"]["adapter_name"] = ADAPTERS[other]
        with pytest.raises(PromptError, match=complaint):
            server.run(prompt)
    prompt = graph()
    prompt["model"]["inputs"]["adapter_name"] = "flux_style.safetensors"
    with pytest.raises(
        PromptError, match=r"flux_style\.safetensors is no GM adapter.*use Load LoRA"
    ):
        server.run(prompt)
    twice = inserted(
        graph(),
        "again",
        node("GMFlowAdapter", adapter_name=ADAPTERS["flux"], strength=1.0),
        "sample",
    )
    with pytest.raises(PromptError, match="has a GM adapter already"):
        server.run(twice)
    digits = graph()
    digits["base"] = node("GMFlowLoader", model_name="digits_k8.safetensors")
    with pytest.raises(
        PromptError,
        match=r"does not fit this model, a GMModel: it is for FLUX\.1, Qwen-Image, FLUX\.2",
    ):
        server.run(digits)


def test_an_adapter_without_a_lora_is_said(server: Comfy) -> None:
    heads = {
        key: None
        for key in load_file(server.base / "models" / "loras" / ADAPTERS["flux"])
        if ".lora_" in key
    }
    prompt = graph()
    prompt["model"]["inputs"]["adapter_name"] = edited(
        server, "head_only.safetensors", ADAPTERS["flux"], **heads
    )
    result = server.run(prompt)
    assert "no LoRA in " in result.texts["model"]
