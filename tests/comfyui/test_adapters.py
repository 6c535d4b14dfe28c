"""GM adapters on base models in a running ComfyUI: tiny random models in the layouts of the published files."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapters import write_adapter, write_lora
from .bases import write_flux, write_flux2, write_gguf, write_qwen_image
from .client import Comfy, PromptError
from .graphs import NOT_FITTING, latent_of, node
from .installation import GGUF_HOW_TO
from .stand_in_files import write_text_encoder

FILES = {
    "flux": "flux1-dev.safetensors",
    "qwen": "qwen_image_bf16.safetensors",
    "flux2": "flux2-dev.safetensors",
}
ADAPTERS = {base: f"gm{base}_k8_piid_4step.safetensors" for base in FILES}
EMPTY = {
    "flux": "EmptySD3LatentImage",
    "qwen": "EmptySD3LatentImage",
    "flux2": "EmptyFlux2LatentImage",
}
CLIP_TYPES = {"flux": "flux", "qwen": "qwen_image", "flux2": "flux2"}
ROUNDING = 1e-4  # of float32, over a few steps


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    """The server, with all files that the tests name; what it logs must not say that weights do not fit."""
    models, before = comfy.base / "models", len(comfy.log())
    for base, writer in {
        "flux": write_flux,
        "qwen": write_qwen_image,
        "flux2": write_flux2,
    }.items():
        writer(models / "diffusion_models" / FILES[base])
        write_adapter(models / "loras" / ADAPTERS[base], base)
        write_lora(models / "loras" / f"{base}_style.safetensors", base)
    write_flux(models / "diffusion_models" / "flux1-schnell.safetensors", guidance=False)
    write_adapter(models / "loras" / "dxflux_n10_piid_4step.safetensors", policy="DX")
    write_adapter(models / "loras" / "gmflux_k8_piid_8step.safetensors", seed=5)
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(models / "text_encoders" / f"{name}.safetensors")
    comfy.object_info()
    yield comfy
    assert not NOT_FITTING.search(strip_expected(comfy.log()[before:]))


@pytest.fixture(autouse=True)
def known_to_this_comfyui(request: pytest.FixtureRequest, server: Comfy) -> None:
    """FLUX.2 is younger than the oldest ComfyUI that the extension supports."""
    base = getattr(request.node, "callspec", None) and request.node.callspec.params.get("base")
    if base and EMPTY[base] not in server.object_info():
        pytest.skip(f"this ComfyUI has no {EMPTY[base]}")


def strip_expected(log: str) -> str:
    """The log without what nodes raised, which the tests look at themselves."""
    return re.sub(
        r"!!! Exception during processing !!!.*?Prompt executed", "", log, flags=re.DOTALL
    )


def graph(
    base: str = "flux", width: int = 64, height: int = 64, batch: int = 1, **sampler: Any
) -> dict:
    """Load Diffusion Model -> GM Adapter -> GM Sampler -> a saved latent."""
    if base == "flux":
        clip = node(
            "DualCLIPLoader",
            clip_name1="clip_l.safetensors",
            clip_name2="t5xxl.safetensors",
            type="flux",
        )
    else:
        clip = node("CLIPLoader", clip_name="t5xxl.safetensors", type=CLIP_TYPES[base])
    wires = {"model": ["model", 0], "latent_image": ["latent", 0], "positive": ["positive", 0]}
    settings = {
        "seed": 0,
        "steps": 4,
        "solver": "gm-policy",
        "order": 2,
        "substeps": 32,
        "shift": 0.0,
        "denoise": 1.0,
        **sampler,
    }
    return {
        "base": node("UNETLoader", unet_name=FILES[base], weight_dtype="default"),
        "model": node(
            "GMFlowAdapter", model=["base", 0], adapter_name=ADAPTERS[base], strength=1.0
        ),
        "clip": clip,
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a lighthouse at dusk"),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text="blurry"),
        "latent": node(EMPTY[base], width=width, height=height, batch_size=batch),
        "sample": node("GMFlowSampler", **wires, **settings),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }


def custom(
    prompt: dict, sampler: dict | None = None, guider: dict | None = None, **sigmas: Any
) -> dict:
    """The same with SamplerCustomAdvanced and the nodes for SAMPLER and SIGMAS."""
    wires = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    settings = {"steps": 4, "shift": 0.0, "final_step_size": 0.5, "denoise": 1.0, **sigmas}
    return {
        **prompt,
        "noise": node("RandomNoise", noise_seed=0),
        "guider": guider or node("BasicGuider", model=["model", 0], conditioning=["positive", 0]),
        "sampler": sampler
        or node("GMFlowPolicySampler", substeps=32, temperature=0.0, stochasticity=0.0),
        "sigmas": node("GMFlowPolicySigmas", model=["model", 0], **settings),
        "sample": node(
            "SamplerCustomAdvanced",
            **wires,
            latent_image=prompt["sample"]["inputs"]["latent_image"],
        ),
    }


def stock(prompt: dict, **settings: Any) -> dict:
    """The same with KSampler."""
    wires = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
    }
    settings = {
        "seed": 0,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
        **settings,
    }
    return {**prompt, "sample": node("KSampler", **wires, **settings)}


def inserted(prompt: dict, name: str, about: dict, before: str) -> dict:
    """`about`, a node that takes a model, on the wire into the model input of `before`."""
    about["inputs"]["model"] = prompt[before]["inputs"]["model"]
    after = {**prompt[before], "inputs": {**prompt[before]["inputs"], "model": [name, 0]}}
    return {**prompt, name: about, before: after}


def near(a: Tensor, b: Tensor, tolerance: float = ROUNDING) -> bool:
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


# Sampling


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
    """The latent is that of the 16-bit file, but for the rounding of the weights."""
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
        if "UnetLoaderGGUF" not in server.object_info():
            pytest.skip(f"no ComfyUI-GGUF: {GGUF_HOW_TO}")
        write_gguf(models / FILES["flux"], models / "flux1-dev-Q8_0.gguf")
        server.object_info()
        prompt["base"] = node("UnetLoaderGGUF", unet_name="flux1-dev-Q8_0.gguf")
    result, exact = latent_of(server, prompt), latent_of(server, graph())
    assert 0 < (result - exact).std() < 0.1 * exact.std()


def has_native_int8(server: Comfy) -> bool:
    """Whether this is ComfyUI 0.27 or newer."""
    version = server.get("/system_stats")["system"]["comfyui_version"]
    return tuple(int(part) for part in version.split(".")[:2]) >= (0, 27)


REFERENCES = {
    "flux": ["offset", "index"],
    "qwen": ["index", "index_timestep_zero"],
    "flux2": ["index", "index_timestep_zero"],
}


@pytest.mark.parametrize(
    ("base", "method"),
    [(base, method) for base, methods in REFERENCES.items() for method in methods],
)
def test_reference_images_are_no_part_of_the_mixture(server: Comfy, base: str, method: str) -> None:
    """As Kontext and Qwen-Image-Edit have them: further tokens behind the image's, some with an embedding of their own."""
    if "FluxKontextMultiReferenceLatentMethod" not in server.object_info():
        pytest.skip("this ComfyUI has no methods for reference latents")
    prompt = graph(base, stochasticity=0.5)
    prompt["first"] = graph(base, seed=9)["sample"]
    prompt["small"] = node(EMPTY[base], width=48, height=80, batch_size=1)
    prompt["first"]["inputs"]["latent_image"] = ["small", 0]
    prompt["reference"] = node("ReferenceLatent", conditioning=["positive", 0], latent=["first", 0])
    prompt["method"] = node(
        "FluxKontextMultiReferenceLatentMethod",
        conditioning=["reference", 0],
        reference_latents_method=method,
    )
    prompt["sample"]["inputs"]["positive"] = ["method", 0]
    latent, plain = latent_of(server, prompt), latent_of(server, graph(base, stochasticity=0.5))
    assert latent.isfinite().all()
    assert latent.shape == plain.shape
    assert not near(latent, plain, 0.01)


LAST_LAYERS = {"flux": "final_layer.linear", "qwen": "proj_out", "flux2": "final_layer.linear"}


@pytest.mark.parametrize("base", FILES)
def test_the_base_models_weights_stay_where_they_are(server: Comfy, base: str) -> None:
    """While an adapted clone is loaded, LoRAs on the base's last layer still find it; on the adapted model, where the head
    stands in for that layer, the node says that the LoRA has no effect."""
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
        assert f"a LoRA on this model changes {prefix}.weight" in server.run(prompt).texts["sample"]


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
    """With a temperature of its own, as the automatic one counts the steps of a sampler."""
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


@pytest.mark.parametrize("base", FILES)
@pytest.mark.parametrize("size", [(64, 64), (104, 72)])
def test_an_image_of_a_batch_is_the_one_of_its_own_index(
    server: Comfy, base: str, size: tuple[int, int]
) -> None:
    """With noise in every step; the second size is an odd number of latent pixels."""
    size = (size[0] * 2, size[1] * 2) if base == "flux2" else size
    settings = {"width": size[0], "height": size[1], "batch": 2, "stochasticity": 0.7}
    both = latent_of(server, graph(base, **settings))
    assert both.shape[0] == 2
    assert not near(both[:1], both[1:], 0.1)
    prompt = graph(base, **settings)
    prompt["one"] = node("LatentFromBatch", samples=["latent", 0], batch_index=1, length=1)
    prompt["sample"]["inputs"]["latent_image"] = ["one", 0]
    assert near(latent_of(server, prompt), both[1:], 1e-3)


@pytest.mark.parametrize("base", FILES)
@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_outside_of_a_mask_nothing_changes(server: Comfy, base: str, stochasticity: float) -> None:
    source = latent_of(server, graph(base, seed=9))
    side = 64
    prompt = graph(base, stochasticity=stochasticity)
    prompt.update(
        first={**graph(base, seed=9)["sample"]},
        keep=node("SolidMask", value=0.0, width=side, height=side),
        change=node("SolidMask", value=1.0, width=side // 2, height=side),
        mask=node(
            "MaskComposite",
            destination=["keep", 0],
            source=["change", 0],
            x=0,
            y=0,
            operation="add",
        ),
        masked=node("SetLatentNoiseMask", samples=["first", 0], mask=["mask", 0]),
    )
    prompt["sample"]["inputs"]["latent_image"] = ["masked", 0]
    result, half = latent_of(server, prompt), source.shape[-1] // 2
    assert near(result[..., half:], source[..., half:], 1e-5)
    assert (result[..., :half] - source[..., :half]).abs().mean() > 0.1


def test_differential_diffusion_makes_a_soft_mask_a_schedule(server: Comfy) -> None:
    """Its node turns the mask on or off by sigma; in the substeps, too."""
    source = latent_of(server, graph(seed=9))
    prompt = graph()
    prompt.update(
        first=graph(seed=9)["sample"],
        soft=node("SolidMask", value=0.5, width=64, height=64),
        change=node("SolidMask", value=0.5, width=32, height=64),
        mask=node(
            "MaskComposite",
            destination=["soft", 0],
            source=["change", 0],
            x=0,
            y=0,
            operation="subtract",
        ),
        masked=node("SetLatentNoiseMask", samples=["first", 0], mask=["mask", 0]),
    )
    prompt["sample"]["inputs"]["latent_image"] = ["masked", 0]
    blended = latent_of(server, prompt)
    strength = server.object_info()["DifferentialDiffusion"]["input"].get("optional", {})
    about = node("DifferentialDiffusion", **({"strength": 1.0} if "strength" in strength else {}))
    scheduled = latent_of(server, inserted(prompt, "soft steps", about, "sample"))
    assert near(scheduled[..., :4], source[..., :4], 1e-5)  # mask 0
    assert near(blended[..., :4], source[..., :4], 1e-5)
    assert not near(scheduled[..., 4:], blended[..., 4:], 0.05)


@pytest.mark.parametrize("base", FILES)
def test_image_to_image_keeps_more_the_less_is_denoised(server: Comfy, base: str) -> None:
    source, distances = latent_of(server, graph(base, seed=9)), []
    for denoise in (0.0, 0.2, 0.5, 0.9):
        prompt = graph(base, denoise=denoise)
        prompt["first"] = {**graph(base, seed=9)["sample"]}
        prompt["sample"]["inputs"]["latent_image"] = ["first", 0]
        distances.append((latent_of(server, prompt) - source).abs().mean().item())
    assert distances[0] == 0
    assert distances == sorted(distances)


def test_progress_previews_and_interruption_within_a_rollout(server: Comfy) -> None:
    result = server.run(graph(batch=2))
    assert [(step.value, step.max) for step in result.progress if step.node == "sample"][-1] == (
        4,
        4,
    )
    assert result.previews
    slow = server.submit(graph(width=1024, height=1024, substeps=4096, seed=77))
    server.wait_progress(slow)
    start = time.monotonic()
    server.interrupt()
    assert server.wait(slow, timeout=60).status == "interrupted"
    assert time.monotonic() - start < 10  # a step of 1,170 substeps takes minutes
    assert latent_of(server, graph()).isfinite().all()


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


# Guidance


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_guiders_find_the_positive_conditioning(server: Comfy, base: str) -> None:
    """Classifier-free guidance of scale 1, and one whose other branch is the same prompt, are the plain prediction; a scale of
    its own and a negative prompt change it, the same in every guider."""
    plain = latent_of(server, custom(graph(base)))
    both = {"positive": ["positive", 0], "negative": ["negative", 0]}
    assert near(
        latent_of(
            server,
            custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=1.0, **both)),
        ),
        plain,
    )
    same = {"positive": ["positive", 0], "negative": ["positive", 0]}
    assert near(
        latent_of(
            server,
            custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=3.0, **same)),
        ),
        plain,
    )
    cfg = latent_of(
        server, custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=3.0, **both))
    )
    assert not near(cfg, plain, 0.05)
    dual = {
        "cond1": ["positive", 0],
        "cond2": ["negative", 0],
        "negative": ["negative", 0],
        "style": "regular",
    }
    guider = node(
        "DualCFGGuider", model=["model", 0], cfg_conds=3.0, cfg_cond2_negative=1.0, **dual
    )
    assert near(latent_of(server, custom(graph(base), guider=guider)), cfg, 1e-3)


@pytest.mark.parametrize("base", ["flux", "qwen"])
def test_probabilistic_guidance(server: Comfy, base: str) -> None:
    guided = graph(base, guidance=0.3)
    with pytest.raises(PromptError, match=r"weight 0\.3 needs a negative conditioning"):
        server.run(guided)
    guided["sample"]["inputs"]["negative"] = ["negative", 0]
    latent = latent_of(server, guided)
    assert not near(latent, latent_of(server, graph(base)), 0.02)
    settings = {"orthogonal": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    both = {"positive": ["positive", 0], "negative": ["negative", 0]}
    guider = node("GMFlowGuider", model=["model", 0], scale=0.3, **settings, **both)
    assert near(latent_of(server, custom(graph(base), guider=guider)), latent)
    patched = custom(graph(base), guider=node("CFGGuider", model=["model", 0], cfg=0.3, **both))
    patched = inserted(patched, "guided", node("GMFlowProbabilisticGuidance", **settings), "guider")
    assert near(latent_of(server, patched), latent)


@pytest.mark.parametrize("base", ["flux", "flux2"])
def test_parts_of_a_prompt_fall_back_to_the_mean(server: Comfy, base: str) -> None:
    prompt = graph(base, width=128)
    half = {"width": 0.5, "height": 1.0, "y": 0.0, "strength": 1.0}
    prompt["left"] = node(
        "ConditioningSetAreaPercentage", conditioning=["positive", 0], x=0.0, **half
    )
    prompt["right"] = node(
        "ConditioningSetAreaPercentage", conditioning=["negative", 0], x=0.5, **half
    )
    prompt["both"] = node(
        "ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0]
    )
    prompt["sample"]["inputs"]["positive"] = ["both", 0]
    before = len(server.log())
    assert "2 positive conditionings" in server.run(prompt).texts["sample"]
    assert server.log()[before:].count("found 2 positive conditionings") == 1  # for 4 steps
    euler = {**prompt["sample"]["inputs"], "solver": "euler", "final_step_size": 0.5}
    mean = latent_of(server, {**prompt, "sample": node("GMFlowSampler", **euler)})
    assert near(latent_of(server, prompt), mean)


def test_predictions_for_windows_fall_back_to_the_mean(server: Comfy) -> None:
    if "ContextWindowsManual" not in server.object_info():
        pytest.skip("this ComfyUI has no context windows")
    about = server.object_info()["ContextWindowsManual"]["input"]["required"]
    defaults = {}
    for key, (kind, *options) in about.items():
        settings = options[0] if options else {}
        choices = kind if isinstance(kind, list) else settings.get("options")
        default = settings.get("default", choices[0] if choices else None)
        defaults |= {} if default is None else {key: default}
    windows = node(
        "ContextWindowsManual", **{**defaults, "context_length": 8, "context_overlap": 2, "dim": 2}
    )
    prompt = inserted(graph(width=64, height=128), "windows", windows, "sample")
    assert "parts of the latent (context windows" in server.run(prompt).texts["sample"]
    assert latent_of(server, prompt).isfinite().all()


# Settings


def test_settings_that_do_not_fit_the_adapter_are_said(server: Comfy) -> None:
    fitting = "4 steps, shift 3.2, temperature 0.3, 32 substeps"
    assert server.run(graph(seed=3)).texts["sample"] == fitting
    prompt = graph(seed=3)
    prompt["distilled"] = node("FluxGuidance", conditioning=["positive", 0], guidance=3.5)
    prompt["sample"]["inputs"]["positive"] = ["distilled", 0]
    assert server.run(prompt).texts["sample"] == fitting
    prompt["distilled"]["inputs"]["guidance"] = 2.0
    said = "made with a guidance of 3.5, and the conditioning asks for 2"
    assert said in server.run(prompt).texts["sample"]
    assert "made for 4 steps or more" in server.run(graph(steps=3)).texts["sample"]
    assert server.run(graph(steps=3, denoise=0.7)).texts["sample"].startswith("3 steps, ")
    prompt = graph(steps=4)
    prompt["model"]["inputs"]["adapter_name"] = "gmflux_k8_piid_8step.safetensors"
    assert "made for 8 steps or more" in server.run(prompt).texts["sample"]
    prompt["sample"]["inputs"]["steps"] = 8
    assert server.run(prompt).texts["sample"].startswith("8 steps, ")
    prompt["base"]["inputs"]["unet_name"] = "flux1-schnell.safetensors"
    assert "no guidance embedding" in server.run(prompt).texts["model"]


def test_guidance_on_a_distilled_model_is_said(server: Comfy) -> None:
    both = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    said = "has its guidance built in"
    assert (
        said
        in server.run(custom(graph(seed=3), guider=node("CFGGuider", cfg=3.0, **both))).texts[
            "sample"
        ]
    )
    assert (
        said
        not in server.run(custom(graph(seed=3), guider=node("CFGGuider", cfg=1.0, **both))).texts[
            "sample"
        ]
    )
    assert (
        said
        not in server.run(
            custom(graph("qwen", seed=3), guider=node("CFGGuider", cfg=3.0, **both))
        ).texts["sample"]
    )
    disabled = graph(seed=3)
    disabled["none"] = node("FluxDisableGuidance", conditioning=["positive", 0])
    disabled["sample"]["inputs"]["positive"] = ["none", 0]
    assert "asks for none at all" in server.run(disabled).texts["sample"]


def test_stock_samplers_say_it_too_and_take_it_back(server: Comfy) -> None:
    prompt = stock({**graph(), "text": graph()["positive"]})
    prompt["positive"] = node("FluxGuidance", conditioning=["text", 0], guidance=2.0)
    assert "made with a guidance of 3.5" in server.run(prompt).texts["sample"]
    prompt["positive"]["inputs"]["guidance"] = 3.5
    assert server.run(prompt).texts["sample"] == " "
    prompt["sample"]["inputs"]["seed"] = 5
    assert "sample" not in server.run(prompt).texts


def test_the_shift_is_the_models_own(server: Comfy) -> None:
    latent = latent_of(server, graph())
    assert near(latent_of(server, graph(shift=3.2)), latent)
    assert not near(latent_of(server, graph(shift=1.0)), latent, 0.02)
    flux = {"max_shift": 1.0, "base_shift": 1.0, "width": 1024, "height": 1024}  # of the logarithm
    other = inserted(graph(), "shift", node("ModelSamplingFlux", **flux), "sample")
    assert "shift 2.72," in server.run(other).texts["sample"]
    assert near(latent_of(server, other), latent_of(server, graph(shift=2.718281828)))


# What does not fit


def edited(server: Comfy, name: str, source: str, **changes: Tensor | None) -> str:
    """An adapter's file with tensors replaced, or removed where None."""
    folder = server.base / "models" / "loras"
    tensors = {
        key: tensor
        for key, tensor in {**load_file(folder / source), **changes}.items()
        if tensor is not None
    }
    save_file(tensors, folder / name)
    server.object_info()
    return name


LORA = "single_transformer_blocks.1.proj_mlp.lora_B.weight"


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
            r"1 of its 14 LoRA modules do not apply: .*proj_mlp: \(7, 4\) times \(4, 256\)",
        ),
        (
            "extra",
            {"attn9.lora_A.weight": torch.zeros(4, 2), "attn9.lora_B.weight": torch.zeros(2, 4)},
            "attn9: not in this model",
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
        ('{"type": "Flow3"}', "this version knows GMFlow and DX"),
        ('{"type": "DX", "segment_size": 0.25}', "without shift"),
        ('{"type": "DX", "segment_size": "0.25", "shift": 3.2}', "segment_size '0.25'"),
        ('{"type": "GMFlow", "shift": 0}', r"whose shift is no number from 0\.01 to 100"),
        (None, r"head of a DX policy \(proj_out\) but no policy_config"),
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


def test_unreadable_files_and_names_without_steps(server: Comfy) -> None:
    loras, prompt = server.base / "models" / "loras", graph()
    (loras / "short_4step.safetensors").write_bytes((loras / ADAPTERS["flux"]).read_bytes()[:5000])
    write_adapter(loras / "diffusion_pytorch_model.safetensors")
    server.object_info()
    prompt["model"]["inputs"]["adapter_name"] = "short_4step.safetensors"
    with pytest.raises(PromptError, match=r"short_4step\.safetensors cannot be read"):
        server.run(prompt)
    prompt["model"]["inputs"]["adapter_name"] = "diffusion_pytorch_model.safetensors"
    assert "does not say how many steps" in server.run(prompt).texts["model"]
    del prompt["sample"]["inputs"]["positive"]
    with pytest.raises(PromptError, match=r"conditioned on text; connect a prompt .* to positive"):
        server.run(prompt)


def test_wrong_pairings_are_refused(server: Comfy) -> None:
    cases = (
        ("flux", "qwen", "does not fit this FLUX.1 model: it looks like an adapter for Qwen-Image"),
        ("qwen", "flux", "does not fit this Qwen-Image model: it looks like an adapter for FLUX.1"),
        ("flux2", "flux", "tensors do not fit a base model of width"),
    )
    for base, other, complaint in cases if EMPTY["flux2"] in server.object_info() else cases[:2]:
        prompt = graph(base)
        prompt["model"]["inputs"]["adapter_name"] = ADAPTERS[other]
        with pytest.raises(PromptError, match=re.escape(complaint)):
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
        PromptError, match=r"is for FLUX\.1, Qwen-Image, FLUX\.2, and this model is a GMModel"
    ):
        server.run(digits)
    plain = graph()
    plain["sample"]["inputs"]["model"] = ["base", 0]
    with pytest.raises(PromptError, match="put 'GM Adapter' on a base model"):
        server.run(plain)


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
    assert "holds a head but no LoRA" in result.texts["model"]
