"""Conditionings that name classes, or the modes of a mixture source, instead of a text."""

from __future__ import annotations

import torch

LABELS = "gmflow_labels"  # key in a conditioning: integers (n,)
SOURCE = "gmflow_source"  # key in a conditioning: the SourceNoise whose modes LABELS names
NO_CLASS = -1  # the label for "no class", whatever the model
NO_TEXT = [[torch.zeros(1, 1, 1), {}]]  # CONDITIONING without labels, for models that take none


def class_conditioning(labels: list[int]) -> list:
    """Return CONDITIONING that holds nothing but labels.

    Its tensor is a one, so that the stock ConditioningZeroOut turns it into "no class".
    """
    return [[torch.ones(1, 1, 1), {LABELS: torch.tensor(labels)}]]


def unconditional() -> list:
    """Return CONDITIONING that says nothing, for models of any kind."""
    return class_conditioning([NO_CLASS])
