"""What guidance by a weight predicts inside ComfyUI's process, for `plain_inside.py`."""

from __future__ import annotations

from typing import Any

import torch
from exact_model import SHAPE, exact_model, stock, text
from inside import ours


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
