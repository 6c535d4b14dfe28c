"""Gradients through ComfyUI's networks, which are made for inference.

Their residuals are in place, their weights are tensors of inference mode, and their kernels may
have no backward pass. Nothing of them is changed here but for as long as `learning` lasts.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import comfy.ldm.flux.math
import comfy.model_management
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

OUT_OF_PLACE = {  # what torch is told of `a += b` and the like, and what that becomes
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
}


def check_version() -> None:
    """Check that this version of ComfyUI has gradients.

    Raises:
        ValueError: its kernels have none, and cannot be switched off.
    """
    kernel = getattr(comfy.ldm.flux.math.apply_rope, "__module__", "")
    if kernel.startswith("comfy_kitchen") and not hasattr(comfy.model_management, "in_training"):
        raise ValueError(
            "cannot train in this version of ComfyUI: its kernel for positions has no gradients, "
            "and cannot be switched off; update ComfyUI (0.24 and 0.33 are known to work)"
        )


@contextmanager
def learning() -> Iterator[None]:
    """Leave inference mode, and tell ComfyUI to use kernels that have a backward pass."""
    manager = comfy.model_management
    former = getattr(manager, "in_training", None)  # versions without it have no such kernels
    try:
        if former is not None:
            manager.in_training = True
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if former is not None:
            manager.in_training = former


class Differentiable(TorchFunctionMode):
    """Let autograd record what ComfyUI's networks compute, where gradients are on.

    `a += b` becomes `a = a + b` in the type of a, so that no tensor is changed that the backward
    pass or a checkpoint needs; tensors of inference mode are read through ordinary ones that share
    their memory.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run a function of torch's on `args`."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        args = tuple(_ordinary(value) for value in args)
        kwargs = {name: _ordinary(value) for name, value in kwargs.items()}
        if function not in OUT_OF_PLACE or not _is_operator(sys._getframe(1)):
            return function(*args, **kwargs)
        return OUT_OF_PLACE[function](*args, **kwargs).to(args[0].dtype)


def _is_operator(frame: FrameType) -> bool:
    """Return whether a frame is at an operator such as `a += b`, after which it rebinds the name.

    torch reports `a += b` and `a.add_(b)` alike; the latter has to change a itself.
    """
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name == "BINARY_OP" or name.startswith("INPLACE_")  # the latter until Python 3.10


def _ordinary(value: Any) -> Any:
    """Return a value with tensors of inference mode as ordinary ones, without a copy."""
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
        return type(value)(_ordinary(each) for each in value)
    if type(value) not in (Tensor, nn.Parameter) or not value.is_inference():
        return value
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    place = value.storage_offset(), value.size(), value.stride()
    return empty.set_(value.untyped_storage(), *place)


class CheckpointedBlock:
    """Forward of a block that computes it again in the backward pass, where gradients are on.

    Args:
        forward: the block's own.
    """

    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block.

        Raises:
            RuntimeError: it has changed its input, so that it cannot be computed again.
        """
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # the network goes on to change its options
        kwargs = {k: v.copy() if isinstance(v, dict) else v for k, v in kwargs.items()}
        inputs = [v for v in (*args, *kwargs.values()) if _has_version(v)]
        versions = [each._version for each in inputs]
        run = functools.partial(self._run, **kwargs)
        result = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        if versions != [each._version for each in inputs]:
            raise RuntimeError(
                "no checkpoints: a block of this model changes its own input, and cannot be "
                "computed again in the backward pass; switch gradient_checkpointing off"
            )
        return result

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with Differentiable():  # again: the backward pass has left it
            return self.forward(*args, **kwargs)


def _has_version(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def blocks_of(network: nn.Module) -> list[str]:
    """Return the names of a network's blocks: the members of its own lists of modules."""
    lists = ((n, m) for n, m in network.named_children() if isinstance(m, nn.ModuleList))
    return [f"{name}.{each}" for name, blocks in lists for each, _ in blocks.named_children()]


def own_forward(model, name: str) -> Callable:
    """Return the forward of a layer as a MODEL has it, whatever clone of it is loaded.

    Args:
        name: of the layer in the network.
    """
    key = f"diffusion_model.{name}.forward"
    if key in model.object_patches:
        return model.object_patches[key]
    layer = model.get_model_object(f"diffusion_model.{name}")
    return type(layer).forward.__get__(layer)
