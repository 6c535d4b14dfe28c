"""Save a checkpoint over and over, each time as another training step would."""

from __future__ import annotations

import torch

from gmflow_core import save_checkpoint
from gmflow_core.files.atomic import WriteError, remove_leftovers
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig

SAVES = 8


def main(arguments: list[str]) -> None:
    """Save a network to the path that is given, `SAVES` times.

    Raises:
        SystemExit: it cannot be written; the message is a command's.
    """
    try:
        save(arguments[0])
    except WriteError as error:
        raise SystemExit(f"error: {error}") from error


def save(path: str) -> None:
    """Save a network of 16 MB over and over."""
    remove_leftovers(path.rpartition("/")[0])
    torch.manual_seed(0)
    network = GMFlowMLP(GMFlowMLPConfig(num_components=8, embed_dim=64, hidden_dim=1000))
    for step in range(SAVES):
        save_checkpoint(network, path, facts={"step": step})
