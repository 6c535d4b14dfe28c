"""Pictures that go into a model with a GM adapter: references, masks, image to image, batches."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter_prompts import (
    EMPTY,
    FILES,
    custom,
    graph,
    inserted,
    near,
    serve,
    skip_unknown_base,
)
from .bases import write_flux, write_flux2, write_qwen_image
from .client import Comfy
from .graphs import latent_of, node

TIME_ZERO = "index_timestep_zero"
REFERENCES = {
    "flux": ["offset", "index"],
    "qwen": ["index", TIME_ZERO],
    "flux2": ["index", TIME_ZERO],
}
WRITERS = {"flux": write_flux, "qwen": write_qwen_image, "flux2": write_flux2}


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


@pytest.fixture(autouse=True)
def known_to_this_comfyui(request: pytest.FixtureRequest, server: Comfy) -> None:
    skip_unknown_base(request, server)


def skip_without_references(server: Comfy) -> None:
    if not server.object_info("FluxKontextMultiReferenceLatentMethod"):
        pytest.skip("this ComfyUI has no methods for reference latents")


def with_reference(prompt: dict, base: str, method: str) -> dict:
    """Return the prompt with a reference picture in its conditioning "edit"."""
    first = graph(base, seed=9)["sample"]
    first["inputs"]["latent_image"] = ["small", 0]
    prompt = {
        **prompt,
        "small": node(EMPTY[base], width=48, height=80, batch_size=1),
        "first": first,
        "reference": node("ReferenceLatent", conditioning=["positive", 0], latent=["first", 0]),
        "edit": node(
            "FluxKontextMultiReferenceLatentMethod",
            conditioning=["reference", 0],
            reference_latents_method=method,
        ),
    }
    if "positive" in prompt["sample"]["inputs"]:
        prompt["sample"]["inputs"]["positive"] = ["edit", 0]
    return prompt


@pytest.mark.parametrize(
    ("base", "method"),
    [(base, method) for base, methods in REFERENCES.items() for method in methods],
)
def test_reference_images_are_no_part_of_the_mixture(server: Comfy, base: str, method: str) -> None:
    """Kontext and Qwen-Image-Edit put further tokens behind the image's.

    With some methods these have an embedding of their own.
    """
    skip_without_references(server)
    prompt = with_reference(graph(base, stochasticity=0.5), base, method)
    latent, plain = latent_of(server, prompt), latent_of(server, graph(base, stochasticity=0.5))
    assert latent.isfinite().all()
    assert latent.shape == plain.shape
    assert not near(latent, plain, 0.01)


def head_of_the_base(weights: dict[str, Tensor], base: str) -> dict[str, Tensor]:
    """Return a head of one component that computes what the base's own last layer does."""
    if base == "qwen":
        norm = {key: weights[f"norm_out.linear.{key}"] for key in ("weight", "bias")}
        means = {key: weights[f"proj_out.{key}"] for key in ("weight", "bias")}
    else:
        parts = {"norm": "final_layer.adaLN_modulation.1.", "means": "final_layer.linear."}
        norm, means = (
            {key.removeprefix(part): w for key, w in weights.items() if key.startswith(part)}
            for part in parts.values()
        )
        # FLUX has shift before scale, heads have scale before shift
        norm = {key: torch.cat(w.chunk(2)[::-1]) for key, w in norm.items()}
        means = {"bias": torch.zeros(len(means["weight"])), **means}
    width = means["weight"].shape[1]
    return {
        **{f"norm_out.linear.{key}": w for key, w in norm.items()},
        **{f"proj_out_means.{key}": w for key, w in means.items()},
        "proj_out_logweights.weight": torch.zeros(4, width),
        "proj_out_logweights.bias": torch.zeros(4),
        "proj_out_logstds.1.weight": torch.zeros(8, width),
        "proj_out_logstds.1.bias": torch.zeros(8),
        "proj_out_logstds.3.weight": torch.zeros(1, 8),
        "proj_out_logstds.3.bias": torch.zeros(1),
    }


@pytest.mark.parametrize("base", FILES)
def test_a_head_of_the_bases_own_layer_is_the_base(server: Comfy, base: str) -> None:
    """Compare mean velocities; the image's embedding counts, not the reference's."""
    skip_without_references(server)
    models, name = server.base / "models", f"exact_{FILES[base]}"
    WRITERS[base](models / "diffusion_models" / name, dtype=torch.float32)
    weights = load_file(models / "diffusion_models" / name)
    head = {key: w.contiguous() for key, w in head_of_the_base(weights, base).items()}
    save_file(head, models / "loras" / f"exact_{base}_4step.safetensors")
    server.object_info()
    euler = node("KSamplerSelect", sampler_name="euler")
    prompt = with_reference(custom(graph(base), euler), base, REFERENCES[base][-1])
    prompt["base"]["inputs"]["unet_name"] = name
    prompt["model"]["inputs"]["adapter_name"] = f"exact_{base}_4step.safetensors"
    prompt["guider"]["inputs"]["conditioning"] = ["edit", 0]
    adapted = latent_of(server, prompt)
    prompt["guider"]["inputs"]["model"] = ["base", 0]
    assert near(adapted, latent_of(server, prompt))


@pytest.mark.parametrize("base", FILES)
@pytest.mark.parametrize("size", [(64, 64), (104, 72)])
def test_an_image_of_a_batch_is_the_one_of_its_own_index(
    server: Comfy, base: str, size: tuple[int, int]
) -> None:
    """Every step adds noise; the second size is an odd number of latent pixels."""
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
    """Its node switches the mask by sigma, in the substeps too."""
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
    kind = "DifferentialDiffusion"
    strength = server.object_info(kind)[kind]["input"].get("optional", {})
    about = node(kind, **({"strength": 1.0} if "strength" in strength else {}))
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
