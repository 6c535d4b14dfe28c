"""Run samplers inside ComfyUI's process, with what other nodes put around them.

    COMFYUI/.venv/bin/python around_samplers.py COMFYUI WORK CASE

COMFYUI is its folder; WORK holds flux.safetensors and adapter.safetensors; CASE is one of CASES.
Prints what it found as JSON. `test_around_samplers.py` starts it.
"""

from __future__ import annotations

import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inside import board, far, flux, half_mask, ours, run_cases, sample, says
from regions_inside import changed_positive, orders, regions, skipped
from torch import Tensor

SHRINK = 0.9  # factor by which the wrapper changes sigma


def main(comfyui: str, work: str) -> None:
    """Run all cases and print their results as JSON by name."""
    cases = {name: partial(case, Path(work)) for name, case in CASES.items()}
    run_cases(comfyui, cases, "--use-pytorch-cross-attention")


def lying(inner: Any, attributes: tuple[str, ...] = ("inner_model", "sigmas")) -> Any:
    """Return a SAMPLER around another that changes sigma, as other extensions' nodes make them."""
    import comfy.samplers

    def function(model, x, sigmas, **kwargs):
        def changed(x, sigma, **extra):
            factor = SHRINK if 0.2 < sigma.max() < 0.95 else 1.0
            return model(x, sigma * factor, **extra)

        for name in attributes:
            setattr(changed, name, getattr(model, name))
        return inner.sampler_function(changed, x, sigmas, **kwargs, **inner.extra_options)

    return comfy.samplers.KSAMPLER(function)


def wrapped(work: Path) -> dict[str, Any]:
    """Compare GM samplers with stock Euler, bare and in a wrapper; and run all with a mask."""
    import comfy.samplers

    make, found = ours("gm_sampler").gm_sampler, {}
    euler = comfy.samplers.sampler_object("euler")
    for name, given in {"board": board(), "flux": flux(work)}.items():
        model, latent, positive = given
        image = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
        for what, start, mask in (("", latent, None), (" masked", image, half_mask(latent))):
            about = found[f"{name}{what}"] = {}
            for attributes in (("inner_model", "sigmas"), ()):
                stock = sample(model, start, positive, lying(euler), mask=mask)
                our = sample(model, start, positive, lying(make("euler"), attributes), mask=mask)
                about[f"euler {len(attributes)}"] = far(our, stock)
            about["effect"] = far(stock, sample(model, start, positive, euler, mask=mask))
            for solver in ("gm-ode", "gm-sde", "gm-policy"):
                bare = sample(model, start, positive, make(solver), mask=mask)
                again = sample(model, start, positive, lying(make(solver)), mask=mask)
                hidden = sample(model, start, positive, lying(make(solver), ()), mask=mask)
                about[solver] = {
                    "effect": far(again, bare),
                    "hidden": far(hidden, again),
                    "kept": None if mask is None else far(again * (1 - mask), image * (1 - mask)),
                }
    return found


def from_the_second_step(sigma: Tensor, mask: Tensor, extra_options: dict) -> Tensor:
    """Return the mask of a step; in the first one nothing is to change."""
    return mask * (sigma[0] < 1)


def soft_masks(work: Path) -> dict[str, Any]:
    """Sample with noise masks of 0.9 and 0: stock samplers, ours, and rollouts of many substeps."""
    import comfy.samplers

    make, found = ours("gm_sampler").gm_sampler, {}
    euler = comfy.samplers.sampler_object("euler")
    for name, (model, latent, positive) in {"board": board(), "flux": flux(work)}.items():
        image = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
        about = found[name] = {}
        for value in (1.0, 0.9):
            run = partial(sample, model, image, positive, mask=value * half_mask(latent))
            for solver in ("euler", "dpmpp-2m", "uni-pc"):
                stock = run(comfy.samplers.sampler_object(solver.replace("-", "_")))
                about[f"{solver}, {value}"] = far(run(make(solver)), stock)
            changing = model.clone()
            changing.set_model_denoise_mask_function(from_the_second_step)
            for solver in ("dpmpp-2m", "uni-pc") if value == 1 else ():
                run_changing = partial(sample, changing, *run.args[1:], **run.keywords)
                other = run_changing(comfy.samplers.sampler_object(solver.replace("-", "_")))
                about[f"{solver}, changing"] = far(run_changing(make(solver)), other)
            stock = run(euler)
            few, many = (run(make("gm-policy", substeps=n)) for n in (16, 256))
            about[f"substeps, {value}"] = far(few, many)
            about[f"moved, {value}"] = far(many, image) / far(stock, image)
            outside = 1 - half_mask(latent)
            about[f"kept, {value}"] = far(many * outside, image * outside)
    return found


def compiled(work: Path) -> dict[str, Any]:
    """Run GM and stock samplers in turn on compiled models, and compare with uncompiled ones.

    The guards are those of the node TorchCompileModel: none on transformer options.
    """
    import comfy.samplers
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def no_guards(entries):
        return ["transformer_options" not in entry.name for entry in entries]

    model, latent, positive = flux(work)
    fast = model.clone()
    set_torch_compile_wrapper(fast, "eager", options={"guard_filter_fn": no_guards})
    guided = ours("probabilistic_cfg").with_probabilistic_guidance(fast)
    gm, euler = ours("gm_sampler").gm_sampler("gm-ode"), comfy.samplers.sampler_object("euler")
    plain = {kind: sample(model, latent, positive, kind) for kind in (gm, euler)}
    found = []
    for turn, kind, cfg in ((fast, gm, 1.0), (fast, euler, 1.0), (guided, euler, 0.0)):
        found.append(far(sample(turn, latent, positive, kind, cfg=cfg), plain[kind]))
    torch.compiler.reset()
    for kind in (euler, gm):
        found.append(far(sample(fast, latent, positive, kind), plain[kind]))
    return {"differences": found}


def not_a_flow(work: Path) -> dict[str, Any]:
    """Put other kinds of sampling on a GM model, and connect it to every door."""
    import comfy.samplers
    import comfy_extras.nodes_model_advanced as advanced

    import nodes

    model, latent, positive = board()
    all_in_one = ours("sample_latent").sample_latent
    policy = nodes.NODE_CLASS_MAPPINGS["GMFlowPolicySigmas"].execute
    stock = comfy.samplers.sampler_object("euler")
    discrete = [
        (advanced.ModelSamplingDiscrete, {"sampling": kind, "zsnr": False})
        for kind in ("eps", "v_prediction", "lcm", "x0", "img_to_img", "img_to_img_flow")
    ]
    continuous = [
        (
            advanced.ModelSamplingContinuousEDM,
            {"sampling": kind, "sigma_max": 1.0, "sigma_min": 0.002},
        )
        for kind in ("eps", "v_prediction", "edm", "cosmos_rflow")
    ]
    flows = [
        (advanced.ModelSamplingSD3, {"shift": 2.0}),
        (advanced.ModelSamplingAuraFlow, {"shift": 2.0}),
    ]
    found: dict[str, Any] = {"refused": {}, "fine": []}
    for kind, settings in discrete + continuous:
        if settings["sampling"] not in kind.INPUT_TYPES()["required"]["sampling"][0]:
            continue  # older versions of ComfyUI lack some
        (other,) = kind().patch(model, **settings)
        doors = {
            "all in one": lambda m=other: all_in_one(m, {"samples": latent}, 0, 2, "gm-ode"),
            "with a shift": lambda m=other: all_in_one(
                m, {"samples": latent}, 0, 2, "euler", shift=3.0
            ),
            "sampler": lambda m=other: sample(
                m, latent, positive, ours("gm_sampler").gm_sampler("gm-sde")
            ),
            "stock": lambda m=other: sample(m, latent, positive, stock),
            "guidance": lambda m=other: ours("guiders").guided(m),
            "autoguidance": lambda m=other: ours("autoguider").AutoGuider(
                m, model, positive, positive, 2.0, (0.0, 1.0)
            ),
            "sigmas": lambda m=other: policy(m, 4, 0.0, 1.0, 1.0),
        }
        for door, call in doors.items():
            found["refused"][f"{door}, {settings['sampling']} of {kind.__name__}"] = says(call)
    for kind, settings in flows:
        (other,) = getattr(kind(), kind.FUNCTION)(model, **settings)
        result = all_in_one(other, {"samples": latent}, 0, 2, "gm-ode")["samples"]
        found["fine"].append(bool(result.isfinite().all()))
    return found


def not_finite(work: Path) -> dict[str, Any]:
    """Feed numbers that are not finite to GM and stock samplers, and collect what is said."""
    import comfy.samplers

    nan, found, heard = float("nan"), {}, []
    ours("finite").notice = heard.append
    make = ours("gm_sampler").gm_sampler
    samplers = {"stock": comfy.samplers.sampler_object("euler")}
    samplers |= {solver: make(solver) for solver in ("gm-ode", "gm-sde", "gm-policy", "dpmpp-2m")}

    def attempt(model, latent, positive, sampler, **settings) -> dict[str, Any]:
        heard.clear()
        error = says(lambda: sample(model, latent, positive, sampler, **settings))
        return {"error": error, "heard": list(heard)}

    for name, sampler in samplers.items():
        model, latent, positive = board()
        about = found[name] = {}
        about["good"] = attempt(model, latent, positive, sampler)
        spoiled = latent.clone()
        spoiled[1, 0, 3, 3] = nan
        about["latent"] = attempt(model, spoiled, positive, sampler)
        about["mask"] = attempt(model, latent, positive, sampler, mask=half_mask(latent) * nan)
        weight = next(model.model.diffusion_model.parameters())
        weight.data[0, 0] = float("inf")
        about["weight"] = attempt(model, latent, positive, sampler)
    model, latent, positive = flux(work)
    for name in ("stock", "gm-ode"):
        (text, more) = positive[0]
        found[name]["text"] = attempt(model, latent, [[text * nan, more]], samplers[name])
        found[name]["scale"] = attempt(
            model, latent, positive, samplers[name], cfg=1e38, negative=[[-text, more]]
        )
        styled = model.clone()
        key = "diffusion_model.single_blocks.0.linear2.weight"
        shape = model.model_state_dict()[key].shape
        styled.add_patches({key: ("diff", (torch.full(shape, nan),))})
        found[name]["lora"] = attempt(styled, latent, positive, samplers[name])
    return found


def saved(work: Path) -> dict[str, Any]:
    """Save an adapted model, its base, and a GM model with ComfyUI's node ModelSave."""
    import comfy_extras.nodes_model_merging as merging

    save = merging.ModelSave()
    save.output_dir = str(work / "out")
    adapted, latent, positive = flux(work)
    sampler, found = ours("gm_sampler").gm_sampler("gm-ode"), {}
    before = sample(adapted, latent, positive, sampler)
    base = adapted.clone()
    base.object_patches, base.patches, base.patches_uuid = {}, {}, uuid.uuid4()
    for name, model in {"adapted": adapted, "base": base, "board": board()[0]}.items():
        found[name] = says(lambda m=model, name=name: save.save(m, f"models/{name}"))
    found["files"] = sorted(path.name for path in (work / "out").glob("**/*.safetensors"))
    found["same"] = bool(torch.equal(sample(adapted, latent, positive, sampler), before))
    return found


def valid(work: Path) -> dict[str, str]:
    """Sample with what other nodes may hand on, and with time shifts at which sigma rounds up.

    Returns:
        The message of each that was refused, "differs" if the result is not as it must be.
    """
    import comfy.samplers
    import comfy_extras.nodes_model_advanced as advanced
    import numpy as np

    import nodes

    execute = nodes.NODE_CLASS_MAPPINGS["GMFlowSampler"].execute
    board_model, zeros, _ = board()
    digits = nodes.NODE_CLASS_MAPPINGS["GMFlowLoader"].execute("digits_k8.safetensors")[0]
    labels, none, latent = nodes.NODE_CLASS_MAPPINGS["GMFlowClassLabels"].execute(
        digits, "3", repeat=2
    )[:3]
    usual = {"seed": 5, "steps": 1, "solver": "gm-sde", "order": 1, "substeps": 1}
    usual |= {"shift": 1.0, "denoise": 1.0, "guidance": 0.1}

    def run(model=digits, positive=labels, mask=None, index=None, **changed) -> Tensor:
        given = {**latent, "noise_mask": mask, "batch_index": index}
        if model is not digits:
            given["samples"] = zeros
        return execute(model, given, positive=positive, **{**usual, **changed})[0]["samples"]

    about = {**labels[0][1], "attention_mask": torch.full((1, 1), -torch.inf), "more": object()}
    same = {
        "scalars": {"seed": np.int64(5), "steps": torch.tensor(1), "shift": np.float32(1)},
        "whole floats": {"steps": 1.0, "shift": 1},
        "rounding": {"denoise": 1 + 1e-9},
        "no negative, unknown links": {"negative": [], "unknown": zeros, "optional": labels},
        "no tensor": {"positive": [[None, about]]},
        "more in a pair": {"positive": [[*labels[0], "more"]]},
        "indices": {"index": np.arange(2)},
        "tensors": {"index": list(torch.arange(2))},
        "a mask of another size": {"mask": torch.ones(3, 5).half()},
    }
    found, expected = {}, run(negative=none)

    def attempt(name, call, expected=None):
        results = []
        found[name] = says(lambda: results.append(call()))
        if results and expected is not None and not torch.equal(results[0], expected):
            found[name] = "differs"

    for name, changed in same.items():
        attempt(name, lambda changed=changed: run(**changed), expected)
    attempt("negative seed", lambda: run(seed=-1), run(seed=2**64 - 1))
    attempt("one index", lambda: run(board_model, None, index=[3], guidance=0.0))
    density = nodes.NODE_CLASS_MAPPINGS["GMFlowDensity"].execute
    shown = {"samples": zeros, "batch_index": [0, 1, 2]}
    attempt("shown", lambda: density(shown, 64, 16, 4.4, np.bool_(False), np.bool_(True)))
    for shift in (0.01, 0.34, 0.4):
        (other,) = advanced.ModelSamplingSD3().patch(board_model, shift)
        table = comfy.samplers.calculate_sigmas(
            other.get_model_object("model_sampling"), "simple", 2
        )
        for solver in (
            comfy.samplers.sampler_object("euler"),
            ours("gm_sampler").gm_sampler("gm-ode"),
        ):
            attempt(
                f"shift {shift} {solver.sampler_function.__name__}",
                lambda other=other, solver=solver, table=table: sample(
                    other, zeros, ours("label_conditioning").NO_TEXT, solver, sigmas=table
                ),
            )
    return found


def odd_neighbours(work: Path) -> dict[str, Any]:
    """Sample after nodes that make a sampling anew, and with what no picture can come from."""
    import comfy.samplers
    import comfy_extras.nodes_model_advanced as advanced

    import nodes

    euler, gm = comfy.samplers.sampler_object("euler"), ours("gm_sampler").gm_sampler("gm-ode")
    table = ours("gm_sampler").gm_sigmas(2, 1.0)
    rescaling = getattr(advanced, "ModelNoiseScale", None)  # older versions of ComfyUI lack it
    found: dict[str, Any] = {"refused": {}, "far": [], "channels": []}
    for name, (model, latent, positive) in {"board": board(), "flux": flux(work)}.items():
        network = model.model.diffusion_model
        found["channels"].append([network.in_channels, network.out_channels])
        said = found["refused"][name] = {}
        for kind, sampler in (("gm", gm), ("stock", euler)):
            if rescaling is not None:
                (same,), (eight,) = (rescaling().patch(model, scale) for scale in (1.0, 8.0))
                pair = [sample(each, latent, positive, sampler) for each in (same, model)]
                found["far"].append(far(*pair))
                said[f"{kind}: noise of scale 8"] = says(
                    partial(sample, eight, latent, positive, sampler)
                )
            for what, sigmas in {
                "end at 1": table[:1],
                "(1, 3)": table[None],
                "complex64": table.to(torch.complex64),
            }.items():
                said[f"{kind}: {what}"] = says(
                    partial(sample, model, latent, positive, sampler, sigmas=sigmas)
                )
    ((text, about),) = positive
    odd = {
        "holds no text": [[None, about]],
        "(6, 4096)": [[text[0], about]],
        "(1, 0, 4096)": [[text[:, :0], about]],
        "7 features": [[text, {**about, "pooled_output": torch.zeros(1, 7)}]],
        "is nan": [[text, {**about, "guidance": float("nan")}]],
        "is 'high'": [[text, {**about, "guidance": "high"}]],
    }
    for what, conditioning in odd.items():
        found["refused"]["flux"][f"text: {what}"] = says(
            partial(sample, model, latent, conditioning, gm)
        )
    found["refused"]["flux"]["negative: holds no text"] = says(
        partial(sample, model, latent, positive, euler, cfg=2.0, negative=[[None, about]])
    )
    (work / "damaged.safetensors").write_bytes(b"x" * 64)
    try:
        nodes.NODE_CLASS_MAPPINGS["GMFlowLoader"].execute(
            "digits_k8.safetensors", str(work / "damaged.safetensors")
        )
    except Exception as error:
        found["class"] = type(error).__name__
        found["refused"]["board"]["file: damaged.safetensors is not a whole"] = str(error)
    fine = [[text, {**about, "guidance": torch.tensor(3.5)}]]
    found["fine"] = says(partial(sample, model, latent, fine, gm, negative=[[None, about]]))
    return found


def linked(work: Path) -> dict[str, str]:
    """Give GM Sampler what links may bring, and collect what it says."""
    import nodes

    model, latent, positive = board()
    text = torch.ones(1, 2, 8)
    one, nan = latent[:1], torch.full((1, 8), float("nan"))
    values: dict[str, dict[str, Any]] = {
        "good": {"noise_mask": torch.ones(2, 8, 8), "batch_index": [3, 4]},
        "mask nan": {"noise_mask": torch.full((2, 8, 8), float("nan"))},
        "mask int": {"noise_mask": torch.ones(2, 8, 8, dtype=torch.int64)},
        "index negative": {"batch_index": [0, -1]},
        "index text": {"batch_index": "01"},
        "index fraction": {"batch_index": [0, 0.5]},
        "complex": {"samples": latent.to(torch.complex64)},
        "8 bit": {"samples": latent.to(torch.float8_e4m3fn)},
        "meta": {"samples": latent.to("meta")},
        "flat": {"samples": one[0, 0]},
        "empty": {"samples": latent[:0]},
    }
    conditionings = {
        "text nan": [[text * float("nan"), {}]],
        "pooled nan": [[text, {"pooled_output": nan}]],
    }
    settings = {"seed": 0, "steps": 1, "solver": "gm-ode", "order": 1, "substeps": 1}
    settings |= {"shift": 1.0, "denoise": 1.0}
    node = nodes.NODE_CLASS_MAPPINGS["GMFlowSampler"]

    def run(about: dict[str, Any], conditioning: list) -> str:
        given = {"model": model, "latent_image": {"samples": latent, **about}, **settings}
        return says(lambda: node.execute(positive=conditioning, **given))

    labels = nodes.NODE_CLASS_MAPPINGS["GMFlowClassLabels"]
    long = {"model": model, "label": "1", "more_labels": "x" * 1_000_001, "repeat": 1}
    return {
        **{name: run(about, positive) for name, about in values.items()},
        **{name: run({}, conditioning) for name, conditioning in conditionings.items()},
        "long text": says(lambda: labels.execute(**long)),
    }


CASES = {
    "valid": valid,
    "linked": linked,
    "odd neighbours": odd_neighbours,
    "wrapped": wrapped,
    "soft masks": soft_masks,
    "compiled": compiled,
    "not a flow": not_a_flow,
    "not finite": not_finite,
    "regions": regions,
    "skipped": skipped,
    "changed positive": changed_positive,
    "orders": orders,
    "saved": saved,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
