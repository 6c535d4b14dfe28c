"""Time an iteration of GM Train Adapter inside ComfyUI's process, for `train_adapter_cost.py`.

    COMFYUI/.venv/bin/python train_adapter_cost_inside.py COMFYUI WORK

WORK holds `flux.safetensors` and `job.json`. Prints the seconds and the bytes as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
FLUX = {"latent": (16, 8, 8), "text": 4096, "pooled": 768, "guidance": 3.5}
BUDGET = 40.0  # seconds of a case


def main(comfyui: str, folder: str) -> None:
    """Measure one case."""
    sys.path[:0] = [str(REPOSITORY / "tests" / "comfyui"), str(REPOSITORY)]
    import inside
    import train_parts

    from tests.benchmarks.measure import extra_memory, take_turns

    work = Path(folder)
    job = json.loads((work / "job.json").read_text())
    side, batch = job.pop("side"), job.pop("batch")
    train_parts.WORK.append(work)
    train_parts.TEACHERS["flux"] = FLUX
    inside.start(comfyui)
    run = train_parts.settings(iterations=1, **job)
    found: dict[str, Any] = {}

    def loop(training: Any, calls: Any, shape: torch.Size, device: torch.device) -> None:
        def ours() -> None:
            training.watch.problem(training._iterate(calls, shape, device))
            training._remember()
            training._step()

        forms = {"ours": ours, "plain": plain_loop(training, calls, shape)}
        found.update(take_turns(forms, "cpu", BUDGET))
        found["memory"] = {name: extra_memory(form, "cpu") for name, form in forms.items()}

    adapter = inside.ours("train_adapter")
    model = train_parts.base_of("flux")
    base = inside.ours("bases").base_of(model)
    with inside.ours("train_network").learning():
        head, places, pairs, policy = adapter.beginning(model, base, run)
        student = inside.ours("train_student").Student(
            model, base, places, pairs, run.checkpointing
        )
    nothing = [lambda *_: None] * 3
    training = inside.ours("train_run").Training(student, run, policy, 1, *nothing, head)
    training._loop = lambda *given: loop(training, *given)
    empty = torch.zeros(batch, 16, side, side)
    with torch.inference_mode(False):
        adapter._sample(training, train_parts.prompts("flux"), None, empty.shape)
    print(json.dumps(found))


def plain_loop(training: Any, calls: Any, shape: torch.Size) -> Callable[[], None]:
    """Return an iteration of the same calls of the network, with neither guider nor policy."""
    import inside

    run, student = training.run, training.student
    differentiable = inside.ours("train_network").Differentiable
    parameters = [p.detach().clone().requires_grad_(True) for p in training.parameters.values()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    cond = calls.conds[calls.prompt][0]
    text, pooled = (cond["model_conds"][n].cond for n in ("c_crossattn", "y"))
    guidance = cond["model_conds"]["guidance"].cond.expand(shape[0])
    given = text.expand(shape[0], -1, -1), pooled.expand(shape[0], -1), guidance

    def network(is_student: bool) -> torch.Tensor:
        student.switch.student = is_student
        x = torch.randn(shape)
        with differentiable():
            return student.network(x, torch.rand(shape[0]), *given)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(run.steps):
            mean, loss = network(True), 0.0
            for _ in range(run.states):
                with torch.no_grad():
                    target = network(False)
                loss = loss + (mean - target).square().mean()
            student.switch.student = True  # for what the backward pass computes again
            loss.backward()
        for own, value in zip(parameters, training.parameters.values(), strict=True):
            own.grad, value.grad = value.grad, None  # the network's weights stay as they are
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 0.01)

    return step


if __name__ == "__main__":
    main(*sys.argv[1:])
