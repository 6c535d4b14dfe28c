"""Conditionings that name classes, or the modes of a mixture source, instead of a text."""

from __future__ import annotations

import torch

from ...gmflow_core.files.errors import quoted

LABELS = "gmflow_labels"  # key in a conditioning: integers (n,)
SOURCE = "gmflow_source"  # key in a conditioning: the SourceNoise whose modes LABELS names
NO_CLASS = -1  # the label for "no class", whatever the model
NO_TEXT = [[torch.zeros(1, 1, 1), {}]]  # CONDITIONING without labels, for models that take none


def class_conditioning(labels: list[int]) -> list:
    """Return CONDITIONING that holds nothing but labels.

    Its tensor is a one, so that the stock ConditioningZeroOut turns it into "no class".
    """
    return [[torch.ones(1, 1, 1), {LABELS: torch.tensor(labels)}]]


def problem_of(about: dict) -> str:
    """Return what is wrong with the labels in a conditioning's dict, "" if nothing is."""
    labels, source = about.get(LABELS), about.get(SOURCE)
    if labels is not None:
        whole = torch.is_tensor(labels) and labels.dtype in (torch.int64, torch.int32)
        if not whole or labels.ndim != 1 or not len(labels):
            return f"{LABELS} is {quoted(labels)}; it must be a tensor of whole numbers (n,)"
    if source is not None and not hasattr(source, "generate_noise"):
        return f"{SOURCE} is {quoted(source)}; 'GM Mixture Source Noise' puts it there"
    return ""


def unconditional() -> list:
    """Return CONDITIONING that says nothing, for models of any kind."""
    return class_conditioning([NO_CLASS])
