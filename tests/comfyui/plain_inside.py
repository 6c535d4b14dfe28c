"""Sample models that predict no mixture inside ComfyUI's process, for `test_plain_models.py`.

    COMFYUI/.venv/bin/python plain_inside.py COMFYUI WORK

COMFYUI is its folder; WORK is for files. The data are Gaussian, N(MEAN, WIDTH^2), so that the
network, its mixture (K = 1) and the end of every path are known in closed form. Prints what it
found as JSON.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from exact_model import MEAN, SHAPE, WIDTH, ExactOfParts, exact_model, limited, stock, text
from guided_inside import other_function, weight_zero, weight_zero_with_attention_guidance
from inside import far, half_mask, ours, run_cases, says
from torch import Tensor


def main(comfyui: str, work: str) -> None:
    """Run all cases and print their results as JSON by name."""
    run_cases(comfyui, CASES)


def sigma_max(model: Any) -> float:
    return float(model.get_model_object("model_sampling").sigma_max)


def exact_end(model: Any, kind: str, noise: Tensor, sigma: float) -> Tensor:
    """Return where the exact flow ends that starts from pure noise at the highest sigma."""
    signal = 1 - sigma if kind == "FLOW" else 1.0
    scale = 1.0
    if kind != "FLOW":  # ComfyUI's pure noise
        scale = (1 + sigma**2) ** 0.5 / sigma
    x = scale * sigma * noise
    return MEAN + WIDTH * (x - signal * MEAN) / ((signal * WIDTH) ** 2 + sigma**2) ** 0.5


def closed_form() -> dict[str, Any]:
    """Take one step with the exact spread at its start; it ends where the exact flow does."""
    import comfy.sample

    found = {}
    for kind in ("FLOW", "EPS", "V_PREDICTION"):
        model = exact_model(kind)
        sigma = sigma_max(model)
        straight = ours("paths").path_of(model.get_model_object("model_sampling")).sigma_of(sigma)
        spread = WIDTH / (((1 - straight) * WIDTH) ** 2 + straight**2) ** 0.5
        model = ours("plain_model").with_spread(model, spread)
        sampler = ours("gm_sampler").gm_sampler("gm-ode", substeps=1000)
        noise = comfy.sample.prepare_noise(torch.zeros(SHAPE), 5)
        guider = ours("guiders").gm_guider(model, text())
        sigmas = ours("time_shift").own_sigmas(model.get_model_object("model_sampling"), 1)
        result = guider.sample(
            noise, torch.zeros(SHAPE), sampler, sigmas, disable_pbar=True, seed=5
        )
        result = model.model.process_latent_in(result)
        expected = exact_end(model, kind, noise, sigma)
        euler = ours("gm_sampler").gm_sampler("euler")
        straight_on = guider.sample(
            noise, torch.zeros(SHAPE), euler, sigmas, disable_pbar=True, seed=5
        )
        found[kind] = {
            "gm-ode": far(result, expected),
            "euler": far(model.model.process_latent_in(straight_on), expected),
        }
    return found


def equal(first: Tensor, second: Tensor) -> bool:
    return bool(torch.equal(first, second)) and bool(first.isfinite().all())


def same_latents() -> dict[str, Any]:
    """Sample by the stock names and by our own nodes: the latents are the same, bit for bit."""
    import comfy.sample

    import nodes

    node = nodes.NODE_CLASS_MAPPINGS["GMFlowSampler"]
    found = {}
    for kind in ("FLOW", "EPS"):
        model = exact_model(kind, shift=3.0)
        latent = {"samples": torch.zeros(SHAPE)}
        for name, solver in ours("stock_lists").SAMPLERS.items():
            ours_ = node.execute(
                model,
                latent,
                5,
                3,
                solver,
                2,
                0,
                0.0,
                1.0,
                positive=text(),
                final_step_size=1.0,
            )[0]["samples"]
            found[f"{kind} {name}"] = equal(stock(model, name, steps=3), ours_)
        sampling = model.get_model_object("model_sampling")
        custom = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(latent["samples"], 5),
            1.0,
            ours("gm_sampler").gm_sampler("gm-ode"),
            ours("time_shift").own_sigmas(sampling, 4),
            text(),
            text(),
            latent["samples"],
            disable_pbar=True,
            seed=5,
        )
        found[f"{kind} custom"] = equal(stock(model, steps=4), custom)
    return found


def as_any_sampler() -> dict[str, Any]:
    """Sample in two stages, in part, under a mask, and a batch as its members."""
    import comfy.sample

    found = {}
    for kind in ("FLOW", "EPS"):
        model = exact_model(kind)
        whole = stock(model, "gm_policy", "simple", 4)
        half = stock(model, "gm_policy", "simple", 4, last_step=2)
        zero = torch.zeros(SHAPE)
        rest = stock(
            model,
            "gm_policy",
            "simple",
            4,
            latent=half,
            noise=zero,
            start_step=2,
            disable_noise=True,
        )
        generator = torch.Generator().manual_seed(0)
        latent = MEAN + WIDTH * torch.randn(SHAPE, generator=generator)
        mask = half_mask(latent)
        kept = stock(model, "gm_sde", "gm", 3, latent=latent, mask=mask)
        part = stock(model, "gm_ode", "gm", 4, latent=latent, denoise=0.3)
        full = stock(model, "gm_ode", "gm", 4, latent=latent)
        noise = comfy.sample.prepare_noise(zero, 5)
        alone = stock(model, "gm_ode", "gm", 3, latent=zero[:1], noise=noise[:1])
        found[kind] = {
            "two stages": far(rest, whole),
            "outside the mask": far(kept * (1 - mask), latent * (1 - mask)),
            "inside the mask": far(kept * mask, latent * mask),
            "part": far(part, latent) / far(full, latent),
            "alone": far(alone, stock(model, "gm_ode", "gm", 3)[:1]),
        }
    return found


def guided() -> dict[str, Any]:
    """Guide by a weight: the shift in standard deviations is the weight, on every path.

    The network's own variance is used as the spread, so that the mean of x_0 at the first step is
    shifted by w sqrt(V) in root mean square.
    """

    found = {}
    for kind in ("FLOW", "EPS"):
        model = exact_model(kind)
        plain = ours("plain_model").with_spread(model, 0.5)
        guided_model = ours("guiders").guided(plain, orthogonal=0.0)
        result = {}
        for weight in (0.0, 0.4):
            watched = []
            stock(
                guided_model,
                "euler",
                "gm",
                2,
                cfg=weight,
                negative=text(-1.0),
                callback=lambda step, x0, x, total, to=watched: to.append(x0),
            )
            result[weight] = watched[0]
        shift = (result[0.4] - result[0.0]).square().mean((1, 2, 3)).sqrt()
        sigma = ours("paths").path_of(model.get_model_object("model_sampling"))
        straight = sigma.sigma_of(sigma_max(model))
        found[kind] = {
            "shift": far(shift, torch.full_like(shift, 0.4 * 0.5 * straight)),
            "towards": bool((result[0.4].mean() - result[0.0].mean()) > 0),
            "gm-ode": far(
                stock(guided_model, "gm_ode", "gm", 3, cfg=0.4, negative=text(-1.0)),
                stock(guided_model, "gm_ode", "gm", 3, cfg=0.0, negative=text(-1.0)),
            ),
            "keys": [
                key for keys in model.model.diffusion_model.keys for key in keys if "gmflow" in key
            ],
        }
    return found


def interval() -> dict[str, Any]:
    """Guide in a part of the sampling, away from a higher mean: what is seen, and what is asked."""
    found = {}
    for kind in ("FLOW", "EPS"):
        model, sizes, found[kind] = exact_model(kind), [], {}
        model.model.diffusion_model.register_forward_pre_hook(
            lambda _, given, to=sizes: to.append(len(given[0]))
        )
        for name, part in {"all": (0.0, 1.0), "first": (0.0, 0.5), "last": (0.5, 1.0)}.items():
            sizes.clear()
            means: list[float] = []
            stock(
                ours("guiders").guided(model, 0.0, *part),
                "euler",
                steps=4,
                cfg=0.4,
                negative=text(2.0),
                callback=lambda step, x0, *_, to=means: to.append(x0.mean().item()),
            )
            found[kind][name] = {"means": means, "batches": [size // SHAPE[0] for size in sizes]}
    return found


def several_parts() -> dict[str, Any]:
    """Sample a latent of two parts; each comes out as if it were alone.

    By gm_policy, as the second order of gm_ode compares all pixels of a sample.
    """
    try:
        from comfy.nested_tensor import NestedTensor
    except ImportError:
        return {}  # older versions of ComfyUI lack them

    import nodes

    shapes, generator = (SHAPE, (2, 4, 3, 5)), torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator) for shape in shapes]
    zeros = [torch.zeros(shape) for shape in shapes]
    model, together = exact_model("FLOW"), exact_model("FLOW", exact=ExactOfParts)
    result = stock(together, "gm_policy", latent=NestedTensor(zeros), noise=NestedTensor(noise))
    given = {"model": together, "latent_image": {"samples": NestedTensor(zeros)}, "seed": 5}
    given |= {"steps": 3, "solver": "gm-ode", "order": 2, "substeps": 0, "shift": 0.0}
    node = nodes.NODE_CLASS_MAPPINGS["GMFlowSampler"]
    return {
        "far": [
            far(part, stock(model, "gm_policy", latent=zero, noise=own))
            for part, zero, own in zip(result.unbind(), zeros, noise, strict=True)
        ],
        "node": says(lambda: node.execute(**given, denoise=1.0, positive=text())),
    }


def usual_spread() -> dict[str, Any]:
    """GM Spread at 0 is the usual spread, and gm_policy on one Gaussian uses it as it is."""
    plain = ours("plain_model")
    model = exact_model("FLOW")
    zero = plain.with_spread(model, 0.0)
    named = plain.with_spread(model, plain.USUAL_SPREAD)
    policy = ours("gm_sampler").gm_sampler("gm-policy", temperature=1.0)
    return {
        "zero": equal(stock(zero, steps=2), stock(named, steps=2)),
        "same as none": equal(stock(zero, steps=2), stock(model, steps=2)),
        "other": far(stock(plain.with_spread(model, 1.0), steps=2), stock(model, steps=2)),
        "no temperature": far(stock(model, "gm_policy", steps=4), _with(model, policy, 4)),
    }


def _with(model: Any, sampler: Any, steps: int) -> Tensor:
    import comfy.sample

    latent = torch.zeros(SHAPE)
    sigmas = ours("time_shift").own_sigmas(model.get_model_object("model_sampling"), steps)
    noise = comfy.sample.prepare_noise(latent, 5)
    wires = (model, noise, 1.0, sampler, sigmas, text(), text(), latent)
    return comfy.sample.sample_custom(*wires, disable_pbar=True, seed=5)


def uncovered() -> dict[str, Any]:
    """Sample where no prompt counts, and guide where no negative does, by masks and ranges."""
    found, names = {}, ("euler", *ours("stock_lists").SAMPLERS)
    nothing, left = torch.zeros(1, *SHAPE[2:]), torch.zeros(1, *SHAPE[2:])
    left[..., : SHAPE[-1] // 2] = 1
    late, never = {"start_percent": 0.5}, {"start_percent": 1.0}
    for kind in ("FLOW", "EPS"):
        model = exact_model(kind)
        steered = ours("guiders").guided(model, orthogonal=0.0)

        def guided(where: dict[str, Any], name: str = "gm_ode", cfg=0.4, model=steered) -> Tensor:
            return stock(model, name, steps=3, cfg=cfg, negative=limited(text(-1.0), **where))

        def alone(where: dict[str, Any], name: str, model=model) -> Tensor:
            return stock(model, name, steps=3, positive=limited(text(), **where))

        plain, full, euler = guided({}, cfg=0.0), guided({}), guided({}, "euler", 0.0)
        latent, zero = torch.ones(SHAPE), torch.zeros(SHAPE[0], 1, *SHAPE[2:])
        half = guided({"mask": left}, "euler")
        found[kind] = {
            "masked": [alone({"mask": nothing}, name).abs().max().item() for name in names],
            "never": [alone(never, name).abs().max().item() for name in names],
            "right": alone({"mask": left}, "gm_ode")[..., SHAPE[-1] // 2 :].abs().max().item(),
            "left": alone({"mask": left}, "gm_ode")[..., : SHAPE[-1] // 2].abs().mean().item(),
            "nothing to sample": [
                far(stock(model, name, latent=latent, mask=zero), latent) for name in names
            ],
            "negative masked": far(guided({"mask": nothing}), plain),
            "negative never": far(guided(never), plain),
            "negative late": [far(guided(late), each) for each in (plain, full)],
            "negative left": [far(half[..., part], euler[..., part]) for part in HALVES],
            "by euler": far(guided({"mask": nothing}, "euler"), euler),
        }
    return found


HALVES = slice(0, SHAPE[-1] // 2), slice(SHAPE[-1] // 2, None)


def told() -> dict[str, list[str]]:
    """Collect what is said of a spread, of one that nothing uses, and of odd schedules."""
    heard: list[str] = []
    modules = [ours(name) for name in ("solver_choice", "gm_sampler")]
    kept = [module.notice for module in modules]
    wide = ours("plain_model").with_spread(exact_model("FLOW"), 1.0)
    wide = ours("plain_model").with_spread(wide, 0.8)
    steered = ours("guiders").guided(wide)
    euler = ours("gm_sampler").gm_sampler("euler")
    calls = {
        "gm_ode": lambda: stock(wide, steps=2),
        "euler": lambda: stock(wide, "euler", steps=2),
        "our euler": lambda: _with(wide, euler, 2),
        "guided": lambda: stock(steered, "euler", steps=2, cfg=0.4, negative=text(-1.0)),
        "off": lambda: stock(steered, "euler", steps=2, cfg=0.0, negative=text(-1.0)),
        "ddim": lambda: stock(wide, "gm_ode", "ddim_uniform", 3),
        "cut": lambda: stock(wide, "gm_ode", "simple", 5, last_step=2, force_full_denoise=True),
        "second stage": lambda: stock(wide, "gm_ode", "simple", 5, start_step=2),
    }
    found = {}
    try:
        for module in modules:
            module.notice = lambda message, level=0: heard.append(message)
        for name, call in calls.items():
            heard.clear()
            call()
            found[name] = list(heard)
    finally:
        for module, each in zip(modules, kept, strict=True):
            module.notice = each
    return found


def refused() -> dict[str, Any]:
    """Samplings that follow neither path are refused by name, and schedules that fit no sampler."""
    import comfy.model_sampling
    import comfy.samplers

    found = {}
    for mixin in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM"):
        parent = getattr(comfy.model_sampling, mixin, None)
        if parent is None:
            continue
        model = exact_model("EPS")
        base = comfy.model_sampling.ModelSamplingDiscrete
        kind = type("Other", (base, parent), {})
        model.add_object_patch("model_sampling", kind(model.model.model_config))
        found[mixin] = says(lambda model=model: stock(model, "gm_ode", "simple", 2))
    model = exact_model("FLOW")
    flow = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST)
    picture = {"calculate_denoised": lambda self, sigma, model_output, model_input: model_output}
    sampling = type("PredictsThePicture", flow, picture)(model.model.model_config)
    model.add_object_patch("model_sampling", sampling)
    found["PredictsThePicture"] = says(lambda: stock(model, "gm_ode", "simple", 2))
    model = exact_model("FLOW")
    found["rising"] = says(
        lambda: stock(model, "gm_ode", "simple", 2, sigmas=torch.tensor([0.5, 0.7, 0.0]))
    )
    return found


def lists() -> dict[str, Any]:
    """Add the names twice, beside a reload as RES4LYF's, and take them out again."""
    import importlib

    import comfy.samplers

    module = ours("stock_lists")
    sampler_lists = (comfy.samplers.SAMPLER_NAMES, comfy.samplers.KSampler.SAMPLERS)
    schedulers = comfy.samplers.SCHEDULER_NAMES
    before = [list(each) for each in (*sampler_lists, schedulers)]
    module.add_to_stock_lists()
    once = before == [list(each) for each in (*sampler_lists, schedulers)]
    importlib.reload(comfy.samplers.k_diffusion_sampling)
    model = exact_model("FLOW")
    works = bool(stock(model, steps=2).isfinite().all())
    module.remove_from_stock_lists()
    names = {*module.SAMPLERS, module.SCHEDULER}
    left = names & {name for each in (*sampler_lists, schedulers) for name in each}
    module.remove_from_stock_lists()
    comfy.samplers.k_diffusion_sampling.sample_gm_ode = taken = lambda *arguments: None
    module.add_to_stock_lists()
    kept = comfy.samplers.k_diffusion_sampling.sample_gm_ode is taken
    del comfy.samplers.k_diffusion_sampling.sample_gm_ode
    module.add_to_stock_lists()
    after = [list(each) for each in (*sampler_lists, schedulers)]
    return {
        "listed": names <= {*before[0], *before[2]},
        "once": once,
        "works": works,
        "left": sorted(left),
        "kept": kept,
        "back": list(map(sorted, before)) == list(map(sorted, after)),
    }


CASES = {
    "closed form": closed_form,
    "same latents": same_latents,
    "as any sampler": as_any_sampler,
    "guided": guided,
    "interval": interval,
    "weight 0": weight_zero,
    "weight 0 with attention guidance": weight_zero_with_attention_guidance,
    "other function": other_function,
    "usual spread": usual_spread,
    "several parts": several_parts,
    "uncovered": uncovered,
    "told": told,
    "refused": refused,
    "lists": lists,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
