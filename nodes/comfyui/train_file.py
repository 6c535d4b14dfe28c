"""The file of an adapter that was trained here: its name, its tensors and its metadata."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ...gmflow_core.files.adapter_metadata import AdapterFacts, write_adapter
from ...gmflow_core.files.errors import quoted
from ...gmflow_core.models.adapter_heads import is_head_key
from .adapter_file import ENDINGS
from .bases import Base
from .model_folders import LORAS
from .train_settings import FINAL_STEP_SIZE, GM, POLICIES, TrainSettings

LONGEST = 200  # bytes of the name of a file or folder
# parts of a path that are none, or that Windows keeps for itself
NO_NAME = re.compile(r"[ .]*|.*:.*|(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE)
READ = 64  # numbers of each weight that a fingerprint reads
TEMPERATURE = 1.0  # a policy was learned as it is


def adapter_path(name: str) -> Path:
    """Return the path of an adapter of a name, in the first of ComfyUI's folders of LoRAs.

    Raises:
        ValueError: it is no name of a file below that folder.
    """
    tidy = name.strip().replace("\\", "/")
    stem = tidy.removesuffix(".safetensors")
    parts = stem.split("/")
    sizes = [len(part.encode("utf-8", "replace")) for part in parts]
    is_sound = tidy.isprintable() and max(sizes) <= LONGEST and not os.path.isabs(tidy)
    if not is_sound or any(NO_NAME.fullmatch(part) for part in parts):
        raise ValueError(
            f"no name for a file: save_name is {quoted(name)}; it has to be a name such as "
            f"my_adapter_4step or folder/my_adapter_4step, below models/loras, each part of at "
            f"most {LONGEST} bytes"
        )
    return Path(folder_paths.get_folder_paths(LORAS)[0], f"{stem}{ENDINGS[0]}")


def facts_of(run: TrainSettings, base: Base, guidance: float | None) -> AdapterFacts:
    """Return what an adapter was made for.

    Args:
        guidance: distilled guidance of the prompts; None if the base takes none.
    """
    return AdapterFacts(
        base=base.name,
        steps=run.steps,
        shift=run.shift,
        final_step_size=FINAL_STEP_SIZE,
        guidance=guidance,
        temperature=TEMPERATURE if run.policy == GM else None,
        policy=POLICIES[run.policy],
    )


def write_trained(
    values: dict[str, Tensor],
    path: Path,
    run: TrainSettings,
    facts: AdapterFacts,
    dtype: torch.dtype,
    further: dict[str, str],
) -> None:
    """Write what was trained as an adapter's file.

    LoRA pairs that no gradient has reached, as those of layers whose output the base does not use,
    are left out.

    Args:
        dtype: of the tensors in the file.
        further: metadata beside the adapter's own.

    Raises:
        WriteError: it cannot be written.
    """
    unused = {
        name.removesuffix(".lora_B.weight")
        for name, value in values.items()
        if name.endswith(".lora_B.weight") and not value.any()
    }
    kept = {
        name: value.to(dtype)
        for name, value in values.items()
        if is_head_key(name) or name.rpartition(".lora_")[0] not in unused
    }
    write_adapter(kept, path, run.policy_config(), facts, further)


def further_metadata(
    run: TrainSettings,
    base: Base,
    name: str,
    about: dict[str, Any],
    iteration: int,
    size: str,
    rank: int,
) -> dict[str, str]:
    """Return the metadata that other programs know.

    Args:
        rank: of the LoRA.
        about: fingerprints of the teacher and the prompts.
        size: of the pictures, width x height in pixels.
    """
    slug = base.name.lower().replace(" / ", "-").replace(" ", "-")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{slug}/gm-adapter",
        "modelspec.implementation": "gmflow",
        "modelspec.title": name,
        "modelspec.date": now,
        "modelspec.resolution": size,
        "ss_network_module": "gmflow",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_steps": str(iteration),
        "ss_max_train_steps": str(run.iterations),
        "ss_learning_rate": str(run.learning_rate),
        "ss_lr_warmup_steps": str(run.warmup),
        "ss_optimizer": run.optimizer,
        "ss_seed": str(run.seed),
        "ss_gradient_checkpointing": str(run.checkpointing),
        "gmflow.teacher": about["teacher"],
        "gmflow.prompts": about["prompts"],
        "gmflow.teacher_guidance": f"{run.guidance} {run.scale:g}",
        **({"gmflow.warm_start": run.warm_start} if run.warm_start else {}),
    }


def fingerprint_of(model) -> str:
    """Return a fingerprint of a MODEL: names, shapes and a few numbers of its weights and LoRAs.

    Weights count as they were before ComfyUI merged the LoRAs of whatever clone is loaded.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.model.diffusion_model.named_parameters()):
        former = model.backup.get(f"diffusion_model.{name}")
        _take(digest, [name, value if former is None else former.weight])
    for name, patches in sorted(model.patches.items()):
        _take(digest, [name, *patches])
    return digest.hexdigest()[:32]


def hash_of(conds: Iterable) -> str:
    """Return a hash of conditionings."""
    digest = hashlib.sha256()
    _take(digest, list(conds), whole=True)
    return digest.hexdigest()[:32]


def _take(digest, value: Any, whole: bool = False) -> None:
    """Take a value into a digest; of tensors a few numbers, unless `whole`."""
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        data = getattr(value, "_qdata", value).detach().as_subclass(Tensor).reshape(-1)
        count = data.numel()
        if data.device.type == "meta":
            return
        if not whole and count > READ:
            data = data[torch.arange(READ, device=data.device) * (count // READ)]
        digest.update(data.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            _take(digest, [str(key), value[key]], whole)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _take(digest, each, whole)
    elif hasattr(value, "weights"):  # ComfyUI's weight adapters
        _take(digest, [type(value).__name__, value.weights], whole)
    elif isinstance(value, (str, int, float, bool, type(None))):
        digest.update(repr(value).encode("utf-8", "replace"))
