"""The student of imitation distillation on a MODEL, and its teacher, which is the MODEL itself.

Both are one network with one set of weights: for the student, LoRA pairs are added to its layers,
and a head is computed in the place of its last ones. A switch tells which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...gmflow_core.flow.policy import PolicyVelocity
from ...gmflow_core.models.adapter_heads import Head
from ...gmflow_core.models.new_heads import LastLayers, new_dx_head, new_gm_head
from .adapter_head import HeadForward, finishing, pass_on, record_head
from .bases import Base
from .guard import guarded
from .recording import Call
from .time_shift import ShiftedFlow
from .train_lora import LearningLayer, Pair, Place, Switch
from .train_network import CheckpointedBlock, blocks_of, own_forward

TRAINING = "gmflow_training"  # key of our wrapper
ROWS = 1024  # of the identity that a layer is read with at a time
MORE_ACTIVATIONS = 3  # times those of inference, with checkpoints: a guess
BYTES_TRAINED = 16  # of a trained number: itself, its gradient, and AdamW's two averages
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadKind:
    """What a new head predicts.

    Args:
        policy: as `policy_config` has it: `type` "GMFlow" or "DX", and the latter's settings.
        count: K, or the number of times of a DX policy.
    """

    policy: Mapping[str, Any]
    count: int

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a DX policy."""
        return {name: value for name, value in self.policy.items() if name != "type"}


class SwitchedLayer:
    """Forward of one of the last layers: the base's own, or the student's."""

    def __init__(self, student: Student, forward, is_first: bool):
        self.student, self.forward, self.is_first = student, forward, is_first

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's last tokens, or, for the student, the head's mean."""
        if not self.student.switch.student:
            return self.forward(*args, **kwargs)
        return (HeadForward(self.student.head) if self.is_first else pass_on)(*args, **kwargs)


class Student:
    """A student on a clone of a MODEL; its head exists once `start` has been called.

    Args:
        model: the teacher, a MODEL.
        places: of the pairs, by their names in the adapter's file.
        pairs: the LoRA, by the same names.
        checkpointing: compute blocks again in the backward pass, which saves memory.
    """

    def __init__(
        self,
        model,
        base: Base,
        places: Mapping[str, Place],
        pairs: Mapping[str, Pair],
        checkpointing: bool = True,
    ):
        self.base, self.pairs = base, dict(pairs)
        self.switch, self.head = Switch(), None
        self.model = model.clone()
        self.network = model.model.diffusion_model
        beside: dict[str, list[tuple[Pair, int]]] = {}
        for name, pair in self.pairs.items():
            beside.setdefault(places[name].layer, []).append((pair, places[name].start))
        for layer, some in beside.items():
            self._patch(layer, LearningLayer(own_forward(model, layer), self.switch, some))
        for name in base.layers:
            forward = own_forward(model, name)
            self._patch(name, SwitchedLayer(self, forward, name == base.layers[0]))
        for block in blocks_of(self.network) if checkpointing else ():
            self._patch(block, CheckpointedBlock(own_forward(model, block)))
        # its shift matters to no one here, only the unit of the times that the network is fed
        self.model.add_object_patch("model_sampling", ShiftedFlow.with_shift(1.0, base.multiplier))
        record_head(self.model, self._finish)
        self._ask_for_memory()

    def _ask_for_memory(self) -> None:
        """Let ComfyUI keep more of a card free than its own estimate, which is for inference.

        ComfyUI asks the base model, which all clones share, when it loads a MODEL for a sampling;
        so the answer is another one just then.
        """
        count = sum(p.numel() for pair in self.pairs.values() for p in pair.parameters())

        def prepare_training(executor, model, *args: Any, **kwargs: Any) -> Any:
            """Load the model; a wrapper for ComfyUI's PREPARE_SAMPLING."""
            base, own = model.model, model.model.memory_required
            replaced = "memory_required" in vars(base)  # by another extension

            def memory_required(*given: Any, **named: Any) -> float:
                return MORE_ACTIVATIONS * own(*given, **named) + BYTES_TRAINED * count

            base.memory_required = memory_required
            try:
                return executor(model, *args, **kwargs)
            finally:
                if replaced:
                    base.memory_required = own
                else:
                    del base.memory_required

        kind = WrappersMP.PREPARE_SAMPLING
        self.model.add_wrapper_with_key(kind, TRAINING, guarded(prepare_training))

    def _patch(self, layer: str, forward) -> None:
        self.model.add_object_patch(f"diffusion_model.{layer}.forward", forward)

    def _finish(self, prediction: Any, call: Call) -> PolicyVelocity:
        return finishing(self.head, self.base, self.network)(prediction, call)

    def start(
        self,
        kind: HeadKind,
        generator: torch.Generator,
        device: torch.device,
        head: Head | None = None,
    ) -> None:
        """Make a new head from the base's last layers, which have to be loaded; move all there.

        Args:
            device: what the network computes on.
            head: to begin with instead.
        """
        if head is None:
            last = last_layers(self.network, self.base, device)
            layout = self.base.layout
            if kind.policy["type"] == "DX":
                head = new_dx_head(last, layout, kind.count, kind.settings)
            else:
                head = new_gm_head(last, layout, kind.count, generator)
        self.head = head.float().requires_grad_(True)
        for module in (self.head, *self.pairs.values()):
            module.to(device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by its names in the adapter's file."""
        found = dict(self.head.named_parameters())
        for name, pair in self.pairs.items():
            found[f"{name}.lora_A.weight"] = pair.down
            found[f"{name}.lora_B.weight"] = pair.up
        return found


def last_layers(network: nn.Module, base: Base, device: torch.device) -> LastLayers:
    """Return the weights of a loaded network's last layers, LoRAs on them included."""
    trained, width = base.trained, base.width_of(network)
    weight, bias = read_linear(attrgetter(trained.linear)(network), width, device)
    if not trained.modulation:
        return LastLayers(weight, bias)
    modulation, shift = read_linear(attrgetter(trained.modulation)(network), width, device)
    if trained.shift_first:
        modulation = modulation.roll(width, 0)
        shift = None if shift is None else shift.roll(width, 0)
    return LastLayers(weight, bias, modulation, shift)


@torch.no_grad()
def read_linear(layer: nn.Module, width: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return weight (outputs, width) and bias of a linear layer, on the CPU, in float32.

    Where the weight is no plain one (quantised, not here yet, or with LoRAs that are added in each
    call), it is read from what the layer returns.
    """
    weight, bias = layer.weight, layer.bias
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOATS
    plain = plain and weight.device.type != "meta"
    functions = (getattr(layer, name, None) for name in ("weight_function", "bias_function"))
    if plain and tuple(weight.shape) == (layer.out_features, width) and not any(functions):
        return copied(weight), None if bias is None else copied(bias)
    zero = layer(torch.zeros(1, width, device=device)).float()
    rows = [
        layer(torch.eye(width, device=device)[i : i + ROWS]).float() - zero
        for i in range(0, width, ROWS)
    ]
    return torch.cat(rows).T.contiguous().cpu(), None if bias is None else zero[0].cpu()


def copied(tensor: Tensor) -> Tensor:
    """Return a tensor's copy on the CPU, in float32."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
