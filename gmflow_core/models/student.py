"""Students: networks for imitation distillation, which begin as copies of their teacher.

Source: pi-Flow (Chen et al. 2025, arXiv 2510.14974), section 4: a policy's outputs begin as copies
of the teacher's output layer, told apart by noise on the biases, with equal weights and a small
standard deviation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .ditdh import DiTDH
from .gmdit import GMDiT
from .mlp import GMFlowMLP

BIAS_NOISE = 0.05  # standard deviation, between copies of one output
FIRST_STD = 0.05  # of the velocity, where the teacher predicts none

OUTPUT = {  # last layer of each network: the prefix of its weights' names
    GMDiT: "proj_out_2",
    DiTDH: "final_layer.linear",
    GMFlowMLP: "out_means",
}


def new_student(
    teacher: nn.Module, num_components: int, dx: tuple[float, float] | None = None
) -> nn.Module:
    """Create a network that predicts a policy, with the teacher's weights where they fit.

    A mixture of the teacher's K begins as a copy. Otherwise the K outputs begin as copies of the
    teacher's, or averages of groups of them, and the weights equal; those of a DX policy all begin
    as the average.

    Args:
        teacher: one of `gmflow_core.models`.
        num_components: K of a mixture, or number of times of a DX policy; at least 1.
        dx: segment and shift of a DX policy, see `DXVelocity`; None for a mixture.

    Raises:
        ValueError: the teacher predicts a DX policy itself, or a setting is out of range.
    """
    config = teacher.config
    if config.dx_segment is not None:
        raise ValueError(
            "the teacher predicts a DX policy, so it is a student itself, of few steps; give the "
            "model that it was distilled from"
        )
    segment, shift = dx or (None, 1.0)
    changes = {"num_components": num_components, "dx_segment": segment, "dx_shift": shift}
    if hasattr(config, "spectrum_layers"):
        changes["spectrum_layers"] = None
    student = type(teacher)(replace(config, constant_log_std=None, **changes))
    student = student.to(next(teacher.parameters()).device)
    fresh, given = student.state_dict(), teacher.state_dict()
    kept = {name: t for name, t in given.items() if name in fresh and t.shape == fresh[name].shape}
    if dx is not None or config.num_components != num_components:
        kept |= _outputs(teacher, student)
    student.load_state_dict({**fresh, **kept})
    if dx is None and config.constant_log_std is not None:
        _set_log_std(student)
    return student


def _outputs(teacher: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """Return weights of the student's last layer that stand for K times the teacher's velocity."""
    prefix, found = OUTPUT[type(teacher)], {}
    for part in ("weight", "bias"):
        name = f"{prefix}.{part}"
        rows = _means_of(teacher, teacher.get_parameter(name))  # (p p, K, C, ...)
        size, count = student.config.num_components, rows.shape[1]
        if student.config.dx_segment is not None:
            rows = rows.mean(1, keepdim=True).repeat(1, size, *[1] * (rows.ndim - 2))
        elif size <= count:
            groups = torch.arange(count, device=rows.device) * size // count
            rows = torch.stack([rows[:, groups == k].mean(1) for k in range(size)], 1)
        else:
            rows = rows[:, torch.arange(size, device=rows.device) % count]
        if part == "bias" and size > count and student.config.dx_segment is None:
            noise = torch.randn(size, rows.shape[2], generator=torch.Generator().manual_seed(0))
            rows = rows + BIAS_NOISE * noise.to(rows)
        found[name] = _with_means(student, student.get_parameter(name), rows)
    return found


def _means_of(network: nn.Module, parameter: Tensor) -> Tensor:
    """Return the part of an output layer that gives the means, (pixels of a token, K, C, ...)."""
    config, pixels = network.config, getattr(network.config, "patch_size", 1) ** 2
    rows = parameter.detach().unflatten(0, (pixels, -1))
    count = config.num_components * network.channels
    return rows[:, :count].unflatten(1, (config.num_components, network.channels))


def _with_means(network: nn.Module, parameter: Tensor, means: Tensor) -> Tensor:
    """Return a parameter of an output layer with these means, and weights that are equal."""
    pixels = getattr(network.config, "patch_size", 1) ** 2
    rows = torch.zeros_like(parameter).unflatten(0, (pixels, -1))
    rows[:, : means.shape[1] * means.shape[2]] = means.flatten(1, 2)
    return rows.flatten(0, 1)


def _set_log_std(student: nn.Module) -> None:
    """Let a fresh head of the standard deviation begin with FIRST_STD."""
    last = (
        student.out_logstds
        if isinstance(student, GMFlowMLP)
        else student.gm_out["logstd_layers"][-1]
    )
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, math.log(FIRST_STD))
