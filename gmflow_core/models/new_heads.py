"""New heads to train: they begin as the base model's last layers, a little spread.

Source: pi-Flow (Chen et al. 2025, arXiv 2510.14974): the means are copies of the last layer with
slightly different biases, the weights equal, and the standard deviation .05.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapter_heads import DXHead, GMHead, Head, HeadLayout

SPREAD, SPREAD_WITHOUT_BIAS = 0.05, 0.1  # of the means' biases
STD = 0.05
LOG_STD_WIDTHS = (1024,)
NARROW_WIDTHS = (64,)  # the same of heads that see sigma alone


@dataclass(frozen=True)
class LastLayers:
    """Weights of a base model's last layers, in float32, in the base model's own order.

    Args:
        weight, bias: of the last linear layer, (patch^2 C, D) and (patch^2 C,) or None.
        modulation, modulation_bias: of the linear layer of the last adaptive norm, (2 D, D) and
            (2 D,) or None, the rows of the scale first; None for layouts with `linear_only`.
    """

    weight: Tensor
    bias: Tensor | None
    modulation: Tensor | None = None
    modulation_bias: Tensor | None = None


def new_gm_head(
    last: LastLayers, layout: HeadLayout, count: int, generator: torch.Generator
) -> GMHead:
    """Return a head of K = `count` Gaussians whose mean is about what `last` predicts.

    Args:
        generator: draws the means' spread, and the first layers of the standard deviation.
    """
    width = last.weight.shape[1]
    head = GMHead(width, layout, count, NARROW_WIDTHS if layout.linear_only else LOG_STD_WIDTHS)
    start_norm(head, last)
    weight, bias = _in_our_order(last, layout)
    start_bias = torch.zeros(layout.width) if bias is None else bias
    spread = SPREAD_WITHOUT_BIAS if bias is None else SPREAD
    shifts = spread * torch.randn(count, layout.channels, 1, generator=generator)
    biases = start_bias.unflatten(0, (layout.channels, -1)) + shifts  # (K, C, p^2)
    head.proj_out_means.weight.data = weight.repeat(count, 1)
    head.proj_out_means.bias.data = biases.flatten()
    head.proj_out_logweights.weight.data.zero_()
    head.proj_out_logweights.bias.data.zero_()
    *inner, outer = (layer for layer in head.proj_out_logstds if isinstance(layer, nn.Linear))
    for layer in inner:
        bound = math.sqrt(6 / sum(layer.weight.shape))  # Xavier's
        layer.weight.data.uniform_(-bound, bound, generator=generator)
        layer.bias.data.zero_()
    outer.weight.data.zero_()
    outer.bias.data.fill_(math.log(STD))
    return head


def new_dx_head(last: LastLayers, layout: HeadLayout, count: int, settings: dict) -> DXHead:
    """Return a head of N = `count` times that all predict what `last` does.

    Args:
        settings: keyword arguments for `DXVelocity`.
    """
    head = DXHead(last.weight.shape[1], layout, count, settings)
    start_norm(head, last)
    weight, bias = _in_our_order(last, layout)
    head.proj_out.weight.data = weight.repeat(count, 1)
    head.proj_out.bias.data = (torch.zeros(layout.width) if bias is None else bias).repeat(count)
    return head


def start_norm(head: Head, last: LastLayers) -> None:
    """Copy the base model's last adaptive norm into a head that has one."""
    if head.layout.linear_only:
        return
    linear = head.norm_out["linear"]
    linear.weight.data = last.modulation.clone()
    if linear.bias is not None:
        linear.bias.data = last.modulation_bias.clone()


def _in_our_order(last: LastLayers, layout: HeadLayout) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of velocities in the order (c, p, p), (C patch^2, ...) each."""
    sign = -1 if layout.negative else 1

    def arranged(rows: Tensor) -> Tensor:
        if layout.channels_last:
            rows = rows.unflatten(0, (-1, layout.channels)).transpose(0, 1).flatten(0, 1)
        return sign * rows

    return arranged(last.weight), None if last.bias is None else arranged(last.bias)
