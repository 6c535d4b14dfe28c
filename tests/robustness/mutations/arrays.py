"""Change NumPy's files: the header of .npy, the zip of .npz, and the arrays."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from pathlib import Path
from random import Random

import numpy as np

HEADERS = {
    "a huge shape": lambda h: {**h, "shape": (2**40,)},
    "a shape of product 0": lambda h: {**h, "shape": (0, *h["shape"])},
    "a negative shape": lambda h: {**h, "shape": (-1, *h["shape"][1:])},
    "a shape of 100 entries": lambda h: {**h, "shape": (1,) * 100},
    "a shape of text": lambda h: {**h, "shape": "abc"},
    "a shape that overflows": lambda h: {**h, "shape": (2**33, 2**33)},
    "another order": lambda h: {**h, "fortran_order": True},
    "an order of text": lambda h: {**h, "fortran_order": "yes"},
    "objects": lambda h: {**h, "descr": "|O"},
    "text of 2 GB": lambda h: {**h, "descr": "<U500000000"},
    "no type": lambda h: {**h, "descr": "nonsense"},
    "fields": lambda h: {**h, "descr": [("a", "<f4"), ("b", "<f4")]},
    "times": lambda h: {**h, "descr": "<M8[s]"},
    "complex numbers": lambda h: {**h, "descr": "<c8"},
    "no shape": lambda h: {k: v for k, v in h.items() if k != "shape"},
    "another entry": lambda h: {**h, "extra": 1},
}
RAW_HEADERS = {
    "no Python": b"{'descr':",
    "deep nesting": b"(" * 5000 + b")" * 5000,
    "code": b"__import__('os').system('true')",
    "9000 digits": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 9000 + b",)}",
}


def change_npy(path: Path, rng: Random) -> str:
    """Change the header or the numbers of an .npy file."""
    raw, about = changed_npy(path.read_bytes(), rng)
    path.write_bytes(raw)
    return f"{path.name}: {about}"


def changed_npy(raw: bytes, rng: Random) -> tuple[bytes, str]:
    """Return changed bytes of an .npy file, and what was changed."""
    if rng.random() < 0.35:
        return _changed_array(raw, rng)
    file = io.BytesIO(raw)
    np.lib.format.read_magic(file)
    shape, order, dtype = np.lib.format.read_array_header_1_0(file)
    header = {"descr": dtype.str, "fortran_order": order, "shape": shape}
    rest = file.read()
    way = rng.random()
    if way < 0.15:
        name = rng.choice(list(RAW_HEADERS))
        text = RAW_HEADERS[name]
    else:
        name = rng.choice(list(HEADERS))
        text = repr(HEADERS[name](header)).encode()
    version = rng.choice(((1, 0), (1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    length = len(text) + 1 if rng.random() < 0.9 else rng.choice((0, 2**16 - 1, 2**31))
    size = struct.pack("<I", length) if version != (1, 0) else struct.pack("<H", length % 2**16)
    return b"\x93NUMPY" + bytes(version) + size + text + b"\n" + rest, f"header with {name}"


def _changed_array(raw: bytes, rng: Random) -> tuple[bytes, str]:
    """Change type, shape or numbers of an array."""
    array = np.load(io.BytesIO(raw))
    way = rng.choice(("type", "shape", "numbers"))
    if way == "type":
        name = rng.choice(("f2", "f8", "i8", "u1", "?", "c8", ">f4", "S4", "U4"))
        about, array = f"as {name}", array.astype(name)
    elif way == "shape":
        flat = array.ravel()
        array = rng.choice(
            (
                flat,
                flat[:0],
                flat[:1].reshape(()),
                array[None],
                array[..., None],
                array[:-1],
                array.T,
                array[:0],
            )
        )
        about = f"of shape {array.shape}"
    else:
        array = array.copy()
        value = rng.choice((np.nan, np.inf, -np.inf, 1e30, -1.0))
        if array.dtype.kind != "f":
            value = 0
        index = rng.randrange(array.size)
        array.flat[index] = value
        about = f"with {value} at {index}"
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue(), about


def change_npz(path: Path, rng: Random) -> str:
    """Change one array, the list of arrays, or the zip around them."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    name = rng.choice(sorted(members))
    ways = ("array", "array", "array", "missing", "renamed", "extra", "zip")
    way = rng.choice((*ways, *ways, "bomb"))
    about = f"{name} {way}"
    kept = members[name]
    if way == "array":
        members[name], about = changed_npy(kept, rng)
        about = f"{name}: {about}"
    elif way in ("missing", "renamed"):
        del members[name]
    if way == "renamed":
        members[rng.choice(("x.npy", "../x.npy", "mu", "é\n.npy", ""))] = kept
    elif way == "extra":
        members |= {f"more_{i}.npy": kept for i in range(rng.choice((1, 300)))}
    elif way == "bomb":
        path.write_bytes(_bomb(name))
        return f"{path.name}: {name} is 800 MB of zeros in little space"
    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as new:
        for key, raw in members.items():
            new.writestr(key, raw)
    raw = bytearray(out.getvalue())
    if way == "zip":
        about = _change_zip(raw, rng)
    path.write_bytes(raw)
    return f"{path.name}: {about}"


@functools.cache
def _bomb(name: str) -> bytes:
    """Return an .npz file with an array of 800 MB of zeros."""
    out = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (200_000, 1000)}
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open(name, "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, fields)
        for _ in range(800):
            file.write(bytes(1_000_000))
    return out.getvalue()


def _change_zip(raw: bytearray, rng: Random) -> str:
    """Change a field of the central directory or of a local header."""
    signature = rng.choice((b"PK\1\2", b"PK\3\4", b"PK\5\6"))
    start = raw.rfind(signature)
    place = start + rng.randrange(4, 30 if signature != b"PK\5\6" else 22)
    new = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff", b"\x01\x00\x00\x80"))
    raw[place : place + len(new)] = new
    return f"{signature!r}: {new!r} at {place}"
