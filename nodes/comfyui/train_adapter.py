"""Train a few-step GM adapter for a MODEL, by imitation of the MODEL itself."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import folder_paths
import torch
from torch import Tensor

from ...gmflow_core.files.adapter_file import lora_pairs, policy_of, split_tensors
from ...gmflow_core.files.adapter_metadata import AdapterFacts
from ...gmflow_core.files.atomic import check_target
from ...gmflow_core.files.errors import quoted
from ...gmflow_core.files.locks import locked_file
from ...gmflow_core.models.adapter_heads import Head, build_head
from .adapter import with_adapter
from .adapter_file import read_adapter
from .adapter_folder import find_adapter
from .adapter_info import adapter_of
from .bases import Base, base_names, find_base
from .gm_model import GMModel
from .latent_check import check_latent
from .model_folders import LORAS
from .notices import notice, progress
from .plain_model import spread_in_words
from .probabilistic_cfg import has_probabilistic_guidance
from .sample_latent import fitting_samples
from .solver_choice import no_effect
from .time_shift import check_flow
from .train_file import (
    adapter_path,
    facts_of,
    fingerprint_of,
    further_metadata,
    hash_of,
    write_trained,
)
from .train_lora import Pair, new_pairs, places_of, targets
from .train_network import check_version, learning
from .train_preview import preview
from .train_prompts import Conditioning, check_fit, check_whole, distilled_guidance
from .train_run import NEGATIVE, Training, prompt_key
from .train_settings import CFG, DX, NONE, POLICIES, PROBABILISTIC, TrainSettings
from .train_state import note_finished, restorer, state_path, write_state
from .train_student import HeadKind, Student

GRID = "grid"  # mode of a DX policy that is trained here
WHOLE_16_BIT = (torch.bfloat16, torch.float16)


def train_adapter(
    model,
    prompts: list[Conditioning],
    negative: Conditioning | None,
    latent: dict[str, Any],
    run: TrainSettings,
    save_name: str,
) -> tuple[Any, str]:
    """Train an adapter, write its file, and return the MODEL with it, and the file's name.

    Args:
        model: the teacher, a MODEL.
        prompts: a conditioning of one pair each.
        negative: for the teacher's guidance; None if it has none.
        latent: a LATENT (B, C, *S), whose shape alone matters: B pictures an iteration.

    Raises:
        ValueError: something does not fit; the message says what, before anything long is done.
        LockedError: another ComfyUI trains an adapter of this name.
        WriteError: a file cannot be written.
    """
    check_version()
    base = check_model(model)
    path = adapter_path(save_name)
    for each in (path, state_path(path)):
        check_target(each)
    latent = fitting_samples(model, latent)
    check_size(model, base, latent)
    check_guidance(model, base, run, negative)
    guidance = distilled_guidance(base, model, prompts)
    check_fit(model, prompts, negative)
    about = {
        **run.fixed(),
        "base": base.name,
        "size": list(latent.shape),
        "teacher": fingerprint_of(model),
        "prompts": hash_of([*prompts, *([negative] if negative else [])]),
    }
    with locked_file(path, "GM Train Adapter"), torch.inference_mode(False):
        restore = restorer(state_path(path), about)
        if restore is None and path.exists():
            raise ValueError(
                f"save_name {quoted(save_name)}: {path} exists already, and no unfinished run "
                "belongs to it; choose another name"
            )
        facts = facts_of(run, base, guidance)
        training = make_training(model, base, run, facts, path, about, latent.shape, len(prompts))
        training.restore = restore
        _sample(training, prompts, negative, latent.shape)
    report_end(training, path)
    note_finished(path)
    tensors, metadata = read_adapter(str(path))
    return with_adapter(model, tensors, metadata, name=path.name), _listed_name(path)


def check_model(model) -> Base:
    """Return the entry of BASES for a MODEL that can be a teacher.

    Raises:
        ValueError: it cannot be one.
    """
    present = adapter_of(model.model_options)
    if present is not None:
        raise ValueError(
            f"few-step already: this model has a GM adapter on it ({present.name}); connect "
            "the model from before it (and name the adapter in warm_start to begin with it)"
        )
    if isinstance(model.model, GMModel):
        raise ValueError(
            "this model predicts a mixture by itself and needs no adapter; make a student of it "
            "with python -m training.distill"
        )
    base = find_base(model)
    if base is None or base.trained is None:
        raise ValueError(
            f"no adapter can be trained for this model, a {type(model.model).__name__}: it is none "
            f"of {base_names()}. A further base is an entry in nodes/comfyui/bases.py: the name of "
            "its last linear layer, the order of the values in a token, where the image's tokens "
            "begin, and the sign of the output"
        )
    config = model.model.model_config.unet_config
    if base.name == "FLUX.1" and not config.get("guidance_embed", True):
        raise ValueError(
            "this FLUX.1 model has no guidance embedding: it is schnell, or made from it, which is "
            "a few-step model already and no teacher; use FLUX.1 dev"
        )
    if has_probabilistic_guidance(model):
        raise ValueError(
            "the student would be guided too: the model comes through GM Probabilistic Guidance; "
            f"connect the model from before it, and set teacher_guidance to {PROBABILISTIC}"
        )
    check_flow(model.get_model_object("model_sampling"))
    return base


def check_size(model, base: Base, latent: Tensor) -> None:
    """Check that the base takes latents of a shape.

    Raises:
        ValueError: it does not.
    """
    check_latent(model, latent)
    height, width = (side * base.layout.folded for side in latent.shape[-2:])
    patch = base.layout.patch
    if height % patch or width % patch or (latent.ndim == 5 and latent.shape[2] != 1):
        raise ValueError(
            f"the latent does not fit: it has the shape {tuple(latent.shape)}, and {base.name} is "
            f"trained on single pictures whose latents have sides that are multiples of {patch}; "
            "connect an empty latent such as 512 x 512"
        )


def check_guidance(model, base: Base, run: TrainSettings, negative: Conditioning | None) -> None:
    """Check the guidance of the teacher.

    Raises:
        ValueError: its scale is out of range, or the negative conditioning is missing.
    """
    if run.guidance == NONE:
        if negative is not None:
            no_effect("negative", f"teacher_guidance is {NONE}")
        return
    if negative is None:
        raise ValueError(
            f"teacher_guidance {run.guidance} needs a negative conditioning: connect negative, or "
            "connect clip, whose empty text then counts"
        )
    check_whole(negative, NEGATIVE)
    if base.guidance is not None:
        notice(
            f"guided already: {base.name} is guidance-distilled, and teacher_guidance "
            f"{run.guidance} comes on top; unless this is a model without that, set it to {NONE}"
        )
    if run.guidance == PROBABILISTIC:
        if not 0 <= run.scale < 1:
            raise ValueError(
                f"wrong teacher_scale, {run.scale:g}: as the weight of probabilistic guidance it "
                "has to be at least 0 and below 1, such as 0.1"
            )
        notice(
            f"without a mixture of its own, the teacher counts as "
            f"{spread_in_words(model.model_options)}",
            logging.INFO,
        )


def make_training(
    model,
    base: Base,
    run: TrainSettings,
    facts: AdapterFacts,
    path: Path,
    about: dict[str, Any],
    shape: torch.Size,
    prompts: int,
) -> Training:
    """Return a training that writes its files to `path`, and beside it."""
    with learning():
        head, places, pairs, kind = beginning(model, base, run)
        student = Student(model, base, places, pairs, run.checkpointing)
    dtype = model.model_dtype()
    dtype = dtype if dtype in WHOLE_16_BIT or dtype == torch.float32 else torch.bfloat16
    pixels = 8 * shape[-1] * base.layout.folded, 8 * shape[-2] * base.layout.folded
    size = "x".join(map(str, pixels))
    shown: list[str] = [""]

    def save(training: Training) -> None:
        values, iteration = training.result()
        if not iteration:
            return
        rank = max((len(pair.down) for pair in training.student.pairs.values()), default=0)
        more = further_metadata(run, base, path.stem, about, iteration, size, rank)
        write_trained(values, path, run, facts, dtype, more)
        if not training.stopped:
            write_state(training, about, state_path(path))

    def report(training: Training, loss: float) -> None:
        recent = training.losses[-20:]
        text = f"{training.iteration} of {run.iterations} iterations, loss"
        shown[0] = progress(f"{text} {sum(recent) / len(recent):.4g}", shown[0])

    def picture(training: Training, calls) -> Any:
        return preview(training, calls, base.layout.unfold(torch.empty(1, *shape[1:])).shape)

    return Training(student, run, kind, prompts, save, report, picture, head)


def beginning(
    model, base: Base, run: TrainSettings
) -> tuple[Head | None, dict, dict[str, Pair], HeadKind]:
    """Return the head to begin with (None for a new one), LoRA places and pairs, and the policy.

    Raises:
        ValueError: the adapter to begin with does not fit.
    """
    kind = HeadKind(run.policy_config(), run.count)
    if not run.warm_start:
        places = places_of(model, base, targets(base, run.targets))
        generator = torch.Generator().manual_seed((run.seed + 1) % 2**63)
        return None, places, new_pairs(places, run.rank, generator), kind
    name = run.warm_start
    tensors, metadata = read_adapter(find_adapter(name).path())
    with_adapter(model, tensors, metadata, 1.0, name, is_trial=True)  # says what does not fit
    found, lora = split_tensors(tensors)
    policy = policy_of(metadata, found, name)
    check_policy(policy, run, name)
    head = build_head(found, kind.policy, base.layout, base.width_of(model.model.diffusion_model))
    pairs = {
        each: Pair(down.float().clone(), up.float().clone())
        for each, (down, up) in lora_pairs(lora, name).items()
    }
    no_effect("K, rank and targets", f"they are those of {name}")
    places = places_of(model, base, pairs.__contains__)
    lost = sorted(pairs.keys() - places.keys())
    if lost:
        raise ValueError(
            f"warm_start {name} changes {quoted(lost[:3])}, no linear layers of {base.name}, which "
            "cannot be trained here; begin with another adapter"
        )
    return head, places, pairs, kind


def check_policy(policy: dict[str, Any], run: TrainSettings, name: str) -> None:
    """Check that a run can begin with the policy of an adapter.

    Raises:
        ValueError: it is of another kind, or predicts at other times.
    """
    own, kinds = run.policy_config(), {policy: kind for kind, policy in POLICIES.items()}
    if policy["type"] not in kinds:
        raise ValueError(
            f"no warm_start: the policy of {name} is {policy['type']}, which is not trained here; "
            "begin with another adapter, or with none"
        )
    if policy["type"] != own["type"]:
        raise ValueError(
            f"another policy in warm_start: that of {name} is {policy['type']}, and this run "
            f"trains {own['type']}; set policy to {kinds[policy['type']]}, or begin with another "
            "adapter"
        )
    if own["type"] != POLICIES[DX]:
        return
    mode = policy.get("mode", GRID)
    others = [
        f"{key} {policy[key]} (now {own[key]:.4g})"
        for key in ("segment_size", "shift")
        if mode == GRID and not math.isclose(policy[key], own[key], rel_tol=1e-3)
    ]
    if mode != GRID or others:
        raise ValueError(
            f"another kind of DX policy in warm_start {name}: "
            f"{', '.join(others) or f'mode {quoted(mode)}'}; set steps and shift as it was made, "
            "or begin with another adapter"
        )


def _sample(
    training: Training,
    prompts: list[Conditioning],
    negative: Conditioning | None,
    shape: torch.Size,
) -> None:
    """Run a training through ComfyUI's guider, which loads the model and converts the prompts."""
    guider = comfy.samplers.CFGGuider(training.student.model)
    conds = {prompt_key(index): cond for index, cond in enumerate(prompts)}
    if negative is not None and training.run.guidance in (CFG, PROBABILISTIC):
        conds[NEGATIVE] = negative
    guider.inner_set_conds(conds)
    noise, sigmas = torch.zeros(shape), torch.tensor([1.0, 0.0])
    guider.sample(noise, torch.zeros(shape), training, sigmas, seed=training.run.seed)


def report_end(training: Training, path: Path) -> None:
    """Show on the node what was trained.

    Raises:
        ValueError: nothing was, as the loss was no number from the start.
    """
    if training.stopped and not path.exists():
        raise ValueError(
            f"nothing was trained: {training.stopped} at iteration {training.iteration + 1}; lower "
            "learning_rate, or look at the model and the prompts with a stock sampler"
        )
    if training.stopped:
        notice(
            f"not finished, stopped at iteration {training.iteration}: {training.stopped}. The "
            f"file holds the last good state, of iteration {training.result()[1]}; lower "
            "learning_rate, and go on under another name with warm_start"
        )
    elif (rise := training.watch.rise) and not training.run.decay:
        notice(
            f"a lower learning_rate is needed: the loss rose from {rise[0]:.3g} to {rise[1]:.3g}; "
            "the adapter may be worse than at its beginning, so train again under another name"
        )
    notice(f"saved after {training.result()[1]} iterations: {path}", logging.INFO)


def _listed_name(path: Path) -> str:
    """Return the name of a file as ComfyUI lists it, relative to the folder of LoRAs."""
    return str(path.relative_to(folder_paths.get_folder_paths(LORAS)[0]))
