"""Ask GM Train Adapter for what cannot be done, for `train_inside.py`."""

from __future__ import annotations

import json
from typing import Any

import torch
from inside import ours, says
from safetensors import safe_open
from safetensors.torch import save_file
from train_parts import TEACHERS, WORK, prompts, settings, train

MARK = "gmflow.training"


def with_entry(**more: Any) -> list[list]:
    """Return a conditioning with further entries."""
    found = prompts("sd3")
    found[0][0][1].update(more)
    return found


def refused() -> dict[str, Any]:
    """Ask for what cannot be done: each is refused before any work."""
    import comfy.sd
    import folder_paths

    def refuse(kind: str = "sd3", **changed: Any) -> str:
        return says(lambda: train(kind, changed.pop("name", "refused"), **changed))

    def begin(policy: str, **found: Any) -> str:
        own = settings(policy=policy, count=8)
        return says(lambda: ours("train_adapter").check_policy(found, own, "warm"))

    published = {"type": "DX", "segment_size": 0.2857, "shift": 3.2, "eps": 1e-4}
    adapted = train("sd3", "adapted", iterations=1)[0]
    plain = comfy.sd.load_diffusion_model(str(WORK[0] / "none.safetensors"))
    schnell = comfy.sd.load_diffusion_model(str(WORK[0] / "schnell.safetensors"))
    texts = ours("train_prompts")
    folder_paths.set_input_directory(str(WORK[0]))
    (WORK[0] / "empty.txt").write_text("\n \n")
    two = prompts("flux", 2)
    two[1][0][1]["guidance"] = 1.0
    huge = torch.empty(1, 1).expand(2**30, 2**12)  # 16 TiB, if it were no view
    part = prompts("sd3")
    part[0][0][1]["area"] = (4, 4, 0, 0)
    (WORK[0] / "loras" / "none.txt").touch()
    nan, wide = prompts("sd3"), {kind: prompts(kind) for kind in TEACHERS}
    nan[0][0][0].fill_(torch.nan)
    for (pair,), *_ in wide.values():
        pair[0] = torch.zeros(1, 4, 7)
    (WORK[0] / "long.txt").write_text("short\n" + 20_001 * "a")
    with ours("train_adapter").locked_file(WORK[0] / "loras" / "refused.safetensors"):
        locked = refuse()
    return {
        "adapter": refuse(model=adapted),
        "base": refuse(model=plain),
        "schnell": refuse("flux", model=schnell),
        "size": refuse(latent=torch.zeros(1, 16, 7, 8)),
        "name": refuse(name="../outside"),
        "long name": refuse(name="长" * 100),
        "no folder": refuse(name="none.txt/adapter"),
        "guidances": refuse("flux", prompts=two),
        "negative": refuse(guidance="cfg"),
        "weight": refuse(guidance="probabilistic", scale=1.5, negative=prompts("sd3")[0]),
        "nan": refuse(prompts=nan),
        "no prompts": says(lambda: texts.prompts_of([], None, "")),
        "no file": says(lambda: texts.prompts_of([], object(), "missing.txt")),
        "empty file": says(lambda: texts.read_prompts("empty.txt")),
        "outside": says(lambda: texts.read_prompts("../secret.txt")),
        "memory": says(lambda: texts.check_room([[huge, {}]], 1)),
        "part": says(lambda: texts.prompts_of(part, None, "")),
        "mask": says(lambda: texts.prompts_of(with_entry(mask=torch.ones(1, 8, 8)), None, "")),
        "strength": says(lambda: texts.prompts_of(with_entry(strength=0.0), None, "")),
        "widths": {kind: refuse(kind, prompts=texts) for kind, texts in wide.items()},
        "long prompt": says(lambda: texts.read_prompts("long.txt")),
        "windows": refuse(name="folder/Con.v2"),
        "locked": locked,
        "warm polynomial": begin("dx", **published, mode="polynomial"),
        "warm shift": begin("dx", **{**published, "shift": 1.0}),
        "warm kind": begin("gm", **published),
        "warm ArcFlow": begin("gm", type="ArcFlow"),
        "warm published": begin("dx", **published) + begin("gm", type="GMFlow", num_gaussians=8),
        "files": ", ".join(sorted(p.name for p in (WORK[0] / "loras").glob("refused*"))),
    }


def damaged() -> dict[str, str]:
    """Go on from states that someone has edited: each is refused in words."""
    train("sd3", "damaged", iterations=1)
    path = WORK[0] / "loras" / "damaged.training"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        record = json.loads(file.metadata()[MARK])
    [first, *_] = (name for name in tensors if name.startswith("value."))
    nan = tensors[first].clone().fill_(torch.nan)
    less = {name: value for name, value in tensors.items() if name != "average" + first[5:]}

    def go_on(about: dict[str, Any], tensors: dict[str, torch.Tensor] = tensors) -> str:
        save_file(tensors, path, {MARK: json.dumps({**record, **about})})
        return says(lambda: train("sd3", "damaged", iterations=2))

    return {
        "about": go_on({"about": 3}),
        "iteration": go_on({"iteration": "7"}),
        "numbers": go_on({"numbers": None}),
        "losses": go_on({"losses": [None]}),
        "tensor": go_on({}, {**tensors, "strange": nan}),
        "nan": go_on({}, {**tensors, first: nan}),
        "average": go_on({}, less),
        "moment": go_on({}, {**tensors, "optimizer.0.exp_avg": torch.zeros(1)}),
        "index": go_on({"numbers": {"999.step": 1.0}}),
        "whole": go_on({}),
    }
