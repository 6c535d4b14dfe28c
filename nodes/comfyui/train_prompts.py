"""The prompts of a training: conditionings, or the lines of a text file."""

from __future__ import annotations

import math
import os
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...gmflow_core.files.errors import quoted, reason
from .bases import Base
from .latent_check import check_conditioning
from .notices import progress

MOST_BYTES, MOST_PROMPTS = 64 * 2**20, 100_000
MOST_CHARACTERS = 20_000  # of a prompt; text encoders read some hundred words
SHOWN_EVERY = 20  # prompts
USUAL = {"end_percent": 1.0, "strength": 1.0}  # values that mean the whole picture and sampling
SINGLE = (
    "area",
    "mask",
    "gligen",
    "start_percent",
    "timestep_start",
    "control",
    "hooks",
    "default",
)
Conditioning = list  # of pairs of a tensor and a dict


def prompts_path(name: str) -> str:
    """Return the path of a text file of ComfyUI's input folder.

    Raises:
        ValueError: there is no such file.
    """
    folder = os.path.abspath(folder_paths.get_input_directory())
    path = os.path.normpath(os.path.join(folder, name.strip()))
    if not path.startswith(os.path.join(folder, "")) or not os.path.isfile(path):
        raise ValueError(
            f"prompts_file is {quoted(name)}, and there is no such file in {folder}; put a text "
            "file with one prompt a line there, and write its name"
        )
    return path


def read_prompts(name: str) -> list[str]:
    """Return the prompts in a text file of ComfyUI's input folder, one a line; no empty ones.

    Raises:
        ValueError: there is no such file, or no prompt in it, or too much.
    """
    path = prompts_path(name)
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(
                f"too long: prompts_file {quoted(name)} has more than {MOST_BYTES:,} bytes"
            )
        with open(path, encoding="utf-8-sig") as file:
            prompts = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"prompts_file {quoted(name)} cannot be read ({reason(error)}); save it as UTF-8"
        ) from error
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(
            f"too few or too many prompts: prompts_file {quoted(name)} holds {len(prompts):,} "
            f"prompts, and has to hold from 1 to {MOST_PROMPTS:,}, one a line"
        )
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > MOST_CHARACTERS:
            raise ValueError(
                f"too long: prompt {number:,} of prompts_file {quoted(name)} has "
                f"{len(prompt):,} characters ({quoted(prompt, 40)}), and may have at most "
                f"{MOST_CHARACTERS:,}; write one prompt a line"
            )
    return prompts


def encode(clip: Any, text: str) -> Conditioning:
    """Return the conditioning of a text, as CLIP Text Encode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def encode_all(clip: Any, texts: list[str]) -> list[Conditioning]:
    """Return the conditionings of texts, of one pair each; the node shows how far it is.

    Raises:
        ValueError: they do not fit into the computer's memory.
        InterruptProcessingException: the user has interrupted.
    """
    found, shown = [], ""
    for number, text in enumerate(texts, 1):
        found.append(encode(clip, text)[:1])
        if number == 1:
            check_room(found[0], len(texts))
        elif number % SHOWN_EVERY == 0:
            shown = progress(f"{number} of {len(texts)} prompts encoded", shown)
        comfy.model_management.throw_exception_if_processing_interrupted()
    return found


def check_room(cond: Conditioning, count: int) -> None:
    """Check that this many conditionings fit into the memory that is free.

    Raises:
        ValueError: they do not.
    """
    tensor, about = cond[0]
    tensors = [each for each in (tensor, *about.values()) if isinstance(each, Tensor)]
    size = sum(each.nbytes for each in tensors)
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if count * size > free:
        raise ValueError(
            f"too many prompts: {count:,} of {size / 1e6:.3g} MB each need "
            f"{count * size / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free; give at "
            f"most {int(free // size):,}"
        )


def prompts_of(positive: list[Conditioning], clip: Any, prompts_file: str) -> list[Conditioning]:
    """Return a conditioning of one pair for each prompt.

    Raises:
        ValueError: there is none, or one is for a part of the picture or of the sampling.
    """
    found = [[pair] for cond in positive for pair in cond]
    if prompts_file.strip():
        if clip is None:
            raise ValueError("prompts_file needs text encoders: connect clip")
        found += encode_all(clip, read_prompts(prompts_file))
    if not found:
        raise ValueError(
            "no prompts: connect positive (one CONDITIONING, or a list of them), or connect clip "
            "and name a prompts_file"
        )
    for cond in found:
        check_whole(cond, "positive")
    return found


def check_whole(cond: Conditioning, name: str) -> None:
    """Check that a conditioning is for the whole picture and the whole sampling.

    Raises:
        ValueError: it is not.
    """
    about = cond[0][1]
    parts = [key for key in SINGLE if _is_given(about.get(key))]
    parts += [key for key, usual in USUAL.items() if about.get(key, usual) != usual]
    if parts:
        raise ValueError(
            f"no plain prompt: a {name} conditioning has {', '.join(parts)}, which is for a part "
            "of the picture or of the sampling; give plain prompts"
        )


def _is_given(value: Any) -> bool:
    """Return whether an entry of a conditioning is there, and no 0."""
    return value is not None and not (isinstance(value, (int, float)) and value == 0)


def check_fit(model, prompts: list[Conditioning], negative: Conditioning | None) -> None:
    """Check that conditionings are those of the model's text encoders.

    Raises:
        ValueError: one is of another model.
    """
    conds = {"positive": prompts, "negative": [negative] if negative else []}
    check_conditioning(
        model,
        {
            kind: [{**about, "cross_attn": tensor} for [(tensor, about), *_] in found]
            for kind, found in conds.items()
        },
    )


def distilled_guidance(base: Base, model, conds: list[Conditioning]) -> float | None:
    """Return the distilled guidance of the prompts, None if the base takes none.

    Raises:
        ValueError: the prompts have several, or one is no number from 0 to 100.
    """
    config = model.model.model_config.unet_config
    if base.guidance is None or not config.get("guidance_embed", True):
        return None
    values = {cond[0][1].get("guidance", base.default_guidance) for cond in conds}
    sound = [isinstance(v, (int, float)) and math.isfinite(v) and 0 <= v <= 100 for v in values]
    if len(values) != 1 or not all(sound):
        raise ValueError(
            f"not one guidance: the prompts have {quoted(sorted(map(str, values)))}, and an "
            "adapter is made for one, a number from 0 to 100; connect all prompts through one "
            "FluxGuidance"
        )
    return float(values.pop())
