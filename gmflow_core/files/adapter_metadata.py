"""Facts about a few-step adapter that travel in its file: the metadata `gmflow.*`.

Published adapters state only their policy (`policy_config`, JSON). The number of steps, the time
shift and the like have to be guessed from names there; here they stand beside it, a text for each.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from ..models.adapter_heads import POLICIES, is_head_key, policy_by_names
from ..models.settings import is_count, is_number
from .atomic import atomic_write
from .errors import MOST_QUOTED, FileError, WriteError, printable, quoted, reading
from .json_files import json_object
from .safetensors_files import open_safetensors, write_safetensors

MARK = "gmflow."  # before each key
POLICY_CONFIG = "policy_config"  # key of the published description of the policy
TENSOR_PREFIX = "transformer."  # of tensors' names in some files
PAIR = (".lora_A.weight", ".lora_B.weight")  # endings of the names of a LoRA's two matrices
LONGEST_NAME = 100  # characters of a base model's name
MOST_STEPS = 1000
EXPECTED = {  # what each fact has to be, for messages
    "base": f"a name of 1 to {LONGEST_NAME} printable characters",
    "steps": f"a whole number from 1 to {MOST_STEPS}",
    "shift": "a number from 0.01 to 100",
    "final_step_size": "a number above 0 and at most 1",
    "guidance": "a number from 0 to 100",
    "temperature": "a number above 0 and at most 1",
    "policy": f"one of {', '.join(POLICIES)}",
}
LEAST = math.ulp(0.0)  # above 0
RANGES = {
    "shift": (0.01, 100),
    "final_step_size": (LEAST, 1),
    "guidance": (0, 100),
    "temperature": (LEAST, 1),
}
NUMBER = re.compile(r"\d+(\.\d+)?([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter was made for; None where its file does not say.

    Args:
        base: name of the base model, such as "FLUX.1".
        steps: the fewest network calls.
        shift: time shift of its sigmas.
        final_step_size: size of the last step relative to the others, in (0, 1].
        guidance: distilled guidance that the base model is fed.
        temperature: of the mixture at all steps but the last, in (0, 1].
        policy: kind of policy that its head predicts, one of POLICIES.

    Raises:
        ValueError: one is out of range; the message quotes it.
    """

    base: str | None = None
    steps: int | None = None
    shift: float | None = None
    final_step_size: float | None = None
    guidance: float | None = None
    temperature: float | None = None
    policy: str | None = None

    def __post_init__(self):
        for name, value in self.stated().items():
            if not _is_valid(name, value):
                raise ValueError(f"{name} is {quoted(value)}; it has to be {EXPECTED[name]}")

    def stated(self) -> dict[str, str | int | float]:
        """Return those that are known, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}

    def metadata(self) -> dict[str, str]:
        """Return them as a file's metadata."""
        return {f"{MARK}{name}": str(value) for name, value in self.stated().items()}

    def lines(self) -> list[str]:
        """Return a line for each, for people to read."""
        stated = self.stated()
        return [f"{field.name}: {stated.get(field.name, 'not stated')}" for field in fields(self)]


def facts_in(metadata: Mapping[str, str] | None, name: str | Path) -> AdapterFacts:
    """Return the facts in a file's metadata; further keys `gmflow.*` are passed over.

    Args:
        name: of the file, for messages.

    Raises:
        FileError: one is out of range, or contradicts `policy_config`; the message quotes it.
    """
    found: dict[str, str | int | float] = {}
    for field, expected in EXPECTED.items():
        text = (metadata or {}).get(f"{MARK}{field}")
        if text is None:
            continue
        value = _value(field, text)
        if not _is_valid(field, value):
            raise FileError(
                name,
                f"says {MARK}{field} = {quoted(text)} in its metadata, which is not {expected}",
                _advice(field),
            )
        found[field] = value
    return AdapterFacts(**found)


def _advice(field: str) -> str:
    """Return what to do about a fact that is out of range."""
    if field == "policy":
        return "remove it with `gmflow adapter FILE --remove policy`"
    return f"set it with `gmflow adapter FILE --{field.replace('_', '-')} ...`"


def _value(field: str, text: str) -> str | int | float | None:
    """Return a fact from its text; None if it is no number where one is expected."""
    if field in ("base", "policy"):
        return text
    if not NUMBER.fullmatch(text[:MOST_QUOTED]):
        return None
    return float(text[:MOST_QUOTED]) if field != "steps" or not text.isdigit() else int(text[:9])


def _is_valid(field: str, value: object) -> bool:
    """Return whether a fact is what EXPECTED says."""
    if field == "base":
        return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME
    if field == "policy":
        return value in POLICIES
    if field == "steps":
        return is_count(value, 1, MOST_STEPS)
    return is_number(value, *RANGES[field])


def read_adapter_facts(path: str | Path) -> AdapterFacts:
    """Return the facts about an adapter; only the file's header is read.

    The policy is that of `policy_config`, or else the one that the tensors' names tell.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it is no adapter, or its metadata are out of range.
    """
    with reading(path), open_safetensors(path) as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
    check_is_adapter(keys, path)
    facts, kind = facts_in(metadata, path), policy_by_names(_bare(keys))
    if POLICY_CONFIG in metadata:
        text = metadata[POLICY_CONFIG]
        kind = json_object(text, path, POLICY_CONFIG).get("type", kind)
    if facts.policy not in (None, kind):
        raise FileError(
            path,
            f"says {MARK}policy = {facts.policy} in its metadata, and {POLICY_CONFIG} or its "
            f"tensors are of {quoted(kind)}",
            _advice("policy"),
        )
    if kind not in POLICIES:
        known = ", ".join(POLICIES)
        raise FileError(path, f"has a policy of type {quoted(kind)}, none of {known}", "")
    return replace(facts, policy=kind)


def check_is_adapter(keys: Iterable[str], path: str | Path) -> None:
    """Check that one of a file's tensors belongs to a head.

    Raises:
        FileError: none does.
    """
    keys = list(keys)
    if not any(is_head_key(key) for key in _bare(keys)):
        first = ", ".join(printable(key, MOST_QUOTED) for key in keys[:3])
        raise FileError(
            path,
            f"is no GM adapter: none of its {len(keys)} tensors ({first}, ...) belongs to a GM "
            "head (proj_out_means and the like)",
            "give an adapter such as gmflux_k8_piid_4step of Lakonik/pi-FLUX.1",
        )


def _bare(keys: Iterable[str]) -> list[str]:
    """Return tensors' names without the prefix that some files have."""
    return [key.removeprefix(TENSOR_PREFIX) for key in keys]


def write_adapter(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    policy: Mapping[str, object],
    facts: AdapterFacts = AdapterFacts(),
    further: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter in the published layout, with the facts about it, atomically.

    Args:
        tensors: by the published names: a head's (`norm_out.linear.weight`, `proj_out_means.weight`
            and so on), and the pairs <layer>.lora_A.weight (rank, in), <layer>.lora_B.weight
            (out, rank) of a LoRA, the layers in the names of diffusers.
        policy: `type`, one of POLICIES, and the settings of a DX policy.
        facts: its policy is that of `policy`, and may be left out.
        further: metadata beside those, by their keys, such as `modelspec.title`.

    Raises:
        ValueError: a name belongs to neither, half of a pair is missing, or the policy is not that
            of the tensors.
        WriteError: it cannot be written.
    """
    kind, names = policy.get("type"), _bare(tensors)
    expected = policy_by_names(names)
    if not kind == expected == (facts.policy or kind):
        given = quoted(kind) if facts.policy in (None, kind) else quoted((kind, facts.policy))
        raise ValueError(f"policy {given} does not fit tensors of a head of {expected}")
    lora = {name for name in names if not is_head_key(name)}
    whole = {name for name in lora if {_layer(name) + end for end in PAIR} <= lora}
    odd = sorted(lora - {name for name in whole if name.endswith(PAIR)})
    if odd or len(lora) == len(names):
        named = ", ".join(quoted(name) for name in odd[:3]) or "no head"
        raise ValueError(
            f"an adapter is a head and pairs of lora_A.weight and lora_B.weight: {named}"
        )
    stated = replace(facts, policy=kind).metadata()
    metadata = {**(further or {}), POLICY_CONFIG: json.dumps(dict(policy)), **stated}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(plain, path, metadata)


def _layer(name: str) -> str:
    """Return the layer of a LoRA's matrix."""
    return name.removesuffix(PAIR[0]).removesuffix(PAIR[1])


def set_adapter_facts(
    path: str | Path,
    facts: AdapterFacts,
    out: str | Path | None = None,
    remove: Iterable[str] = (),
) -> None:
    """Write an adapter's file with these facts in its metadata; its tensors stay as they are.

    The bytes after the header, and all other metadata, are copied.

    Args:
        facts: those that are None leave what the file says.
        out: the file to write; `path` itself if None.
        remove: names of facts, as of `AdapterFacts`, that the file is to state no longer.

    Raises:
        ValueError: a fact is to be both written and removed.
        FileNotFoundError, FileError: as `read_adapter_facts`.
        WriteError: it cannot be written.
    """
    path = Path(path)
    out = path if out is None else Path(out)
    remove = set(remove)
    both = sorted(remove & facts.stated().keys())
    if both:
        raise ValueError(f"{', '.join(both)} cannot be both written and removed; leave one out")
    if out.is_symlink():
        raise WriteError(
            printable(f"{out} is a link, as in the Hugging Face hub's cache: give --out FILE")
        )
    with reading(path), open_safetensors(path) as file:
        check_is_adapter(file.keys(), path)
    with open(path, "rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header = json_object(source.read(size).decode(), path, "header")
    metadata = {**header.get("__metadata__", {}), **facts.metadata()}
    for name in remove:
        metadata.pop(f"{MARK}{name}", None)
    raw = json.dumps({"__metadata__": metadata, **_without(header)}, separators=(",", ":"))
    raw += " " * (-len(raw) % 8)  # ASCII; the tensors begin at a multiple of 8
    need = path.stat().st_size + len(raw) - size
    with (
        atomic_write(out, need) as temporary,  # on Windows it replaces no file that is still open
        open(path, "rb") as source,
        open(temporary, "wb") as target,
    ):
        source.seek(8 + size)
        target.write(len(raw).to_bytes(8, "little") + raw.encode())
        shutil.copyfileobj(source, target, 2**24)


def _without(header: dict) -> dict:
    """Return a header's entries of tensors, in their order."""
    return {name: about for name, about in header.items() if name != "__metadata__"}
