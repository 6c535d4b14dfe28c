"""Warn about noise of another kind than the model was trained with."""

from __future__ import annotations

from torch import Tensor

from ...gmflow_core.files.errors import quoted
from .advice import set_noise
from .guard import guarded
from .label_conditioning import LABELS
from .latent_check import check_latent
from .notices import clear, notice


def mark_noise(noise: Tensor, drawn_by: object) -> Tensor:
    """Note on a noise tensor the SourceNoise that drew it, for `check_noise`.

    The note is an attribute of the tensor, as ComfyUI hands nothing else of a NOISE to the guider.
    """
    noise.gmflow_source = drawn_by
    return noise


@guarded
def check_noise(executor, noise: Tensor, latent_image: Tensor, *args, **kwargs):
    """Check the latent, and warn if the noise or its modes are not those of the training.

    The noise is N(0, I) or that of a mixture source; its modes are those the conditioning names.
    It is a wrapper for ComfyUI's OUTER_SAMPLE, so that stock samplers warn too.
    """
    clear()
    guider = executor.class_obj
    network = guider.model_patcher.model.diffusion_model
    if network.of_points:  # networks of images check sizes with their conditioning
        check_latent(guider.model_patcher, latent_image, any_size=True)
    record = network.source
    drawn_by = getattr(noise, "gmflow_source", None)
    knows_modes = record is not None and record["conditioning"] == "mode"
    if record is None and drawn_by is not None:
        notice(
            "wrong noise, expect poor images: it is from a mixture source, and the model was "
            f"trained with noise from N(0, I); {set_noise('RandomNoise')}"
        )
    if record is not None and drawn_by is None and noise.any():  # all zeros: noise is disabled
        modes = ", and its modes to positive" if knows_modes else ""
        notice(
            "wrong noise, expect poor images: it is from N(0, I), and the model was trained with "
            f"noise from a mixture source of {record['num_modes']} modes; "
            f"{set_noise('GM Mixture Source Noise')}{modes}"
        )
    if knows_modes and drawn_by is not None:
        _check_modes(guider, drawn_by.modes.tolist())
    return executor(noise, latent_image, *args, **kwargs)


def _check_modes(guider, modes: list[int]) -> None:
    """Warn if the positive conditioning names other modes than those of the noise."""
    conds = getattr(guider, "conds", {}).get("positive") or []
    named = [cond[LABELS].tolist() for cond in conds if cond.get(LABELS) is not None]
    wrong = [labels for labels in named if labels != modes]
    if wrong:
        notice(
            f"wrong modes, expect poor images: the noise is of the modes {quoted(modes)}, and the "
            f"conditioning says {wrong[0]}; connect noise and modes from the same GM Mixture "
            "Source Noise"
        )
