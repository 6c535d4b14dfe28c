"""Measure what distillation costs beside its networks, and how that grows.

    python -m tests.benchmarks.distill_cost                          # three minutes on one thread
    LAKONLAB_PATH=... python -m tests.benchmarks.distill_cost        # beside LakonLab's segment

Every row runs an iteration of training.distill and a plain loop of the same two networks in turns:
the student's forward and backward pass, the teacher's passes, AdamW and the average of the
weights, but no policy that is followed. The ratio of the two is what the method costs. The segment
alone, without networks, is compared with LakonLab's own, whose definitions are run from a checkout.
Writes docs/results/distill_cost.csv when all rows are measured.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmflow_core import GaussianMixture, save_checkpoint
from gmflow_core.flow.imitation import ImitationSettings, imitate_segment
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from training.loop.distill_presets import PRESETS
from training.loop.distill_trainer import DistillTrainer

from .measure import extra_memory, quartiles, ratios, take_turns
from .peers import PLACES, definitions
from .tables import RESULTS, write

DIGITS = {"num_layers": 6, "num_heads": 4, "head_dim": 32, "log_std_dim": 128}
SMALL = {"num_layers": 12, "num_heads": 6, "head_dim": 64, "log_std_dim": 256}  # DiT-S
CSV = RESULTS / "distill_cost.csv"
BUDGET = 8.0  # seconds of a row
Row = dict[str, Any]
USUAL = {"size": 8, "batch_size": 64, "num_components": 8, "states": 2, "substeps": 32}
CASES: list[tuple[str, dict, dict]] = [
    ("the digits' network", DIGITS, {}),
    ("K = 1", DIGITS, {"num_components": 1}),
    ("K = 32", DIGITS, {"num_components": 32}),
    ("1 state", DIGITS, {"states": 1}),
    ("4 states", DIGITS, {"states": 4}),
    ("128 substeps", DIGITS, {"substeps": 128}),
    ("16 x 16", DIGITS, {"size": 16, "batch_size": 16}),
    ("32 x 32", DIGITS, {"size": 32, "batch_size": 4}),
    ("DiT-S, 8 x 8", SMALL, {"batch_size": 16}),
    ("DiT-S, 32 x 32", SMALL, {"size": 32, "batch_size": 1}),
]


def teacher_file(folder: Path, sizes: dict, size: int, components: int) -> Path:
    """Write a random teacher of coloured pictures."""
    path = folder / f"teacher_{sizes['num_layers']}_{size}_{components}.safetensors"
    if not path.exists():
        config = GMDiTConfig(
            channels=3, latent_size=size, num_classes=10, num_components=components, **sizes
        )
        save_checkpoint(GMDiT(config), path, data={"space": "pixels"})
    return path


def plain_loop(trainer: DistillTrainer) -> Callable[[], None]:
    """Return an iteration of the same two networks, without a policy that is followed."""
    config, teacher = trainer.config, trainer.teacher
    student = copy.deepcopy(trainer.model)
    average = [parameter.detach().clone() for parameter in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, fused=True)
    shape = (config.batch_size, *trainer.shape)

    def step() -> None:
        optimizer.zero_grad()
        labels = torch.randint(0, 10, (config.batch_size,))
        mean = student(torch.randn(shape), torch.ones(config.batch_size), labels).mean()
        loss = torch.zeros(())
        for _ in range(config.states):
            with torch.no_grad():
                target = teacher(torch.randn(shape), torch.rand(config.batch_size), labels).mean()
            loss = loss + (mean - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(student.parameters()), 0.01)

    return step


def iteration_row(folder: Path, name: str, sizes: dict, changes: dict) -> Row:
    """Return times and memory of an iteration beside the plain loop's."""
    about = {**USUAL, **changes}
    settings = {key: value for key, value in about.items() if key != "size"}
    teacher = teacher_file(folder, sizes, about["size"], about["num_components"])
    places = {"teacher": str(teacher), "out": folder / "out", "restart": True, "device": "cpu"}
    config = dataclasses.replace(PRESETS["small"], **settings, **places)
    trainer = DistillTrainer(config)
    plain = plain_loop(trainer)
    found = take_turns({"ours": trainer.iterate, "plain": plain}, "cpu", BUDGET)
    low, ratio, high = ratios(found["ours"], found["plain"])
    memory = {"ours": trainer.iterate, "plain": plain}
    held = {key: extra_memory(function, "cpu") for key, function in memory.items()}
    return {
        "case": name,
        **about,
        "seconds": quartiles(found["ours"])[1],
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "memory_ratio": held["ours"] / held["plain"],
    }


def segment_row(name: str, states: int, window: int, substeps: int) -> Row:
    """Return the time of a segment and its backward pass beside LakonLab's own."""
    shape = (16, 3, 32, 32)
    means, logits, log_std = torch.randn(16, 8, *shape[1:]), torch.randn(16, 8, 1, 32, 32), -1.0
    parts = means, logits.log_softmax(1), torch.full((16, 1, 1, 1, 1), log_std)
    parts = [part.requires_grad_() for part in parts]
    x, start, size = torch.randn(shape), torch.ones(16), torch.full((16,), 0.5)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x

    def ours() -> None:
        settings = ImitationSettings(states, window, substeps, 0.1)
        uniform = lambda count: torch.rand(16, count)  # noqa: E731
        given = GaussianMixture(*parts), x, start, size, velocity, settings, uniform
        imitate_segment(*given)[0].mean().backward()

    forms = {"ours": ours}
    variable, _ = PLACES["LakonLab"]
    if os.environ.get(variable):
        root = Path(os.environ[variable])
        forms["LakonLab"] = lakonlab_segment(root, parts, x, start, size, states, window, substeps)
    found = take_turns(forms, "cpu", BUDGET)
    row = {"case": name, "size": 32, "batch_size": 16, "num_components": 8, "states": states}
    row |= {"substeps": substeps, "seconds": quartiles(found["ours"])[1]}
    if "LakonLab" in found:
        low, ratio, high = ratios(found["ours"], found["LakonLab"])
        row |= {"to_lakonlab": ratio, "ratio_low": low, "ratio_high": high}
    return row


def lakonlab_segment(root: Path, parts, x, start, size, states, window, substeps) -> Callable:
    """Return LakonLab's segment and its backward pass, from the definitions in its checkout."""
    folder = root / "lakonlab/models/diffusions"
    mean = definitions(folder / "gmflow.py", ("gmflow_posterior_mean_jit",))
    base = definitions(
        folder / "piflow_policies/base.py", ("BasePolicy",), ABCMeta=type, abstractmethod=_same
    )
    policy = definitions(
        folder / "piflow_policies/gmflow.py", ("GMFlowPolicy",), **vars(mean), **vars(base)
    ).GMFlowPolicy
    known = {"GaussianFlow": object, "partial": partial, "module_eval": _Nothing}
    flow = definitions(folder / "piflow.py", ("PiFlowImitationBase",), **known)
    times = definitions(folder / "sampler.py", ("ContinuousTimeStepSampler",), decorated=False)
    run = object.__new__(flow.PiFlowImitationBase)
    run.train_cfg = {
        "total_substeps": substeps,
        "num_intermediate_states": states,
        "window_substeps": window,
        "policy_dropout": 0.1,
    }
    run.timestep_sampler = times.ContinuousTimeStepSampler(1)
    run.flow_loss = lambda found: (found["u_t_pred"] - found["u_t"]).square().mean()
    names = ("means", "logweights", "logstds")

    def segment() -> None:
        given = policy(dict(zip(names, parts, strict=True)), x, start.reshape(-1, 1, 1, 1))
        teacher = lambda x_t, **others: 0.5 * x_t  # noqa: E731
        arguments = teacher, given, x, start, start.reshape(-1, 1, 1, 1), 0.0, size, {}
        run.piid_segment(*arguments, get_x_t_dst=True)[0].backward()

    return segment


def _same(function: Callable) -> Callable:
    return function


class _Nothing:
    """A context that does nothing."""

    def __init__(self, *given):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def main() -> None:
    """Measure all rows, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CSV, help="the CSV file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            rows.append(iteration_row(Path(name), *case))
            print(rows[-1], flush=True)
    for name, *settings in (("segment", 2, 3, 128), ("segment, no window", 2, 0, 32)):
        rows.append(segment_row(name, *settings))
        print(rows[-1], flush=True)
    write(rows, arguments.out)


if __name__ == "__main__":
    main()
