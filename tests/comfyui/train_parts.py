"""What the runs of `train_inside.py` are made of: models, prompts, settings, training, files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from inside import far, ours, sample
from torch import Tensor

WORK: list[Path] = []
TEACHERS: dict[str, dict[str, Any]] = {}  # as train_bases.TEACHERS
BATCH = {"flux2": 2, "lumina": 2}  # the slowest of them; the others take 4
RUN = {  # settings that differ from the node's
    "iterations": 8,
    "learning_rate": 5e-4,
    "rank": 8,
    "warmup": 2,
    "states": 1,
    "preview_every": 0,
    "checkpoint_every": 0,
}


@cache
def base_of(kind: str) -> Any:
    """Load a MODEL by ComfyUI's own loader."""
    import comfy.sd
    import folder_paths

    folder_paths.folder_names_and_paths["loras"] = ([str(WORK[0] / "loras")], {".safetensors"})
    return comfy.sd.load_diffusion_model(str(WORK[0] / f"{kind}.safetensors"))


def prompts(kind: str, count: int = 1) -> list[list]:
    """Draw conditionings of the model's widths."""
    generator, about = torch.Generator().manual_seed(0), TEACHERS[kind]
    found = []
    for _ in range(count):
        more = {}
        text = torch.randn(1, 4, about["text"], generator=generator)
        if about["pooled"]:
            more["pooled_output"] = torch.randn(1, about["pooled"], generator=generator)
        if about["guidance"]:
            more["guidance"] = about["guidance"]
        found.append([[text, more]])
    return found


def settings(**changed: Any) -> Any:
    """Return the settings of a short run."""
    return ours("train_settings").TrainSettings(**{**RUN, **changed})


def latent(kind: str, batch: int = 4) -> Tensor:
    return torch.zeros(batch, *TEACHERS[kind]["latent"])


def train(kind: str, name: str, model: Any = None, **changed: Any) -> tuple[Any, dict, dict]:
    """Train, and return the MODEL, and the tensors and the metadata of the file."""
    import comfy.utils

    own, texts = base_of(kind), changed.pop("prompts", prompts(kind))
    samples = changed.pop("latent", latent(kind, BATCH.get(kind, 4)))
    latent_image = {"samples": samples, **changed.pop("latent_about", {})}
    given = texts, changed.pop("negative", None), latent_image
    result, file = ours("train_adapter").train_adapter(
        model or own, *given, settings(**changed), name
    )
    path = str(WORK[0] / "loras" / file)
    return result, *comfy.utils.load_torch_file(path, return_metadata=True)


def sampler(name: str = "gm-policy") -> Any:
    """Return a SAMPLER: Euler's, or one of ours."""
    import comfy.samplers

    if name == "euler":
        return comfy.samplers.sampler_object(name)
    return ours("gm_sampler").gm_sampler(name, quiet=True)


def distances(kind: str, model: Any) -> dict[str, float]:
    """Compare 4 calls with the teacher's 32: the student's, and Euler's of the teacher."""
    far_end, euler, *given = ends(kind)
    student = sample(model, *given, sampler(), sigmas=few_sigmas())
    return {"euler": far(euler, far_end), "student": far(student, far_end)}


@cache
def ends(kind: str) -> tuple[Tensor, Tensor, Tensor, list]:
    """Return where 32 and 4 calls of a teacher end, and the latent and the prompt they are for."""
    given = latent(kind, 4), prompts(kind)[0]
    sigmas = ours("gm_sampler").gm_sigmas(32, 3.2), few_sigmas()
    found = (sample(base_of(kind), *given, sampler("euler"), sigmas=each) for each in sigmas)
    return *found, *given


def few_sigmas() -> Tensor:
    """Return the sigmas of 4 calls, as students are trained for."""
    return ours("gm_sampler").gm_sigmas(4, 3.2, final_step_size=0.5)


def load(name: str) -> tuple[None, dict, dict]:
    """Read a file of models/loras."""
    import comfy.utils

    return None, *comfy.utils.load_torch_file(str(WORK[0] / "loras" / name), return_metadata=True)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Return the ups of the LoRA, which begin as 0, as one vector."""
    return torch.cat([tensors[k].flatten() for k in sorted(tensors) if ".lora_B" in k])
