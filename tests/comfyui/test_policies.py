"""Adapters of every policy on tiny bases, and what their files say about steps and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core import AdapterFacts
from gmflow_core.files.adapter_metadata import set_adapter_facts

from .adapter_prompts import ADAPTERS, custom, graph, near, serve, stock
from .adapters import write_adapter
from .bases import random_weights, write_flux2
from .client import Comfy, PromptError
from .graphs import latent_of, node

BASES = ("flux", "qwen")
FACTS = AdapterFacts("FLUX.1", 3, 2.0, 0.7, 2.5, 0.6)
PLAIN = node("KSamplerSelect", sampler_name="euler")


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    for base in BASES:
        write_adapter(loras(comfy) / f"arcflow-{base}-2steps.sft", base, policy="ArcFlow", K=16)
        write_adapter(loras(comfy) / f"dx{base}_p10_4step.sft", base, policy="polynomial")
    yield from serve(comfy)


def loras(comfy: Comfy) -> Path:
    """Return the folder of adapters."""
    return comfy.base / "models" / "loras"


def with_file(server: Comfy, name: str, prompt: dict) -> dict:
    """Return the prompt with another adapter's file."""
    server.object_info()  # ComfyUI looks for new files
    changed = {**prompt["model"]["inputs"], "adapter_name": name}
    return {**prompt, "model": {**prompt["model"], "inputs": changed}}


def left_alone(base: str = "flux", **sampler) -> dict:
    """Return a prompt with GM Sampler as it comes: auto, 0 steps, 0 substeps."""
    return graph(base, steps=0, solver="auto", substeps=0, **sampler)


def told(server: Comfy, name: str, **inputs) -> list[str]:
    """Return the lines of GM Adapter Info about a file."""
    server.object_info()
    prompt = {**graph(), "info": node("GMFlowAdapterInfo", adapter_name=name, **inputs)}
    return server.run(prompt).outputs["info"]["text"][0].splitlines()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("name", "steps", "last"), [("arcflow-{}-2steps.sft", 2, 1.0), ("dx{}_p10_4step.sft", 4, 0.5)]
)
def test_the_sampler_takes_the_adapters_own_schedule(
    server: Comfy, base: str, name: str, steps: int, last: float
) -> None:
    prompt = with_file(server, name.format(base), left_alone(base))
    result = server.run(prompt)
    substeps = "" if steps == 2 else ", 128 substeps"
    assert result.texts["sample"] == f"gm-policy: {steps} steps, shift 3.2{substeps}"  # no warning
    kind = "ArcFlow policy, K = 16" if steps == 2 else "DX policy, 10 coefficients"
    assert f"{kind}, {steps} steps or more" in result.texts["model"]
    latent = latent_of(server, prompt)
    assert latent.isfinite().all()
    assert latent.std() > 0.5
    sampler = node("GMFlowPolicySampler", substeps=128, temperature=0.0, stochasticity=0.0)
    own = custom(prompt, sampler, steps=steps, final_step_size=0.0)
    assert torch.equal(latent, latent_of(server, own))
    given = custom(prompt, sampler, steps=steps, final_step_size=last)
    assert torch.equal(latent, latent_of(server, given))
    mean = latent_of(server, custom(prompt, PLAIN, steps=steps, final_step_size=last))
    assert not near(latent, mean, 0.02)
    euler = {"solver": "euler", "steps": steps, "final_step_size": last}
    prompt["sample"]["inputs"].update(euler)
    assert near(mean, latent_of(server, prompt))
    assert latent_of(server, stock(prompt, sampler_name="dpmpp_2m")).isfinite().all()


def test_without_rates_arcflow_is_an_euler_step(server: Comfy) -> None:
    tensors = load_file(loras(server) / "arcflow-flux-2steps.sft")
    for key in tensors:
        if key.startswith("proj_out_loggamma."):
            tensors[key].zero_()
    save_file(tensors, loras(server) / "flat-2steps.sft")  # known by its tensors' names
    prompt = with_file(server, "flat-2steps.sft", left_alone())
    assert "ArcFlow policy" in server.run(prompt).texts["model"]
    settings = {"steps": 2, "final_step_size": 1.0}
    assert near(latent_of(server, prompt), latent_of(server, custom(prompt, PLAIN, **settings)))


def test_a_polynomial_of_one_coefficient_is_an_euler_step(server: Comfy) -> None:
    write_adapter(loras(server) / "dxflux_p1_4step.sft", policy="polynomial", grid=1)
    prompt = with_file(server, "dxflux_p1_4step.sft", left_alone())
    settings = {"steps": 4, "final_step_size": 0.5}
    assert near(latent_of(server, prompt), latent_of(server, custom(prompt, PLAIN, **settings)))


@pytest.mark.parametrize("stochasticity", [0.0, 0.5])
def test_arcflow_in_batches_masks_and_with_a_negative_prompt(
    server: Comfy, stochasticity: float
) -> None:
    name, settings = "arcflow-qwen-2steps.sft", {"stochasticity": stochasticity}
    prompt = with_file(server, name, left_alone("qwen", batch=2, width=80, **settings))
    two = latent_of(server, prompt)
    one = latent_of(server, with_file(server, name, left_alone("qwen", width=80, **settings)))
    assert near(two[:1], one)
    prompt["guider"] = node(
        "CFGGuider",
        **{"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]},
        cfg=3.0,
    )
    guided = custom(prompt, guider=prompt["guider"], steps=2, final_step_size=0.0)
    guided["sampler"]["inputs"]["stochasticity"] = stochasticity
    assert not near(latent_of(server, guided), two, 0.02)
    prompt["mask"] = node("SolidMask", value=0.0, width=80, height=64)
    prompt["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
    prompt["sample"]["inputs"]["latent_image"] = ["masked", 0]
    kept = latent_of(server, prompt)  # the empty latent
    assert (kept - kept[..., :1, :1]).abs().max() < 1e-5


def test_solvers_of_mixtures_refuse_arcflow(server: Comfy) -> None:
    prompt = with_file(server, "arcflow-flux-2steps.sft", graph(solver="gm-ode"))
    with pytest.raises(PromptError, match=r"arcflow-flux-2steps.* has an ArcFlow policy; use gm-p"):
        server.run(prompt)
    prompt["sample"]["inputs"].update(solver="gm-policy", steps=2, temperature=0.5)
    said = server.run(prompt).texts["sample"]
    assert "no effect: substeps and temperature, as arcflow-flux-2steps" in said


def test_infinite_stochasticity_starts_every_step_from_fresh_noise(server: Comfy) -> None:
    """100 stands for infinity, which 10 is as good as in float32, and which 1 is not."""
    most, high = (latent_of(server, graph(stochasticity=value)) for value in (100.0, 10.0))
    assert near(most, high)
    assert not near(most, latent_of(server, graph(stochasticity=1.0)), 0.02)
    errors = server.run(graph(stochasticity=101.0), expect_error=True).errors
    assert "stochasticity" in str(errors)


def test_what_the_file_says_comes_before_its_name(server: Comfy) -> None:
    """The name says 4 steps; the file says 3, shift 2, last step 0.7, guidance 2.5."""
    name = "stated_4step.safetensors"
    set_adapter_facts(loras(server) / ADAPTERS["flux"], FACTS, loras(server) / name)
    prompt = with_file(server, name, left_alone())
    result = server.run(prompt)
    assert "3 steps or more" in result.texts["model"]
    said = result.texts["sample"]
    assert "gm-policy: 3 steps, shift 2, temperature 0.6, " in said
    assert "made with a guidance of 2.5" in said  # the conditioning has 3.5
    assert "too long" not in said
    by_hand = {"steps": 3, "shift": 2.0, "final_step_size": 0.7, "temperature": 0.6}
    expected = latent_of(server, graph(substeps=0, **by_hand))  # the published file
    assert torch.equal(latent_of(server, prompt), expected)
    lines = told(server, name, model=["base", 0])
    for line in (
        *("steps: 3 or more", "last step: 0.7 of the others", "shift: 2", "temperature: 0.6"),
        *("base model: FLUX.1", "guidance: 2.5 only", "connected model: it fits (FLUX.1)"),
        "stated in the file: base, steps, shift, final_step_size, guidance, temperature",
    ):
        assert line in lines, lines


def test_the_info_of_every_policy(server: Comfy) -> None:
    without = "(no mixture: for gm-policy and stock samplers)"
    arc = told(server, "arcflow-qwen-2steps.sft")
    assert f"policy: ArcFlow, K = 16 velocities for each latent pixel {without}" in arc
    assert {"base model: Qwen-Image", "steps: 2 or more", "shift: 3.2"} <= set(arc)
    assert {"last step: as long as the others", "stated in the file: its policy only"} <= set(arc)
    polynomial = told(server, "dxflux_p10_4step.sft")
    assert f"policy: DX, 10 coefficients {without}" in polynomial
    assert "last step: 0.5 of the others" in polynomial


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"gmflow.steps": "many"}, r"says gmflow\.steps = 'many' .* a whole number from 1 to 1000"),
        ({"gmflow.shift": "1e9"}, r"gmflow\.shift = '1e9'"),
        ({"gmflow.policy": "DX"}, r"gmflow\.policy = DX, as its policy_config .* of GMFlow"),
        ({"gmflow.base": "qwen-image"}, r"is for Qwen-Image .* this model is FLUX\.1"),
    ],
)
def test_bad_facts_are_quoted(server: Comfy, metadata: dict, complaint: str) -> None:
    metadata = {"policy_config": '{"type": "GMFlow"}', **metadata}
    write_adapter(loras(server) / "wrong_4step.safetensors", metadata=metadata)
    with pytest.raises(PromptError, match=f"wrong_4step.*{complaint}"):
        server.run(with_file(server, "wrong_4step.safetensors", graph()))


def test_a_base_that_is_not_known_counts_as_none(server: Comfy) -> None:
    metadata = {"policy_config": '{"type": "GMFlow"}', "gmflow.base": "FLUX.9"}
    write_adapter(loras(server) / "later_4step.safetensors", metadata=metadata)
    prompt = with_file(server, "later_4step.safetensors", graph())
    assert near(latent_of(server, prompt), latent_of(server, graph()))
    assert "base model: FLUX.9" in told(server, "later_4step.safetensors")


FLUX2 = {  # LoRA layers by the names that upstream maps, and where they belong in FLUX.2
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "transformer_blocks.0.attn.to_q": "double_blocks.0.img_attn.qkv",
    "transformer_blocks.0.attn.add_v_proj": "double_blocks.0.txt_attn.qkv",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn.proj",
    "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
    "transformer_blocks.0.ff.linear_out": "double_blocks.0.img_mlp.2",
    "transformer_blocks.0.ff_context.linear_in": "double_blocks.0.txt_mlp.0",
    "transformer_blocks.0.ff_context.linear_out": "double_blocks.0.txt_mlp.2",
    "single_transformer_blocks.1.attn.to_qkv_mlp_proj": "single_blocks.1.linear1",
    "single_transformer_blocks.1.attn.to_out": "single_blocks.1.linear2",
}
THIRDS = {"attn.to_q": 0, "attn.add_v_proj": 2}  # of layers that hold three


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_every_lora_layer_of_flux2_finds_its_place(server: Comfy, prefix: str) -> None:
    """The adapter's LoRA equals the same products added to the base's weights by hand."""
    skip_unknown_base_of(server)
    folder, models = loras(server), server.base / "models" / "diffusion_models"
    write_flux2(models / "plain-flux2.safetensors", dtype=torch.float32)
    base, head = load_file(models / "plain-flux2.safetensors"), {}
    for name, tensor in load_file(folder / ADAPTERS["flux2"]).items():
        if "lora" not in name:
            head[name] = tensor
    pairs = {}
    for index, (theirs, ours) in enumerate(FLUX2.items()):
        weight = base[f"{ours}.weight"]
        rows = weight  # a view
        for ending, third in THIRDS.items():
            if theirs.endswith(ending):
                rows = weight.chunk(3)[third]
        shapes = {"A": (4, weight.shape[1]), "B": (len(rows), 4)}
        drawn = random_weights(shapes, 50 + index, torch.float32)
        pairs |= {f"{prefix}{theirs}.lora_{side}.weight": drawn[side] for side in "AB"}
        rows += drawn["B"] @ drawn["A"]
    save_file({**head, **pairs}, folder / "all_4step.safetensors")
    save_file(head, folder / "head_4step.safetensors")
    save_file(base, models / "merged-flux2.safetensors")
    lora = with_file(server, "all_4step.safetensors", graph("flux2"))
    lora["base"]["inputs"]["unet_name"] = "plain-flux2.safetensors"
    merged = with_file(server, "head_4step.safetensors", graph("flux2"))
    merged["base"]["inputs"]["unet_name"] = "merged-flux2.safetensors"
    assert f"{len(FLUX2)} LoRA pairs" in server.run(lora).texts["model"]
    latent = latent_of(server, lora)
    assert near(latent, latent_of(server, merged), 1e-3)
    without = with_file(server, "head_4step.safetensors", lora)
    assert not near(latent, latent_of(server, without), 0.05)


def skip_unknown_base_of(server: Comfy) -> None:
    """Skip a test of FLUX.2 if this ComfyUI does not know it."""
    if not server.object_info("EmptyFlux2LatentImage"):
        pytest.skip("this ComfyUI does not know FLUX.2")
