"""Settings of the training of an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...gmflow_core.flow.imitation import ImitationSettings
from .train_lora import MLP

NONE, CFG, PROBABILISTIC = "none", "cfg", "probabilistic"
GUIDANCES = (NONE, CFG, PROBABILISTIC)  # of the teacher
GM, DX = "gm", "dx"
POLICIES = {GM: "GMFlow", DX: "DX"}  # as `policy_config` names them
FINAL_STEP_SIZE = 0.5  # of the published adapters
SUBSTEPS = 128
FREE = ("iterations", "preview_every", "checkpoint_every", "checkpointing")  # may change later


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made with.

    Args:
        steps: network calls of the student.
        policy: GM or DX.
        count: K of a mixture, or the number of times of a DX policy.
        guidance: of the teacher, one of GUIDANCES.
        scale: of that guidance: a cfg scale, or the weight w in [0, 1) of probabilistic guidance.
        iterations: of the optimizer.
        learning_rate, warmup: the rate rises linearly over the first `warmup` iterations.
        rank: of the LoRA.
        targets: one of `train_lora.TARGETS`.
        states, window, dropout, shift: see `ImitationSettings`.
        decay: iterations over which the teacher's share of the way falls from 1 to 0; 0 for none.
        optimizer: one of `train_optimizer.OPTIMIZERS`.
        ema: keep an average of what is trained, and use that.
        warm_start: name of the adapter that the run begins with; "" for a new one.
        checkpointing: compute blocks again in the backward pass.
        preview_every, checkpoint_every: iterations between previews, and between files; 0 for none.
    """

    steps: int = 4
    policy: str = GM
    count: int = 8
    guidance: str = NONE
    scale: float = 1.0
    iterations: int = 1000
    learning_rate: float = 1e-4
    warmup: int = 20
    rank: int = 32
    targets: str = MLP
    states: int = 2
    window: int = 3
    dropout: float = 0.0
    shift: float = 3.2
    decay: int = 0
    seed: int = 0
    optimizer: str = "adamw"
    ema: bool = True
    warm_start: str = ""
    checkpointing: bool = True
    preview_every: int = 50
    checkpoint_every: int = 100

    def imitation(self) -> ImitationSettings:
        """Return the settings of the loss."""
        window, shift = self.window, self.shift
        return ImitationSettings(self.states, window, SUBSTEPS, self.dropout, shift)

    def policy_config(self) -> dict[str, Any]:
        """Return the policy as an adapter's file describes it."""
        if self.policy == GM:
            return {"type": "GMFlow"}
        size = 1 / (self.steps - 1 + FINAL_STEP_SIZE)
        return {"type": "DX", "segment_size": min(size, 1.0), "shift": self.shift}

    def fixed(self) -> dict[str, Any]:
        """Return the settings that a run cannot go on without."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return what differs between the settings of an earlier run and of this one, in words."""
    names = dict.fromkeys((*wanted, *found))
    return [
        f"{name} {found.get(name)!r} (now {wanted.get(name)!r})"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
