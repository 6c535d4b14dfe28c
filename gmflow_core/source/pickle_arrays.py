"""Find the arrays of a mixture, of statistics of images, or of images with labels, in a pickle.

This is a process of its own, started by `pickles.py`.

The process knows Python's standard library only. It reads the file from its standard input and
writes to its standard output: 8 bytes with the length of a JSON header, the header, and the bytes
of the arrays one after another. The header is one of these:

- {"refused": reason};
- {"found": names}, if there is nothing of the kind;
- {"fields": {name: part, or a list of parts that are to be stacked}, "kind": covariance type},
  where a part is {"type", "shape", "order", "size"} of an array. Names of classes are an array of
  their bytes, one name a line.
"""

from __future__ import annotations

import array
import gc
import heapq
import json
import mmap
import os
import struct
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .pickle_machine import GROWTH, ROOM, Machine
from .pickle_values import NATIVE, Array, Record, Refused, shown

MEANS = ("means_", "means", "mean", "mu")
WEIGHTS = ("weights_", "weights", "pi")
LOG_WEIGHTS = ("log_weights",)
VARIANCES = ("covariances_", "covariances", "covs", "variances", "vars", "variance", "var")
STDS = ("stds", "std")
FIELDS = {"means": MEANS, "variances": VARIANCES, "stds": STDS}
FIELDS |= {"weights": WEIGHTS, "log_weights": LOG_WEIGHTS}
# statistics of images: StyleGAN's sums over them, or mean and covariance
STATISTICS = {"mu": ("mu",), "sigma": ("sigma",), "sums": ("raw_mean",), "products": ("raw_cov",)}
STATISTICS |= {"count": ("num_items",)}
# CIFAR-10's: a batch of pictures, and the file with the names of their classes
PICTURES = {"data": ("data",), "labels": ("labels",)}
CLASSES = {"names": ("label_names",)}
# kind -> its fields, and those that there must be: one of these sets
KINDS = {
    "mixture": (FIELDS, ({"means", "variances"}, {"means", "stds"})),
    "statistics": (STATISTICS, ({"mu", "sigma"}, {"sums", "products", "count"})),
    "pictures": (PICTURES, ({"data", "labels"},)),
    "classes": (CLASSES, ({"names"},)),
}

BASE_MEMORY, MEMORY_GROWTH = 2**30, 6  # bytes of the process, and for each byte of the file
BASE_TIME, SPEED = 60, 10e6  # seconds, and bytes of the file in another second
MOST_PARTS = 2**16  # arrays in the list that makes up a field
MOST_CLASSES, LONGEST_CLASS = 1000, 100  # names of classes, and letters of one
MOST_NAMES = 20  # in the message about a file without a mixture


def most_memory(size: int) -> int:
    """Return the bytes of memory that reading a file of this size may take."""
    return BASE_MEMORY + MEMORY_GROWTH * size


def most_time(size: int) -> int:
    """Return the seconds that reading a file of this size may take."""
    return int(BASE_TIME + size / SPEED)


def most_output(size: int) -> int:
    """Return the bytes that the arrays of a file of this size may have."""
    return GROWTH * size + ROOM


def find_arrays(file: bytes | mmap.mmap, kind: str = "mixture") -> tuple[dict[str, Any], list[Any]]:
    """Run a pickle and return the header, as this file's docstring says, and the arrays' bytes."""
    wanted, needed = KINDS[kind]
    try:
        content = Machine(file).run()
        lists: dict[int, Any] = {}
        for fields in _candidates(content):
            found = {field: _numbers(fields, names, lists) for field, names in wanted.items()}
            if any(all(found[field] for field in each) for each in needed):
                return _answer(found, fields.get("covariance_type", "diag"), most_output(len(file)))
        names = {name for each in _candidates(content) for name in each if type(name) is str}
        bad = [
            {"name": name, "value": _shown_number(each[name])}
            for each in _candidates(content)
            for name in wanted.get("count", ())
            if name in each and _numbers(each, (name,), lists) is None
        ]
        found = [name[:100] for name in heapq.nsmallest(MOST_NAMES, names)]
        return {"found": found, "bad": bad[:1]}, []
    except MemoryError:
        return {"refused": "it needs more memory than arrays of its size do"}, []
    except Exception as error:  # a broken pickle can raise any of them
        if isinstance(error, Refused):
            return {"refused": str(error)}, []
        return {"refused": f"it is damaged ({type(error).__name__}: {str(error)[:100]})"}, []


def _candidates(content: Any) -> Iterator[dict[Any, Any]]:
    """Yield the dicts and the attributes of records in a pickle's content, outermost first."""
    left, seen = deque([content]), set()
    while left:
        value = left.popleft()
        if id(value) in seen:
            continue
        if isinstance(value, (Record, dict, list, tuple)):
            seen.add(id(value))
        if isinstance(value, Record):
            left.extend(value.parts)
            value = value.attributes
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)


def _numbers(
    fields: dict[Any, Any], names: tuple[str, ...], lists: dict[int, Any]
) -> list[Array] | Array | None:
    """Return the first of these fields that holds numbers: an array, or some to be stacked.

    Args:
        fields: a candidate.
        names: of the field.
        lists: results for lists that were looked at before, since many candidates may share one.
    """
    for name in names:
        value = fields.get(name)
        if name in STATISTICS["count"] and type(value) is int and 0 < value < 2**53:
            value = [value]
        if isinstance(value, list):
            if id(value) not in lists:
                is_names = name in CLASSES["names"]
                lists[id(value)] = (_names_of_list if is_names else _numbers_of_list)(value)
            value = lists[id(value)]
        if isinstance(value, Array) and value.raw is not None:
            return value
        if isinstance(value, list):
            return value
    return None


def _shown_number(value: Any) -> str:
    """Return a value that should be a number for a message."""
    return ascii(value)[:100] if type(value) in (int, float, bool) else shown(value)


def _numbers_of_list(values: list[Any]) -> list[Array] | Array | None:
    """Return a list of numbers as an array, a list of arrays as it is, and None for others."""
    if values and all(isinstance(value, (int, float)) for value in values):
        raw = memoryview(array.array("d", values)).cast("B")
        return _array(raw, f"{NATIVE}f8", len(values))
    if values and all(isinstance(v, Array) and v.raw is not None for v in values):
        if len({value.shape for value in values}) > 1:
            raise Refused("it has a list of arrays of different shapes")
        if len(values) > MOST_PARTS:
            raise Refused(f"it has a list of {len(values)} arrays; the most is {MOST_PARTS}")
        return values
    return None


def _names_of_list(values: list[Any]) -> Array | None:
    """Return a list of names as an array of their bytes, one name a line; None for others."""
    if not 0 < len(values) <= MOST_CLASSES:
        return None
    if not all(isinstance(v, (str, bytes)) and len(v) <= LONGEST_CLASS for v in values):
        return None
    texts = [v.decode("latin-1") if isinstance(v, bytes) else v for v in values]
    raw = memoryview("\n".join(texts).encode("utf-8", "replace"))
    return _array(raw, f"{NATIVE}u1", len(raw))


def _array(raw: memoryview, code: str, length: int) -> Array:
    """Return an array of one dimension."""
    made = Array()
    made.raw, made.type, made.shape, made.order = raw, code, (length,), "C"
    return made


def _answer(found: dict[str, Any], kind: Any, most: int) -> tuple[dict[str, Any], list[Any]]:
    """Return the header and the bytes of these fields."""
    fields, content = {}, []
    for name, value in found.items():
        if value is None:
            continue
        arrays = value if isinstance(value, list) else [value]
        most -= sum(len(part.raw) for part in arrays)
        if most < 0:
            raise Refused("it repeats arrays, which makes far more data than it holds")
        content += [part.raw for part in arrays]
        parts = [
            {"type": part.type, "shape": part.shape, "order": part.order, "size": len(part.raw)}
            for part in arrays
        ]
        fields[name] = parts if isinstance(value, list) else parts[0]
    kind = kind if kind in ("diag", "spherical") else shown(kind)
    return {"fields": fields, "kind": kind}, content


def limit_process(size: int) -> None:
    """Limit this process, as far as the platform can; it reads a file of this size."""
    try:
        import resource
    except ImportError:  # Windows: only the time is limited, by the process that waits for this one
        return
    limits = {
        "RLIMIT_AS": most_memory(size),
        "RLIMIT_DATA": most_memory(size),
        "RLIMIT_CPU": most_time(size),
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": 0,
    }
    for name, most in limits.items():
        with suppress(AttributeError, ValueError, OSError):  # not all platforms have each of them
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, hard))


def main() -> None:
    """Read the pickle on the standard input, and write its arrays to the standard output.

    The second argument is the kind of arrays, see `KINDS`.
    """
    gc.disable()  # many values, no circles that matter in a process this short
    number = sys.stdin.fileno()
    size = os.fstat(number).st_size
    limit_process(size)
    file = mmap.mmap(number, size, access=mmap.ACCESS_READ) if size else b""
    header, content = find_arrays(file, sys.argv[2])
    text = json.dumps(header).encode()
    output = sys.stdout.buffer
    output.write(struct.pack("<Q", len(text)) + text)
    for raw in content:
        output.write(raw)
    output.flush()
    os._exit(0)  # without freeing all values one by one
