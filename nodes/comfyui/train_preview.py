"""Pictures of what a student has learned so far, beside ComfyUI's progress bar."""

from __future__ import annotations

import latent_preview
import torch
from torch import Tensor

from ...gmflow_core.flow.imitation import PolicyFlow, detached, segments
from ...gmflow_core.flow.path import shift_time
from ...gmflow_core.flow.policy import predict_x0
from .train_run import Calls, Draws, prompt_key
from .train_settings import FINAL_STEP_SIZE

PICTURES = 4  # in a preview
PREVIEW_SEED = 1  # their noise is the same all through a run, and from run to run


@torch.no_grad()
def follow(calls: Calls, noise: Tensor) -> Tensor:
    """Return where the student goes from noise (B, C, *S), with the calls it is made for."""
    settings, x = calls.run.imitation(), noise
    for start, size in segments(calls.run.steps, FINAL_STEP_SIZE):
        time = x.new_full((len(x),), start)
        sigma = shift_time(time, settings.shift)
        policy = detached(predict_x0(calls.student(x, sigma), x, sigma))
        x = PolicyFlow(policy, x, sigma, settings).follow(x, time, time - size)
    return x


def preview(training, calls: Calls, shape: torch.Size):
    """Return a row of pictures of the first prompts at fixed seeds, as ComfyUI's bar shows it.

    None if previews are switched off in ComfyUI, or it has none for this latent.

    Args:
        shape: (1, C, *S) of a picture in the solver's shape.
    """
    model = training.student.model
    device = model.load_device
    previewer = latent_preview.get_previewer(device, model.model.latent_format)
    if previewer is None:
        return None
    former, rows = calls.prompt, []
    for index in range(PICTURES):
        calls.prompt = prompt_key(index % training.prompts)
        noise = Draws(PREVIEW_SEED, index, device).normal(*shape)
        rows.append(calls.layout.fold(follow(calls, noise)))
    calls.prompt = former
    return previewer.decode_latent_to_preview_image("JPEG", torch.cat(rows, -1))
