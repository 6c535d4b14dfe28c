"""Sample tiny models of every kind inside ComfyUI's process, for `test_any_model.py`.

    COMFYUI/.venv/bin/python any_model_inside.py COMFYUI WORK

COMFYUI is its folder; WORK/diffusion_models holds the files that `kinds.json` in WORK names. Prints
what it found as JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from inside import far, half_mask, run_cases, says
from torch import Tensor

SOLVERS = {"gm_ode": "gm-ode", "gm_sde": "gm-sde", "gm_policy": "gm-policy"}
GUIDED = ("sd3", "qwen", "wan")  # models that people use with a negative prompt
SEED, STEPS = 5, 2


def main(comfyui: str, work: str) -> None:
    """Run all cases and print their results as JSON by name."""
    KINDS.update(json.loads((Path(work) / "kinds.json").read_text()))
    FOLDER.append(Path(work).absolute() / "diffusion_models")
    run_cases(comfyui, CASES)


KINDS: dict[str, dict[str, Any]] = {}  # as plain_bases.KINDS
FOLDER: list[Path] = []


@cache
def model_of(kind: str) -> Any:
    """Load a MODEL by ComfyUI's own loader."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(FOLDER[0] / KINDS[kind]["file"]))


def text(kind: str, seed: int = 0) -> list:
    """Draw a conditioning of the model's widths."""
    generator, about = torch.Generator().manual_seed(seed), {}
    drawn = torch.randn(1, 5, KINDS[kind]["text"], generator=generator)
    if KINDS[kind]["pooled"]:
        about["pooled_output"] = torch.randn(1, KINDS[kind]["pooled"], generator=generator)
    return [[drawn, about]]


def latent(kind: str, batch: int = 1, empty: bool = True) -> dict[str, Tensor]:
    """Return a LATENT, empty or random."""
    shape = (batch, *KINDS[kind]["latent"])
    generator = torch.Generator().manual_seed(3)
    return {"samples": torch.zeros(shape) if empty else torch.randn(shape, generator=generator)}


def node(name: str, **inputs: Any) -> Any:
    """Run a node of either kind by its id, and return its first output."""
    import nodes

    kind = nodes.NODE_CLASS_MAPPINGS.get(name) or stock_node(name)
    if hasattr(kind, "define_schema"):
        return kind.execute(**inputs)[0]
    return getattr(kind(), kind.FUNCTION)(**inputs)[0]


@cache
def stock_node(name: str) -> Any:
    """Return one of ComfyUI's extra nodes, which are not loaded here."""
    for file in ("custom_sampler", "model_advanced", "perpneg", "apg", "cfg"):
        try:
            module = importlib.import_module(f"comfy_extras.nodes_{file}")
        except ImportError:
            continue  # older versions of ComfyUI lack some
        if hasattr(module, name):
            return getattr(module, name)
    raise KeyError(name)


def sample(kind: str, name: str = "gm_ode", *, model: Any = None, **changed: Any) -> Tensor:
    """Sample with KSampler."""
    settings = {"seed": SEED, "steps": STEPS, "cfg": 1.0, "scheduler": "gm", "denoise": 1.0}
    wires = {"positive": text(kind), "negative": text(kind, 1), "latent_image": latent(kind)}
    model = model_of(kind) if model is None else model
    given = {**settings, **wires, "model": model, "sampler_name": name, **changed}
    return node("KSampler", **given)["samples"]


def custom(kind: str, guider: Any, sampler: Any = "gm_ode", noise: Any = None) -> Tensor:
    """Sample with SamplerCustomAdvanced."""
    sampler = node("KSamplerSelect", sampler_name=sampler) if isinstance(sampler, str) else sampler
    return node(
        "SamplerCustomAdvanced",
        noise=noise or node("RandomNoise", noise_seed=SEED),
        guider=guider,
        sampler=sampler,
        sigmas=node(
            "BasicScheduler", model=model_of(kind), scheduler="gm", steps=STEPS, denoise=1.0
        ),
        latent_image=latent(kind),
    )["samples"]


def guider_of(kind: str, name: str = "CFGGuider", **settings: Any) -> Any:
    """Make one of ComfyUI's guiders."""
    wires = {"model": model_of(kind), "positive": text(kind), "negative": text(kind, 1)}
    return node(name, **{**wires, **settings})


def equal(first: Tensor, second: Tensor) -> bool:
    """Return whether both are the same, bit for bit, and finite."""
    return bool(torch.equal(first, second)) and bool(first.isfinite().all())


def names() -> dict[str, Any]:
    """Sample with each stock name on each kind; GM Sampler and SamplerCustom give the same."""
    found = {}
    for kind in KINDS:
        own = {"model": model_of(kind), "latent_image": latent(kind), "seed": SEED}
        own |= {"steps": STEPS, "order": 2, "substeps": 0, "shift": 0.0, "denoise": 1.0}
        own |= {"positive": text(kind), "final_step_size": 1.0}
        euler, about = sample(kind, "euler"), {}
        for name, solver in SOLVERS.items():
            result = sample(kind, name)
            ours_ = node("GMFlowSampler", solver=solver, **own)["samples"]
            about[name] = {"same": equal(result, ours_), "effect": far(result, euler)}
        about["custom"] = equal(custom(kind, guider_of(kind, cfg=1.0)), sample(kind))
        about["shape"] = list(sample(kind).shape) == list(latent(kind)["samples"].shape)
        found[kind] = about
    return found


def as_any_sampler() -> dict[str, Any]:
    """Sample in two stages, in part, under a mask, and a batch as its members."""
    import comfy.sample
    import comfy.samplers

    found = {}
    for kind in KINDS:
        stage = {"model": model_of(kind), "noise_seed": SEED, "steps": 4, "cfg": 1.0}
        stage |= {"sampler_name": "gm_policy", "scheduler": "simple"}
        stage |= {"positive": text(kind), "negative": text(kind, 1)}
        first = {"start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"}
        half = node(
            "KSamplerAdvanced", add_noise="enable", latent_image=latent(kind), **stage, **first
        )
        last = {"start_at_step": 2, "end_at_step": 99, "return_with_leftover_noise": "disable"}
        rest = node("KSamplerAdvanced", add_noise="disable", latent_image=half, **stage, **last)
        whole = sample(kind, "gm_policy", scheduler="simple", steps=4)
        image = latent(kind, empty=False)["samples"]
        part = sample(kind, latent_image={"samples": image}, denoise=0.3)
        full = sample(kind, latent_image={"samples": image})
        mask = half_mask(torch.zeros(1, 1, 64, 64))
        kept = sample(kind, "gm_sde", latent_image={"samples": image, "noise_mask": mask})
        outside = image.shape[-1] // 2
        pair = sample(kind, "gm_sde", latent_image=latent(kind, batch=2))
        noise = comfy.sample.prepare_noise(latent(kind, batch=2)["samples"], SEED)[1:]
        fixed = type(
            "Fixed", (), {"seed": SEED, "generate_noise": lambda self, _, kept=noise: kept}
        )()
        alone = custom(kind, guider_of(kind, cfg=1.0), "gm_ode", fixed)
        both = sample(kind, latent_image=latent(kind, batch=2))
        found[kind] = {
            "two stages": far(rest["samples"], whole),
            "part": far(part, image) / far(full, image),
            "outside the mask": far(kept[..., outside:], image[..., outside:]),
            "inside the mask": far(kept[..., :outside], image[..., :outside]),
            "first of a batch": far(sample(kind, "gm_sde"), pair[:1]),
            "second of a batch": far(alone, both[1:]),
        }
    return found


def patched() -> dict[str, Any]:
    """Sample with a LoRA, with a ControlNet, and compiled."""
    import comfy.sd
    from comfy.controlnet import ControlBase
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    class Control(ControlBase):
        """A ControlNet without a network: ComfyUI's own code around it is what is tested."""

        def get_control(self, x, t, cond, batched_number, *options) -> dict[str, list]:
            generator = torch.Generator().manual_seed(0)
            return {"output": [torch.randn(len(x), 1, 128, generator=generator)]}

    generator = torch.Generator().manual_seed(0)
    name, shapes = "lora_unet_double_blocks_0_img_attn_qkv", {"down": (4, 256), "up": (768, 4)}
    lora = {
        f"{name}.lora_{part}.weight": 0.3 * torch.randn(shape, generator=generator)
        for part, shape in shapes.items()
    }
    styled, _ = comfy.sd.load_lora_for_models(model_of("flux"), None, lora, 1.0, 0.0)
    ((tokens, about),) = text("sd3")
    control = [[tokens, {**about, "control": Control(), "control_apply_to_uncond": True}]]
    fast = model_of("sd3").clone()
    unguarded = {
        "guard_filter_fn": lambda all_: ["transformer_options" not in e.name for e in all_]
    }
    set_torch_compile_wrapper(fast, "eager", options=unguarded)
    steered = node("GMFlowProbabilisticGuidance", model=model_of("sd3"), **GUIDANCE)
    fast_steered = node("GMFlowProbabilisticGuidance", model=fast, **GUIDANCE)
    return {
        "LoRA": far(sample("flux", model=styled), sample("flux")),
        "ControlNet": far(sample("sd3", positive=control), sample("sd3")),
        "compiled": far(
            sample("sd3", model=fast_steered, cfg=0.3), sample("sd3", model=steered, cfg=0.3)
        ),
    }


GUIDANCE = {"orthogonal": 1.0, "start_percent": 0.0, "end_percent": 1.0}


def guided() -> dict[str, Any]:
    """Guide with a negative conditioning, by each node; and what does not go with it."""
    found = {}
    for kind in GUIDED:
        model = model_of(kind)
        steered = node("GMFlowProbabilisticGuidance", model=model, **GUIDANCE)
        wide = node("GMFlowSpread", model=model, spread=1.0)
        wide_steered = node("GMFlowProbabilisticGuidance", model=wide, **GUIDANCE)
        result, plain = sample(kind, model=steered, cfg=0.3), sample(kind)
        guider = guider_of(kind, "GMFlowGuider", scale=0.3, **GUIDANCE)
        by_cfg = guider_of(kind, model=steered, cfg=0.3)
        dual = {"cfg_conds": 0.2, "cfg_cond2_negative": 0.3, "style": "regular"}
        dual |= {"cond1": text(kind), "cond2": text(kind, 2), "negative": text(kind, 1)}
        perp = {"cfg": 0.2, "neg_scale": 1.0, "empty_conditioning": text(kind, 2)}
        after = {
            "RescaleCFG": node("RescaleCFG", model=steered, multiplier=0.7),
            "APG": node("APG", model=steered, eta=1.0, norm_threshold=5.0, momentum=0.0),
            "CFGZeroStar": node("CFGZeroStar", model=steered),
        }
        refused = {
            name: says(lambda each=each, kind=kind: sample(kind, model=each, cfg=0.3))
            for name, each in after.items()
        }
        found[kind] = {
            "effect": far(result, plain),
            "off": far(sample(kind, model=steered, cfg=0.0), plain),
            "same by GM Guider": equal(custom(kind, guider), result),
            "same by CFGGuider": equal(custom(kind, by_cfg), result),
            "stock": far(sample(kind, "euler", model=steered, cfg=0.3), sample(kind, "euler")),
            "wide": far(sample(kind, model=wide_steered, cfg=0.3), sample(kind, model=wide)),
            "cfg": far(sample(kind, cfg=4.0), plain),
            "dual": bool(
                custom(kind, node("DualCFGGuider", model=steered, **dual)).isfinite().all()
            ),
            "refused": refused
            | {
                "cfg 4": says(lambda each=steered, kind=kind: sample(kind, model=each, cfg=4.0)),
                "PerpNegGuider": says(
                    lambda each=steered, kind=kind, perp=perp: custom(
                        kind, guider_of(kind, "PerpNegGuider", model=each, **perp)
                    )
                ),
                "no negative": says(
                    lambda each=steered, kind=kind: sample(kind, model=each, cfg=0.3, negative=[])
                ),
            },
        }
    return found


def views() -> dict[str, Any]:
    """Inspect, compare, and measure the variety of a model that predicts no mixture."""
    found = {}
    for kind in ("wan", "sd15"):
        given = {"model": model_of(kind), "latent_image": latent(kind), "seed": SEED}
        given["positive"] = text(kind)
        schema = ours_node("GMFlowInspector")
        place = {"steps": 2, "step": 1, "item": 0, "place": "most uncertain", "x": 0.0, "y": 0.0}
        place["place"] = next(each for each in schema.inputs if each.id == "place").options[0]
        inspected = run_node("GMFlowInspector", **given, **place)
        compared = run_node(
            "GMFlowCompare", samplers="euler\ngm_sde", steps="1, 2", size=32, **given
        )
        spread = run_node("GMFlowSeedSpread", seeds=2, steps=1, solver="auto", size=32, **given)
        found[kind] = {"inspector": inspected[2], "table": compared[1], "variety": spread[2]}
    return found


def ours_node(name: str) -> Any:
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA()


def run_node(name: str, **inputs: Any) -> tuple:
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs).result


def neighbours() -> dict[str, Any]:
    """Sample on the sigmas of every stock scheduler, and after every node that sets a sampling.

    With many steps GM-ODE comes to where Euler ends, whatever path the sampling follows.
    """
    import comfy.samplers

    schedulers = {
        name: bool(sample("sd3", scheduler=name, steps=3).isfinite().all())
        for name in comfy.samplers.SCHEDULER_NAMES
    }
    discrete = {"zsnr": True}
    edm = {"sigma_max": 80.0, "sigma_min": 0.002}
    samplings = {
        "SD3": ("ModelSamplingSD3", {"shift": 5.0}),
        "AuraFlow": ("ModelSamplingAuraFlow", {"shift": 1.73}),
        "Flux": (
            "ModelSamplingFlux",
            {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512},
        ),
        "v of EDM": ("ModelSamplingContinuousEDM", {"sampling": "v_prediction", **edm}),
        "EDM": ("ModelSamplingContinuousEDM", {"sampling": "edm", **edm}),
        "Cosmos": ("ModelSamplingContinuousEDM", {"sampling": "cosmos_rflow", **edm}),
        "v, zero SNR": ("ModelSamplingDiscrete", {"sampling": "v_prediction", **discrete}),
        "LCM": ("ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False}),
        "noise of scale 2": ("ModelNoiseScale", {"noise_scale": 2.0}),
    }
    after = {}
    for name, (kind, settings) in samplings.items():
        try:
            model = node(kind, model=model_of("sd3"), **settings)
        except (KeyError, AttributeError):
            continue  # older versions of ComfyUI lack some
        many = {"model": model, "steps": 12, "scheduler": "simple"}
        gm, euler = (sample("sd3", each, **many) for each in ("gm_ode", "euler"))
        few = sample("sd3", "gm_ode", model=model)
        after[name] = [far(gm, euler), bool(few.isfinite().all())]
    return {"schedulers": schedulers, "samplings": after}


def guiders() -> dict[str, Any]:
    """Sample with other guiders and samplers of ComfyUI's, odd conditionings, and NaN."""
    import comfy.samplers

    def lying(inner: Any, attributes: tuple[str, ...] = ("inner_model", "sigmas")) -> Any:
        def function(model, x, sigmas, **extra):
            def changed(x, sigma, **more):
                return model(x, 0.98 * sigma, **more)

            for name in attributes:
                setattr(changed, name, getattr(model, name))
            return inner.sampler_function(changed, x, sigmas, **extra)

        return comfy.samplers.KSAMPLER(function)

    kind, sampler = "sd3", node("KSamplerSelect", sampler_name="gm_ode")
    dual = {"cfg_conds": 2.0, "cfg_cond2_negative": 3.0, "style": "nested"}
    dual |= {"cond1": text(kind), "cond2": text(kind, 2), "negative": text(kind, 1)}
    perp = {"cfg": 2.0, "neg_scale": 1.0, "empty_conditioning": text(kind, 2)}
    basic = node("BasicGuider", model=model_of(kind), conditioning=text(kind))
    spoiled = latent(kind, empty=False)
    spoiled["samples"][0, 0, 0, 0] = float("nan")
    results = {
        "dual": custom(kind, node("DualCFGGuider", model=model_of(kind), **dual)),
        "perpendicular": custom(kind, guider_of(kind, "PerpNegGuider", **perp)),
        "cfg 0": sample(kind, cfg=0.0),
        "no conditioning": sample(kind, positive=[], negative=[]),
        "no noise": custom(kind, basic, noise=node("DisableNoise")),
    }
    return {
        "far": {name: far(each, sample(kind)) for name, each in results.items()},
        "basic": equal(custom(kind, basic), sample(kind)),
        "lying": far(custom(kind, basic, lying(sampler)), sample(kind)),
        "hidden": says(lambda: custom(kind, basic, lying(sampler, ()))),
        "nan": says(lambda: sample(kind, latent_image=spoiled)),
    }


CASES = {
    "names": names,
    "as any sampler": as_any_sampler,
    "patched": patched,
    "guided": guided,
    "views": views,
    "neighbours": neighbours,
    "guiders": guiders,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
