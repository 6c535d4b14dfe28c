"""Save a checkpoint over and over, each time as another training step would."""

from __future__ import annotations

import torch

from gmflow_core import save_checkpoint
from gmflow_core.files.atomic import remove_leftovers
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig

SAVES = 8


def main(arguments: list[str]) -> None:
    """Save a network of 8 MB to the path that is given, `SAVES` times."""
    (path,) = arguments
    remove_leftovers(path.rpartition("/")[0])
    torch.manual_seed(0)
    network = GMFlowMLP(GMFlowMLPConfig(num_components=8, embed_dim=64, hidden_dim=1000))
    for step in range(SAVES):
        save_checkpoint(network, path, facts={"step": step})
