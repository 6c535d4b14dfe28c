"""Convert the state of a model and its optimizer to a checkpoint's tensors, and back.

Names are "model.NAME" for weights and "optimizer.NAME/SLOT" for the optimizer's state of the weight
NAME. Tensors are whole in a checkpoint, so that it can be resumed on any number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.loop.sharding import distribute_like, whole


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the weights and the optimizer's state; all processes gather them together."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {f"model.{name}": whole(t) for name, t in model.state_dict().items()}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            state[f"optimizer.{names[id(parameter)]}/{slot}"] = whole(torch.as_tensor(value))
    return state


def unpack_state(
    state: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load what `pack_state` returned; other entries of `state` are ignored."""
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.load_state_dict(
        {name: distribute_like(weights[name], t) for name, t in model.state_dict().items()}
    )
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            name, slot = key.removeprefix("optimizer.").split("/")
            slots.setdefault(name, {})[slot] = value
    numbered: dict[int, dict] = {}  # optimizers number their parameters, group by group
    for index, (name, parameter) in enumerate(optimized(model, optimizer)):
        for slot, value in slots.get(name, {}).items():
            if slot == "step":  # bitsandbytes counts in an int
                value = int(value) if "state1" in slots[name] else value
            elif value.shape == parameter.shape:
                value = distribute_like(value, parameter)
            numbered.setdefault(index, {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Return the optimizer's parameters in its own order, with their names."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]
