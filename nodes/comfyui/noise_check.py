"""Warn about noise of another kind than the model was trained with."""

from __future__ import annotations

from torch import Tensor

from .notices import clear, notice
from .options import LABELS


# Mixture sources
def mark_noise(noise: Tensor, drawn: object) -> Tensor:
    """Leave a note on a noise tensor of what it was drawn by, for `check_noise`."""
    noise.gmflow_source = drawn
    return noise


def check_noise(executor, noise: Tensor, *args, **kwargs):
    """Say so if a model gets noise of another kind than it was trained with (N(0, I), or a mixture source), or of other modes
    than those it is told; a wrapper for ComfyUI's OUTER_SAMPLE, so that it is said with stock samplers too."""
    clear()
    guider = executor.class_obj
    record = guider.model_patcher.model.diffusion_model.source
    drawn = getattr(noise, "gmflow_source", None)
    knows = record is not None and record["conditioning"] == "mode"
    if record is None and drawn is not None:
        notice(
            "connect 'RandomNoise' to noise: this noise is from a mixture source, and the model was trained with noise from "
            "N(0, I). Expect poor images"
        )
    if record is not None and drawn is None and noise.any():  # or it is switched off
        modes = ", and its modes to positive" if knows else ""
        notice(
            f"connect 'Mixture Source Noise' to noise of SamplerCustomAdvanced{modes}: the model was trained with noise from a "
            f"mixture source of {record['num_modes']} modes, and this is not. Expect poor images"
        )
    if knows and drawn is not None:
        conds = getattr(guider, "conds", {}).get("positive") or []
        told = [cond[LABELS].tolist() for cond in conds if cond.get(LABELS) is not None]
        wrong = [modes for modes in told if modes != drawn.modes.tolist()]
        if wrong:
            notice(
                "connect noise and modes from the same 'Mixture Source Noise': the noise is of the modes "
                f"{drawn.modes.tolist()}, and the conditioning says {wrong[0]}. Expect poor images"
            )
    return executor(noise, *args, **kwargs)
