"""GM adapters on base models in a running ComfyUI: samplers, LoRAs, loaders, time shift."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .adapter_prompts import (
    FILES,
    custom,
    graph,
    inserted,
    near,
    serve,
    skip_unknown_base,
    stock,
)
from .bases import write_gguf
from .client import Comfy, PromptError
from .graphs import latent_of, node
from .installation import GGUF_HOW_TO


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


@pytest.fixture(autouse=True)
def known_to_this_comfyui(request: pytest.FixtureRequest, server: Comfy) -> None:
    skip_unknown_base(request, server)


@pytest.mark.parametrize("base", FILES)
def test_every_base_samples_and_the_nodes_agree(server: Comfy, base: str) -> None:
    latent = latent_of(server, graph(base))
    assert latent.isfinite().all()
    assert latent.std() > 0.5
    assert torch.equal(latent, latent_of(server, custom(graph(base))))
    assert not near(
        latent, latent_of(server, graph(base, solver="euler", final_step_size=0.5)), 0.02
    )
    prompt = graph(base)
    prompt["positive"]["inputs"]["text"] = "a fox"
    assert not near(latent, latent_of(server, prompt), 0.02)


@pytest.mark.parametrize("base", FILES)
def test_a_stock_sampler_follows_the_mean(server: Comfy, base: str) -> None:
    euler = node("KSamplerSelect", sampler_name="euler")
    assert near(
        latent_of(server, custom(graph(base), euler)),
        latent_of(server, graph(base, solver="euler", final_step_size=0.5)),
    )
    for name in ("dpmpp_2m", "uni_pc", "heun"):
        assert latent_of(server, stock(graph(base), sampler_name=name)).isfinite().all()


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde", "dpmpp-2m"])
def test_other_gm_solvers_run_on_an_adapted_model(server: Comfy, solver: str) -> None:
    assert latent_of(server, graph(solver=solver, substeps=0)).isfinite().all()


@pytest.mark.parametrize("base", FILES)
def test_the_base_model_is_left_as_it_was(server: Comfy, base: str) -> None:
    plain = graph(base)
    plain["sample"]["inputs"].update(model=["base", 0])
    plain = stock(plain)
    plain["sample"]["inputs"].update(model=["base", 0])
    before = latent_of(server, plain)
    adapted = latent_of(server, graph(base))
    assert torch.equal(latent_of(server, {**plain, "sample": {**plain["sample"]}}), before)
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    assert torch.equal(latent_of(server, plain), before)
    assert torch.equal(latent_of(server, graph(base)), adapted)


@pytest.mark.parametrize("base", FILES)
def test_loras_before_or_after_the_adapter_are_the_same(server: Comfy, base: str) -> None:
    lora = {"lora_name": f"{base}_style.safetensors", "strength_model": 1.0}
    plain = latent_of(server, graph(base))
    before = latent_of(
        server, inserted(graph(base), "lora", node("LoraLoaderModelOnly", **lora), "model")
    )
    after = latent_of(
        server, inserted(graph(base), "lora", node("LoraLoaderModelOnly", **lora), "sample")
    )
    assert near(before, after)
    assert not near(plain, after, 0.01)


@pytest.mark.parametrize("kind", ["fp8", "8-bit", "native int8", "GGUF"])
def test_every_loader_feeds_the_adapter(server: Comfy, kind: str) -> None:
    """Compare the latent with that of the 16-bit file, up to the rounding of the weights."""
    models, prompt = server.base / "models" / "diffusion_models", graph()
    if kind == "fp8":
        prompt["base"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    elif kind == "8-bit":
        prompt["base"] = node("GMFlowLoadDiffusionModel8bit", unet_name=FILES["flux"])
    elif kind == "native int8":
        if not has_native_int8(server):
            pytest.skip("int8 files of ComfyUI's own came with 0.27")
        eight_bit = node("GMFlowLoadDiffusionModel8bit", unet_name=FILES["flux"])
        save = node(
            "GMFlowSaveDiffusionModel8bit",
            model=["base", 0],
            filename_prefix="diffusion_models/flux_native",
        )
        (path,) = server.run({"base": eight_bit, "save": save}).outputs["save"]["text"]
        server.object_info()
        prompt["base"]["inputs"]["unet_name"] = Path(path).name
    else:
        if not server.object_info("UnetLoaderGGUF"):
            pytest.skip(f"no ComfyUI-GGUF: {GGUF_HOW_TO}")
        write_gguf(models / FILES["flux"], models / "flux1-dev-Q8_0.gguf")
        server.object_info()
        prompt["base"] = node("UnetLoaderGGUF", unet_name="flux1-dev-Q8_0.gguf")
    result, exact = latent_of(server, prompt), latent_of(server, graph())
    assert 0 < (result - exact).std() < 0.1 * exact.std()


def has_native_int8(server: Comfy) -> bool:
    """Return whether this is ComfyUI 0.27 or newer."""
    version = server.get("/system_stats")["system"]["comfyui_version"]
    return tuple(int(part) for part in version.split(".")[:2]) >= (0, 27)


LAST_LAYERS = {"flux": "final_layer.linear", "qwen": "proj_out", "flux2": "final_layer.linear"}


@pytest.mark.parametrize("base", FILES)
def test_the_base_models_weights_stay_where_they_are(server: Comfy, base: str) -> None:
    """LoRAs on the base's last layer find it even while an adapted clone is loaded.

    On the adapted model, where the head replaces that layer, the node says that they have no
    effect.
    """
    models, layer = server.base / "models", LAST_LAYERS[base]
    shape = load_file(models / "diffusion_models" / FILES[base])[f"{layer}.weight"].shape
    up, down = torch.randn(shape[0], 2), torch.randn(2, shape[1])
    prefix = f"diffusion_model.{layer}"
    save_file(
        {f"{prefix}.lora_B.weight": up, f"{prefix}.lora_A.weight": down},
        models / "loras" / f"{base}_last.safetensors",
    )
    server.object_info()
    lora = {"lora_name": f"{base}_last.safetensors", "strength_model": 0.1}
    plain = stock(graph(base))
    plain["sample"]["inputs"]["model"] = ["base", 0]
    with_lora = inserted(plain, "lora", node("LoraLoaderModelOnly", **lora), "sample")
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    fresh = latent_of(server, with_lora)
    assert not near(fresh, latent_of(server, plain), 0.01)
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    adapted = latent_of(server, graph(base))
    assert torch.equal(latent_of(server, with_lora), fresh)
    for before in ("model", "sample"):
        prompt = inserted(graph(base), "lora", node("LoraLoaderModelOnly", **lora), before)
        assert near(latent_of(server, prompt), adapted)
        prompt["sample"]["inputs"]["seed"] += 1
        assert (
            f"a part of a LoRA has no effect: it changes {prefix}.weight"
            in server.run(prompt).texts["sample"]
        )


def test_the_strength_is_the_loras(server: Comfy) -> None:
    results = []
    for strength in (0.0, 0.5, 1.0):
        prompt = graph()
        prompt["model"]["inputs"]["strength"] = strength
        results.append(latent_of(server, prompt))
    assert not near(results[0], results[1], 0.01)
    assert not near(results[1], results[2], 0.01)


def test_the_noise_of_the_sampler_node_is_the_images_own(server: Comfy) -> None:
    sampler = node("GMFlowPolicySampler", substeps=32, temperature=0.0, stochasticity=0.7)
    both = latent_of(server, custom(graph(batch=2), sampler))
    assert not near(both[:1], both[1:], 0.1)
    prompt = custom(graph(batch=2), sampler)
    prompt["one"] = node("LatentFromBatch", samples=["latent", 0], batch_index=1, length=1)
    prompt["sample"]["inputs"]["latent_image"] = ["one", 0]
    assert near(latent_of(server, prompt), both[1:], 1e-3)


def test_sigmas_split_over_two_samplers(server: Comfy) -> None:
    """Set the temperature by hand, as the automatic one counts a sampler's own steps."""
    sampler = node("GMFlowPolicySampler", substeps=32, temperature=0.3, stochasticity=0.0)
    whole = custom(graph(), sampler)
    split = custom(graph(), sampler)
    split["two"] = node("SplitSigmas", sigmas=["sigmas", 0], step=2)
    split["first"] = {
        **split["sample"],
        "inputs": {**split["sample"]["inputs"], "sigmas": ["two", 0]},
    }
    split["quiet"] = node("DisableNoise")
    split["sample"]["inputs"] |= {
        "sigmas": ["two", 1],
        "noise": ["quiet", 0],
        "latent_image": ["first", 0],
    }
    assert near(latent_of(server, split), latent_of(server, whole), 1e-3)


def test_the_shift_is_the_models_own(server: Comfy) -> None:
    latent = latent_of(server, graph())
    assert near(latent_of(server, graph(shift=3.2)), latent)
    assert not near(latent_of(server, graph(shift=1.0)), latent, 0.02)
    flux = {"max_shift": 1.0, "base_shift": 1.0, "width": 1024, "height": 1024}  # of the logarithm
    other = inserted(graph(), "shift", node("ModelSamplingFlux", **flux), "sample")
    assert "shift 2.72," in server.run(other).texts["sample"]
    assert near(latent_of(server, other), latent_of(server, graph(shift=2.718281828)))


def test_the_model_stays_loaded_between_runs(server: Comfy) -> None:
    server.run(graph(seed=101))
    before = len(server.log())
    result = server.run(graph(seed=102))
    assert {"base", "model"} <= set(result.cached)
    assert "Requested to load" not in server.log()[before:]


def test_dx_adapters(server: Comfy) -> None:
    prompt = graph()
    prompt["model"]["inputs"]["adapter_name"] = "dxflux_n10_piid_4step.safetensors"
    latent = latent_of(server, prompt)
    assert latent.isfinite().all()
    assert torch.equal(latent, latent_of(server, custom(prompt)))
    assert latent_of(server, stock(prompt)).isfinite().all()
    prompt["sample"]["inputs"]["solver"] = "gm-ode"
    with pytest.raises(
        PromptError, match=r"dxflux_n10_piid_4step.* has a DX policy; use gm-policy"
    ):
        server.run(prompt)
    guided = {**graph(guidance=0.2), "model": prompt["model"]}
    guided["sample"]["inputs"]["negative"] = ["negative", 0]
    with pytest.raises(PromptError, match="this adapter has a DX policy"):
        server.run(guided)
