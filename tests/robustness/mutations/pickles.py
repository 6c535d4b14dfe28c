"""Change pickles: opcodes, lengths, memo, depth, and containers that grow."""

from __future__ import annotations

import pickletools
import struct
from pathlib import Path
from random import Random

LENGTHS = (0, 1, 2**31 - 1, 2**32 - 1, 2**20)


def change_pickle(path: Path, rng: Random) -> str:
    """Insert, remove, double or replace parts of a pickle."""
    raw = path.read_bytes()
    try:
        starts = [place for _, _, place in pickletools.genops(raw)]
    except Exception:  # joblib's files have raw arrays between the objects
        starts = list(range(0, min(len(raw), 400)))
    ends = [*starts[1:], len(raw)]
    i = rng.randrange(len(starts))
    way = rng.choice(
        ("insert", "insert", "insert", "replace", "double", "delete", "length", "slice")
    )
    if way == "insert":
        name = rng.choice(list(PARTS))
        new = raw[: starts[i]] + PARTS[name](rng) + raw[starts[i] :]
        about = f"{name} before opcode {i}"
    elif way == "replace":
        name = rng.choice(list(PARTS))
        new = raw[: starts[i]] + PARTS[name](rng) + raw[ends[i] :]
        about = f"{name} in place of opcode {i}"
    elif way == "double":
        j = min(len(starts) - 1, i + rng.randrange(6))
        new = raw[: ends[j]] + raw[starts[i] : ends[j]] * rng.choice((1, 1, 50)) + raw[ends[j] :]
        about = f"opcodes {i} to {j} doubled"
    elif way == "delete":
        new = raw[: starts[i]] + raw[ends[min(len(ends) - 1, i + rng.randrange(3))] :]
        about = f"opcode {i} deleted"
    elif way == "length":
        new, about = _other_length(raw, starts, rng)
    else:
        new = raw[starts[i] :] + raw[: starts[i]]
        about = f"opcodes before {i} moved to the end"
    path.write_bytes(new)
    return f"{path.name}: {about}"


def _other_length(raw: bytes, starts: list[int], rng: Random) -> tuple[bytes, str]:
    """Change the length that follows an opcode of four or eight bytes."""
    found = [s for s in starts if raw[s : s + 1] in (b"X", b"B", b"T", b"\x8b", b"J", b"r", b"j")]
    if not found:
        return raw[:-1], "the last byte cut"
    start, length = rng.choice(found), rng.choice(LENGTHS)
    return raw[: start + 1] + struct.pack("<I", length) + raw[start + 5 :], (
        f"length {length} at {start}"
    )


def _random_opcode(rng: Random) -> bytes:
    opcode = rng.choice(pickletools.opcodes)
    return opcode.code.encode("latin-1") + rng.randbytes(rng.choice((0, 0, 1, 2, 4, 8)))


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def _number(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


PARTS = {
    "a random opcode": _random_opcode,
    "a nested tuple": lambda rng: b"(" * 100_000 + b"t" * 100_000,
    "a nested tuple of one": lambda rng: b")" + b"\x85" * 200_000,
    "a nested list": lambda rng: b"]" * 50_000 + b"a" * 49_999,
    "a nested tuple as a key": lambda rng: b"})" + b"\x85" * 100_000 + b"K\x01s",
    "a nested dict": lambda rng: b"".join([b"}K\x01"] * 20_000) + b"K\x01" + b"s" * 20_000,
    "a list in itself": lambda rng: b"]q\xc8h\xc8a",
    "a dict in itself": lambda rng: b"}q\xc9K\x01h\xc9s",
    "a list that doubles": lambda rng: b"](K\x01K\x02e" + b"2\x86" * 60,
    "tuples that double": lambda rng: b"K\x01" + b"2\x86" * 200,
    "a set of tuples that double": lambda rng: b"\x8f(K\x01" + b"2\x86" * 40 + b"\x90",
    "marks": lambda rng: b"(" * rng.choice((1, 100_000)),
    "a memo entry of a large number": lambda rng: b"r" + struct.pack("<I", 2**31 - 1),
    "memo entries": lambda rng: b"K\x01\x94" * 100_000,
    "bytes of 8 GB": lambda rng: b"\x8e" + struct.pack("<Q", 2**33),
    "a bytearray of 8 GB": lambda rng: b"\x96" + struct.pack("<Q", 2**33),
    "a bytearray by number": lambda rng: _call("builtins", "bytearray", _number(2**33)),
    "a set of text": lambda rng: _call("builtins", "set", _text("x" * 1000)),
    "a complex number of text": lambda rng: _call("builtins", "complex", _text("1" * 5000)),
    "a number of 100,000 digits": lambda rng: b"I" + b"9" * 100_000 + b"\n",
    "a number of 1 MB": lambda rng: b"\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20,
    "os.system": lambda rng: _call("os", "system", _text("true")),
    "a frame of 8 EB": lambda rng: b"\x95" + struct.pack("<Q", 2**63),
    "a persistent id": lambda rng: b"Pabc\n",
    "an extension code": lambda rng: b"\x82\x01",
    "a dtype of nothing": lambda rng: _call(
        "numpy", "dtype", _text("V2000000000"), b"K\x00", b"K\x01"
    ),
    "an array": lambda rng: _call("numpy.core.multiarray", "_reconstruct", b"K\x00", b"K\x00"),
    "a scalar": lambda rng: _call("numpy.core.multiarray", "scalar", _text("f8"), _text("x")),
    "an object": lambda rng: b"cmodule\nClass\n)\x81}b",
    "a surrogate": lambda rng: b"X\x03\x00\x00\x00\xed\xa0\x80",
    "many numbers": lambda rng: b"](" + b"K\x01" * 300_000 + b"e",
    "a stop": lambda rng: b".",
}
