"""Plan the shards of a prepared folder: settings in common, ranges of images, restarts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from gmflow_core.files.errors import FileError, printable, quoted, reading
from gmflow_core.files.json_files import read_json
from training.data.image_folder import ImageList
from training.data.pictures import DECODER
from training.data.shards import (
    FORMAT,
    INDEX,
    PLAN,
    read_shard_record,
    shard_name,
    stored_dtype,
    write_index,
)
from training.encoders.fingerprints import CHANGED, MARK

CHANGES = {  # entries of a plan whose values say nothing to a user
    "files": "not the same list of image files",
    MARK: CHANGED,
    "decoder": (
        "its pictures were decoded by another version of GMFlow, which treated orientation, "
        "transparency and colour profiles in another way"
    ),
}


def make_plan(
    images: ImageList, vae_fingerprint: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Return the record that all shards of a folder have in common.

    Args:
        vae_fingerprint: of the autoencoder; None for pixels.
        settings: kind, size, flip, vae, seed, shard_size, dtype.
    """
    listing = hashlib.sha256("\n".join(images.files).encode("utf-8", "surrogateescape")).hexdigest()
    plan = {
        "format": FORMAT,
        **settings,
        "decoder": DECODER,
        "images": len(images.files),
        "files": listing,
    }
    if plan["dtype"] == stored_dtype({"kind": plan["kind"]}):
        del plan["dtype"]  # so that folders of older versions, which had no choice, go on
    if vae_fingerprint is not None:
        plan[MARK] = vae_fingerprint
    return plan


def begin_plan(out: Path, plan: dict[str, Any], restart: bool) -> None:
    """Write the plan into the folder, after removing what a killed process left there.

    Args:
        restart: also remove all finished shards and their index.

    Raises:
        ValueError: as `check_plan`.
    """
    leftovers = [*out.glob(".shard-*.tmp"), *out.glob(".*.json.*.tmp")]
    if restart:
        leftovers += [out / PLAN, out / INDEX, *out.glob("shard-*.safetensors")]
    for old in leftovers:
        old.unlink(missing_ok=True)
    write_index(out, check_plan(out, plan), PLAN)


def check_plan(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Check that a folder is new, or was begun with the same plan.

    Returns:
        The plan as the folder was begun with: in one of an older version, without the fingerprint
        of the autoencoder.

    Raises:
        ValueError: it was begun with other settings, or holds something else.
    """
    path = out / PLAN
    if not path.exists():
        if out.is_dir() and (any(out.glob("shard-*.safetensors")) or (out / INDEX).exists()):
            raise ValueError(
                f"{out} holds shards but no {PLAN}; give another --out, or --restart to throw them "
                "away"
            )
        return plan
    advice = "give --restart to throw the folder's shards away"
    found = read_json(path, advice)
    with reading(path, advice):
        if MARK not in found:
            plan = {name: value for name, value in plan.items() if name != MARK}
        old, new = ({"decoder": 1, **e, "dtype": stored_dtype(e)} for e in (found, plan))
    differ = [key for key in new if old.get(key) != new[key]]
    if differ:
        changes = ", ".join(
            CHANGES.get(key) or f"{key}: {_said(old.get(key))} there, {_said(new[key])} here"
            for key in differ
        )
        raise FileError(
            out,
            f"was begun with other settings ({changes})",
            "give another --out, the same settings to go on, or --restart to throw its shards away",
        )
    return plan


def _said(value: Any) -> str:
    """Return a setting as text for a message."""
    return printable(" ".join(value.split()), 100) if isinstance(value, str) else quoted(value)


def plan_key(plan: dict[str, Any]) -> str:
    """Return a short digest of the plan, which each shard carries."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def number_of_shards(plan: dict[str, Any]) -> int:
    """Return how many shards the plan's images fill."""
    return -(-plan["images"] // plan["shard_size"])


def shard_range(number: int, plan: dict[str, Any]) -> range:
    """Return the indices of the images in shard `number`."""
    start = number * plan["shard_size"]
    return range(start, min(start + plan["shard_size"], plan["images"]))


def finished_shard(out: Path, number: int, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of shard `number`; None if it has to be written (again)."""
    record = read_shard_record(out / shard_name(number), getattr(torch, stored_dtype(plan)))
    if record is None or record.get("plan") != plan_key(plan):
        return None
    whole = record["count"] + len(record["skipped"]) == len(shard_range(number, plan))
    return record if whole else None
