"""The scheduler and the adapters for diffusers, on tiny random pipelines.

What a pipeline makes is compared with the solvers of gmflow_core on the same transformer, run by
hand on images. Text embeddings are given, so that no text encoder is needed.
"""

import copy
import importlib
import math
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gmflow_core import AdapterFacts, denoiser_of, flow_sigmas, predict_x0
from gmflow_core.files.adapter_file import split_tensors
from gmflow_core.files.adapter_metadata import set_adapter_facts
from gmflow_core.models.adapter_heads import DXHead, HeadLayout, build_head
from gmflow_core.sampling.solvers import solve
from tests.comfyui.adapters import POLICIES, write_adapter
from tests.helpers import normal

HIDDEN, TEXT, BATCH = 32, 12, 2  # width, that of the text, images
SIZE = (4, 6)  # of the latents
TOKENS = SIZE[0] * SIZE[1] // 4
BLOCKS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
CLASSES = {
    "flux": ("FluxTransformer2DModel", "FluxPipeline"),
    "qwen": ("QwenImageTransformer2DModel", "QwenImagePipeline"),
    "flux2": ("Flux2Transformer2DModel", "Flux2Pipeline"),
}
ROPE = {"axes_dims_rope": (4, 6, 6), "joint_attention_dim": TEXT}
SETTINGS = {
    "flux": {"num_single_layers": 2, "pooled_projection_dim": 8, "guidance_embeds": True},
    "qwen": {},
    "flux2": {"num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)},
}
USUAL = {"shift": 3.0, "use_dynamic_shifting": True}
SCHEDULES = {  # of the published pipelines, as far as they matter
    "qwen": {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9},
}


@pytest.fixture(autouse=True, scope="module")
def imported():
    """Import what takes seconds on the worker that runs these tests only."""
    global diffusers, BASES, GMFlowScheduler, Offer, load_gm_adapter
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")  # the pipelines import it
    from gmflow_core.diffusers import GMFlowScheduler, load_gm_adapter
    from gmflow_core.diffusers.adapter import BASES
    from gmflow_core.diffusers.scheduler import Offer


@dataclass
class Tiny:
    """A tiny random pipeline, and what it is called with."""

    pipeline: object
    text: dict  # arguments of the pipeline about the text
    noise: torch.Tensor  # initial tokens, (B, N, C p^2)
    given: dict  # arguments of the transformer but its tokens and sigma
    layout: HeadLayout

    def __call__(self, steps=4, **settings):
        """Return the tokens that the pipeline makes."""
        latents = self.noise
        if self.layout.folded > 1:  # this pipeline packs the given latents itself
            latents = latents.transpose(1, 2).unflatten(2, (SIZE[0] // 2, SIZE[1] // 2))
        arguments = {"height": 8 * SIZE[0], "width": 8 * SIZE[1], "output_type": "latent"}
        return self.pipeline(
            **self.text, **arguments, latents=latents, num_inference_steps=steps, **settings
        ).images

    def velocity(self, tokens, sigma, transformer=None, **others):
        """Return the transformer's velocity tokens for (B, N, C p^2) and (B,)."""
        transformer = transformer or self.pipeline.transformer
        arguments = {**self.given, **others, "return_dict": False}
        return transformer(hidden_states=tokens, timestep=sigma, **arguments)[0]

    def to_image(self, tokens):
        """Arrange tokens as latents (B, C, H, W), by torch's own pixel_shuffle."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, [s // 2 for s in SIZE]), 2)

    def to_tokens(self, image):
        """Invert `to_image`."""
        return F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)


def tiny(base, seed=0):
    """Return a `Tiny` of FLUX.1, Qwen-Image or FLUX.2."""
    torch.manual_seed(seed)
    names = CLASSES[base]
    settings = {**BLOCKS, **ROPE, **SETTINGS[base]}
    transformer = getattr(diffusers, names[0])(**settings).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(0, 0.15)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULES.get(base, USUAL))
    parts = ["vae", "text_encoder", "tokenizer"]
    parts += ["text_encoder_2", "tokenizer_2"] if base == "flux" else []
    pipeline = getattr(diffusers, names[1])(
        scheduler=scheduler, transformer=transformer, **dict.fromkeys(parts)
    )
    pipeline.set_progress_bar_config(disable=True)
    layout, words = BASES[names[0]].layout, normal(BATCH, 3, TEXT, seed=1)
    noise = normal(BATCH, TOKENS, layout.width, seed=2)
    text, given = {"prompt_embeds": words}, {"encoder_hidden_states": words}
    grid = torch.cartesian_prod(torch.arange(SIZE[0] // 2), torch.arange(SIZE[1] // 2))
    guidance = 3.5 if base == "flux" else 4.0
    if base != "qwen":
        given["guidance"] = torch.full((BATCH,), guidance)
        given |= {"txt_ids": torch.zeros(3, 3), "img_ids": F.pad(grid, (1, 0)).float()}
    if base == "flux":
        text["pooled_prompt_embeds"] = given["pooled_projections"] = normal(BATCH, 8, seed=3)
    if base == "qwen":
        given["img_shapes"] = [[(1, SIZE[0] // 2, SIZE[1] // 2)]] * BATCH
    if base == "flux2":
        position = F.pad(torch.arange(3)[:, None], (3, 0))
        given |= {"txt_ids": position, "img_ids": F.pad(given["img_ids"], (0, 1))}
    return Tiny(pipeline, text, noise, given, layout)


def close(found, expected):
    """Check that tokens are equal but for rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Ordinary models


def test_one_euler_substep_is_the_stock_scheduler():
    flux = tiny("flux")
    expected = flux()
    config = flux.pipeline.scheduler.config
    flux.pipeline.scheduler = GMFlowScheduler.from_config(config, solver_order=1, substeps=1)
    close(flux(), expected)
    own = [1.0, 0.8, 0.3]  # times of the caller's own stay
    found = flux(3, sigmas=own)
    flux.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    close(found, flux(3, sigmas=own))


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"solver": "gm-ode", "spread": 0.8}, {}),
        ({"solver": "gm-ode", "time_shift_type": "linear"}, {}),
        ({"solver": "gm-ode", "solver_order": 1, "substeps": 3, "final_step_size": 0.5}, {}),
        ({"solver": "gm-sde", "seed": 5}, {"noise": 5}),
        ({"solver": "gm-policy", "stochasticity": 0.5, "seed": 6}, {"noise": 6}),
        ({"solver": "gm-policy", "temperature": 0.4, "substeps": 20, "shift": 2.0}, {}),
    ],
)
def test_an_ordinary_model_is_sampled_as_by_the_solvers(settings, extra):
    flux = tiny("flux")
    dynamic = "shift" not in settings
    config = dict(flux.pipeline.scheduler.config) | {"use_dynamic_shifting": dynamic}
    flux.pipeline.scheduler = GMFlowScheduler.from_config(config, **settings)
    found = flux()
    assert torch.equal(flux(), found)  # each run starts anew, its noise too

    mu = 0.5 + (1.15 - 0.5) * (TOKENS - 256) / (4096 - 256)  # of FLUX, by the number of tokens
    shift = mu if settings.pop("time_shift_type", "") == "linear" else math.exp(mu)
    by_hand = {"order": settings.pop("solver_order", 2), "shift": shift} | settings
    by_hand |= {key: torch.Generator().manual_seed(seed) for key, seed in extra.items()}
    by_hand.pop("seed", None)
    spread = by_hand.pop("spread", 0.5)
    last = by_hand.pop("final_step_size", 1.0)
    sigmas = flow_sigmas(4, by_hand["shift"], final_step_size=last)
    denoiser = denoiser_of(flux.velocity, spread=spread)
    close(found, solve(denoiser=denoiser, x=flux.noise, sigmas=sigmas, **by_hand))


def test_a_stage_counts_its_own_steps_for_its_temperature():
    scheduler, x = GMFlowScheduler(solver="gm-policy"), normal(BATCH, 4, 3)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(4)  # as pipelines of image to image do
    expected = solve("gm-policy", denoiser_of(lambda x, _: x, spread=0.5), x, flow_sigmas(8)[4:])
    for time in scheduler.timesteps[4:]:
        x = scheduler.step(x, time, x).prev_sample
    close(x, expected)


def test_settings_outlive_a_saved_pipeline(tmp_path):
    flux = tiny("flux")
    config = flux.pipeline.scheduler.config
    settings = {"solver": "gm-policy", "temperature": 0.5, "stochasticity": math.inf, "seed": 3}
    flux.pipeline.scheduler = GMFlowScheduler.from_config(config, **settings)
    expected = flux()
    flux.pipeline.save_pretrained(tmp_path)
    absent = [name for name, part in flux.pipeline.components.items() if part is None]
    flux.pipeline = type(flux.pipeline).from_pretrained(tmp_path, **dict.fromkeys(absent))
    assert torch.equal(flux(), expected)


def test_settings_out_of_range_are_refused():
    for wrong, words in (
        ({"solver": "euler"}, "solver is 'euler'"),
        ({"solver_order": 3}, "solver_order is 3"),
        ({"solver": "gm-policy", "temperature": 2.0}, "temperature 2.0"),
        ({"final_step_size": 0.0}, "final_step_size is 0.0"),
        ({"spread": -1.0}, "spread is -1.0"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"policy": "DX"}, "gm-ode needs a mixture"),
    ):
        with pytest.raises(ValueError, match=words):
            GMFlowScheduler(**wrong)


def test_a_pipeline_of_images_with_guidance():
    """Stable Diffusion 3: latents (B, C, H, W), times left to the scheduler, guided velocities."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": TEXT}
    sizes |= {"caption_projection_dim": HIDDEN, "pooled_projection_dim": 8, **BLOCKS}
    transformer = diffusers.SD3Transformer2DModel(**sizes).eval().requires_grad_(False)
    texts = ("text_encoder", "tokenizer")
    parts = [f"{part}{which}" for part in texts for which in ("", "_2", "_3")]
    scheduler = GMFlowScheduler(shift=3.0, solver="gm-ode", spread=0.7)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(parts)
    )
    pipeline.set_progress_bar_config(disable=True)
    words, pooled, x = normal(2, 3, TEXT), normal(2, 8), normal(1, 4, 8, 8)
    texts = {"prompt_embeds": words[1:], "negative_prompt_embeds": words[:1]}
    texts |= {"pooled_prompt_embeds": pooled[1:], "negative_pooled_prompt_embeds": pooled[:1]}
    settings = {"guidance_scale": 2.0, "height": 64, "width": 64, "output_type": "latent"}
    found = pipeline(**texts, **settings, latents=x, num_inference_steps=4).images

    def velocity(x, sigma):
        both = transformer(torch.cat([x, x]), words, pooled, 1000 * torch.cat([sigma, sigma]))
        negative, positive = both.sample.chunk(2)
        return negative + 2.0 * (positive - negative)

    denoiser = denoiser_of(velocity, spread=0.7)
    close(found, solve("gm-ode", denoiser, x, flow_sigmas(4, 3.0), order=2, shift=3.0))


# Adapters


def adapter_file(tmp_path, kind, policy="GM", folder="gmflux_k8_piid_4step", **facts):
    """Write a random adapter for a base of that kind, with facts in its metadata."""
    path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir(exist_ok=True)
    settings = {"hidden": HIDDEN, "K": 3, "logstd_inner": 8, "grid": 4, "dtype": torch.float32}
    write_adapter(path, kind, policy=policy, **settings)
    set_adapter_facts(path, AdapterFacts(**facts))
    return path


def denoiser_by_hand(model, path, policy, as_image=True, strength=1.0):
    """Return a denoiser of images (B, C, H, W), or of tokens (B, C, N, p^2), from a file.

    The LoRA is merged into the weights of a copy, and the head runs behind it.
    """
    to_tokens = model.to_tokens if as_image else model.layout.to_tokens
    transformer = copy.deepcopy(model.pipeline.transformer)
    head_tensors, lora = split_tensors(load_file(path))
    for name in {key.rpartition(".lora_")[0] for key in lora}:
        up, down = lora[f"{name}.lora_B.weight"], lora[f"{name}.lora_A.weight"]
        transformer.get_submodule(name).weight += strength * up @ down
    head = build_head(head_tensors, POLICIES[policy], model.layout, HIDDEN)
    seen = []
    transformer.norm_out.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs))

    def denoise(x, sigma, **others):
        model.velocity(to_tokens(x), sigma, transformer, **others)
        prediction = head(*seen.pop())
        return predict_x0(head.to_image(prediction, SIZE) if as_image else prediction, x, sigma)

    return denoise


@pytest.mark.parametrize(
    ("base", "policy", "settings"),
    [
        ("flux", "GM", {}),
        ("flux", "GM", {"solver": "gm-ode"}),
        ("flux", "ArcFlow", {"strength": 0.5}),
        ("qwen", "GM", {"stochasticity": 0.5, "seed": 4}),
        ("qwen", "polynomial", {}),
        ("flux2", "GM", {"temperature": 0.6}),
        ("flux2", "DX", {"substeps": 20}),
    ],
)
def test_an_adapter_is_sampled_as_by_the_solvers(tmp_path, base, policy, settings):
    model = tiny(base)
    before, stock = model(), model.pipeline.scheduler
    weights = {name: each.clone() for name, each in model.pipeline.transformer.state_dict().items()}
    path = adapter_file(tmp_path, base, policy)
    as_image = "seed" not in settings  # the scheduler draws fresh noise for tokens
    denoiser = denoiser_by_hand(model, path, policy, as_image, settings.get("strength", 1.0))
    adapter = load_gm_adapter(model.pipeline, path, **settings)
    assert adapter.steps == 4
    assert adapter.guidance == {"flux": 3.5, "qwen": None, "flux2": 4.0}[base]
    found = model()
    assert (found - before).abs().mean() > 0.1

    by_hand = {"solver": "gm-policy", "shift": 3.2} | settings
    by_hand.pop("strength", None)
    last = 1.0 if policy == "ArcFlow" else 0.5
    if not as_image:
        by_hand["noise"] = torch.Generator().manual_seed(by_hand.pop("seed"))
    arrange = model.to_image if as_image else model.layout.from_tokens
    sigmas = flow_sigmas(4, 3.2, final_step_size=last)
    x = solve(denoiser=denoiser, x=arrange(model.noise), sigmas=sigmas, **by_hand)
    close(arrange(found), x)

    adapter.unload()
    assert model.pipeline.scheduler is stock
    after = model.pipeline.transformer.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(model(), before)


def test_guidance_of_the_pipeline_moves_the_whole_policy(tmp_path):
    flux = tiny("flux")
    path = adapter_file(tmp_path, "flux")
    denoiser = denoiser_by_hand(flux, path, "GM")
    load_gm_adapter(flux.pipeline, path, temperature=1.0)
    words, pooled = normal(BATCH, 3, TEXT, seed=7), normal(BATCH, 8, seed=8)
    negative = {"negative_prompt_embeds": words, "negative_pooled_prompt_embeds": pooled}
    found = flux(**negative, true_cfg_scale=1.5)

    def guided(x, sigma):
        policy = denoiser(x, sigma)
        other = denoiser(x, sigma, encoder_hidden_states=words, pooled_projections=pooled)
        return policy.moved(0.5 * (policy.mean() - other.mean()))

    sigmas, x = flow_sigmas(4, 3.2, final_step_size=0.5), flux.to_image(flux.noise)
    by_hand = {"shift": 3.2, "temperature": 1.0}
    close(flux.to_image(found), solve("gm-policy", guided, x, sigmas, **by_hand))


def test_tokens_of_reference_pictures_are_left_out(tmp_path):
    """As pipelines that edit pictures cut them off, behind the image's own."""
    model = tiny("flux2")
    load_gm_adapter(model.pipeline, adapter_file(tmp_path, "flux2"))
    scheduler, results = model.pipeline.scheduler, []
    embedding, features = normal(BATCH, HIDDEN), normal(BATCH, TOKENS + 4, HIDDEN, seed=10)
    for count in (TOKENS + 4, TOKENS):
        scheduler.set_timesteps(4)
        mean = model.pipeline.transformer.norm_out(features[:, :count], embedding)
        results.append(scheduler.step(mean[:, :TOKENS], scheduler.timesteps[0], model.noise)[0])
    close(*results)


def test_the_scheduler_may_be_replaced_behind_an_adapter(tmp_path):
    flux = tiny("flux")
    stock = flux.pipeline.scheduler
    adapter = load_gm_adapter(flux.pipeline, adapter_file(tmp_path, "flux"), solver="gm-ode")
    expected = flux()
    flux.pipeline.scheduler = GMFlowScheduler.from_config(flux.pipeline.scheduler.config)
    assert torch.equal(flux(), expected)
    flux.pipeline.scheduler = own = type(stock).from_config(stock.config)
    mean_only = flux()  # a stock scheduler follows the mean
    assert mean_only.isfinite().all()
    assert not torch.equal(mean_only, expected)
    adapter.unload()
    assert flux.pipeline.scheduler is own
    flux.pipeline.scheduler = GMFlowScheduler.from_config(stock.config, policy="GMFlow")
    with pytest.raises(ValueError, match="handed none over"):
        flux()


def test_facts_in_the_file_come_first(tmp_path):
    flux = tiny("flux")
    flux.pipeline.scheduler = GMFlowScheduler(substeps=3)
    facts = {"steps": 6, "shift": 2.0, "final_step_size": 0.25, "guidance": 2.5, "temperature": 0.9}
    adapter = load_gm_adapter(flux.pipeline, adapter_file(tmp_path, "flux", **facts))
    scheduler = flux.pipeline.scheduler
    assert (adapter.steps, adapter.guidance, scheduler.config.temperature) == (6, 2.5, 0.9)
    assert (scheduler.config.solver, scheduler.config.substeps) == ("gm-policy", None)
    scheduler.set_timesteps(6)
    torch.testing.assert_close(scheduler.sigmas, flow_sigmas(6, 2.0, final_step_size=0.25))
    adapter.unload()
    with pytest.warns(match="2 steps are assumed"):
        load_gm_adapter(flux.pipeline, adapter_file(tmp_path, "flux", "ArcFlow", "none"))


def test_half_precision_stays(tmp_path):
    flux = tiny("flux")
    flux.pipeline.transformer.bfloat16()
    load_gm_adapter(flux.pipeline, adapter_file(tmp_path, "flux"))
    flux.text = {name: each.bfloat16() for name, each in flux.text.items()}
    found = flux()
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_what_does_not_fit_is_refused(tmp_path):
    flux = tiny("flux")
    path = adapter_file(tmp_path, "flux")
    for file, settings, words in (
        (tmp_path / "none.safetensors", {}, "none.safetensors"),
        (adapter_file(tmp_path, "qwen", folder="qwen_4step"), {}, "FLUX.1 transformer"),
        (adapter_file(tmp_path, "flux2", folder="two_4step"), {}, "fit this FLUX.1 pipeline"),
        (adapter_file(tmp_path, "flux", folder="own_4step", base="FLUX.2"), {}, "is for FLUX.2"),
        (path, {"solver": "euler"}, "solver is 'euler'"),
        (path, {"step": 4}, "no settings step"),
    ):
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words):
            load_gm_adapter(flux.pipeline, file, **settings)
    assert type(flux.pipeline.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    load_gm_adapter(flux.pipeline, path)
    with pytest.raises(ValueError, match="has a GM adapter already"):
        load_gm_adapter(flux.pipeline, path)
    with pytest.raises(ValueError, match="Flux2Transformer2DModel"):
        load_gm_adapter(object(), path)


# diffusers' own


@pytest.mark.parametrize(("steps", "last"), [(4, 0.5), (3, 1.0)])
def test_dx_grids_are_sampled_as_by_piflow_of_diffusers(steps, last):
    """Its last segment ends at `eps` instead of 0, which for the usual 1e-6 makes 5e-5."""
    if not hasattr(diffusers, "PiflowScheduler"):
        pytest.skip("this version of diffusers has no PiflowScheduler")
    settings = {"shift": 3.2, "final_step_size_scale": last, "eps": 1e-8, "n_grid": 5}
    theirs = diffusers.PiflowScheduler(**settings)
    schedule = {"solver": "gm-policy", "shift": 3.2, "final_step_size": last}
    ours = GMFlowScheduler(**schedule, policy="DX")
    torch.manual_seed(0)
    layout = HeadLayout(channels=4)
    head = DXHead(8, layout, 5, {"segment_size": 1 / (steps - 1 + last), "shift": 3.2})
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    x = y = normal(BATCH, TOKENS, layout.width)
    for index, time in enumerate(theirs.timesteps):
        features = normal(BATCH, TOKENS, 8, seed=index)
        prediction = head(features, normal(BATCH, 8, seed=index + 9))
        wide = prediction.velocities.movedim(3, 1).flatten(3).flatten(2)  # (B, N, 5 C p^2)
        mean = layout.to_tokens(prediction.mean())
        ours.offer(Offer(head, prediction, mean))
        x = ours.step(mean, time, x).prev_sample
        y = theirs.step(wide, time, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "gmflow_core.diffusers")
    with pytest.raises(ImportError, match="pip install diffusers transformers"):
        importlib.import_module("gmflow_core.diffusers")
