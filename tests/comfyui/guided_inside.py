"""What guidance by a weight predicts inside ComfyUI's process, for `plain_inside.py`."""

from __future__ import annotations

from typing import Any

import torch
from exact_model import SHAPE, exact_model, stock, text
from inside import far, ours, says


def weight_zero() -> dict[str, Any]:
    """Count the predictions of two steps at weight 0, by every door, and if a node reads both."""
    import nodes

    model, sizes, found = exact_model("FLOW"), [], {}
    count = model.model.diffusion_model.register_forward_pre_hook
    count(lambda _, given: sizes.append(len(given[0]) // SHAPE[0]))
    steered, zeros = ours("guiders").guided(model), torch.zeros(SHAPE)
    reading = steered.clone()
    reading.set_model_sampler_post_cfg_function(lambda args: 0 * args["uncond_denoised"])
    node, guider = nodes.NODE_CLASS_MAPPINGS["GMFlowSampler"], ours("guiders").gm_guider
    sampler = ours("gm_sampler").gm_sampler("gm-ode")
    sigmas, about = torch.tensor([1.0, 0.5, 0.0]), (5, 2, "gm-ode", 2, 0, 0.0, 1.0)
    doors = {
        "guider": lambda: guider(steered, text(), text(-1.0)).sample(zeros, zeros, sampler, sigmas),
        "stock": lambda: stock(steered, "euler", steps=2, cfg=0.0, negative=text(-1.0)),
        "node": lambda: node.execute(steered, {"samples": zeros}, *about, positive=text()),
        "read": lambda: stock(reading, "euler", steps=2, cfg=0.0, negative=text(-1.0)),
    }
    for name, door in doors.items():
        door()
        found[name] = [sizes.pop(0) for _ in range(len(sizes))]
    return found


class Halving:
    """A node that spoils half of the negative prediction, as Skip Layer Guidance spoils it all."""

    @staticmethod
    def patch(model: Any, told: list[bool]) -> Any:
        """Return a clone of the model; `told` gets whether each call has a negative."""
        import comfy.samplers

        def calc(args: dict) -> list[torch.Tensor]:
            told.append(args["conds"][1] is not None)
            names = ("model", "conds", "input", "sigma", "model_options")
            cond, uncond = comfy.samplers.calc_cond_batch(*(args[name] for name in names))
            uncond[..., : SHAPE[-1] // 2] = 0
            return [cond, uncond]

        model = model.clone()
        model.set_model_sampler_calc_cond_batch_function(calc)
        return model


def caching(model: Any) -> Any:
    """Return a clone that predicts x itself and asks no guider, as LazyCache in later steps."""
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "cache", lambda _, x, *rest: x)
    return model


def weight_zero_with_attention_guidance() -> dict[str, Any]:
    """Normalized Attention Guidance asks for the negative at any cfg, before our node or after."""
    model, sizes, said = exact_model("FLOW"), [], []
    guiders = ours("guiders")

    def asking(model: Any) -> Any:
        model = model.clone()
        model.model_options["disable_cfg1_optimization"] = True
        return model

    count = model.model.diffusion_model.register_forward_pre_hook
    count(lambda _, given: sizes.append(len(given[0]) // SHAPE[0]))
    guided, kept = guiders.guided, (guiders.no_effect, guiders.notice)
    for each in (guided(guided(asking(model))), asking(guided(model)), guided(model)):
        stock(each, "euler", steps=1, cfg=0.0, negative=text(-1.0))
    try:
        guiders.no_effect = lambda what, why: said.append(what)
        for each in (asking(model), asking(guided(model)), model, guided(model)):
            guiders.gm_guider(each, text(), text(-1.0))
            said.append("")
        guiders.notice = said.append
        zeros, sigmas = torch.zeros(SHAPE), torch.tensor([1.0, 0.0])
        alone = guiders.gm_guider(asking(model), text())
        alone.sample(zeros, zeros, ours("gm_sampler").gm_sampler("gm-ode", quiet=True), sigmas)
    finally:
        guiders.no_effect, guiders.notice = kept
    return {"sizes": sizes, "said": said}


def other_function() -> dict[str, Any]:
    """Guide beside a node that has its own function for predictions, before guidance and after."""
    model, told = exact_model("FLOW"), []
    guided, auto = ours("guiders").guided, ours("autoguider").AutoGuider

    def run(model: Any) -> torch.Tensor:
        return stock(model, "euler", steps=2, cfg=0.4, negative=text(-1.0))

    settings = (0.0, 0.0, 0.4)  # orthogonal, and the part: of two steps, the first
    plain = run(guided(model, *settings))
    before = run(guided(guided(Halving.patch(model, told)), *settings))
    after = run(Halving.patch(guided(model, *settings), told))
    halved = Halving.patch(model, told)
    return {
        "effect": far(before, plain),
        "order": far(before, after),
        "told": told,
        "cached": says(lambda: run(caching(guided(model)))),
        "auto": [
            says(lambda pair=pair: auto(*pair, text(), text(), 2.0, (0.0, 1.0)))
            for pair in ((halved, exact_model("FLOW")), (exact_model("FLOW"), halved))
        ],
    }
