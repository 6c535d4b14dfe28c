"""Changes that any file can suffer: of its bytes, and of what it is."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from random import Random


def change_bytes(path: Path, rng: Random) -> str:
    """Change a file's bytes; half of the changes are near its begin or its end."""
    raw = bytearray(path.read_bytes())
    change = rng.choice(
        (_flip, _flip, _overwrite, _truncate, _truncate, _insert, _delete, _double, _replace)
    )
    about = change(raw, rng)
    path.write_bytes(raw)
    return f"{path.name}: {about}"


def _place(raw: bytearray, rng: Random) -> int:
    size = max(1, len(raw))
    near = min(size, 256)
    which = rng.random()
    if which < 0.4:
        return rng.randrange(near)
    return size - 1 - rng.randrange(near) if which < 0.5 else rng.randrange(size)


def _flip(raw: bytearray, rng: Random) -> str:
    places = [_place(raw, rng) for _ in range(rng.choice((1, 1, 2, 8)))]
    for place in places if raw else ():
        raw[place] ^= 1 << rng.randrange(8)
    return f"bits flipped in the bytes {places}"


def _overwrite(raw: bytearray, rng: Random) -> str:
    place, length = _place(raw, rng), rng.choice((1, 4, 8, 64))
    raw[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"9")) * length
    return f"{length} bytes overwritten from {place}"


def _truncate(raw: bytearray, rng: Random) -> str:
    length = rng.choice((rng.randrange(17), _place(raw, rng), max(0, len(raw) - 1)))
    del raw[length:]
    return f"cut to {length} bytes"


def _insert(raw: bytearray, rng: Random) -> str:
    place, length = _place(raw, rng), rng.choice((1, 3, 8, 1000))
    raw[place:place] = rng.randbytes(length)
    return f"{length} bytes inserted at {place}"


def _delete(raw: bytearray, rng: Random) -> str:
    place, length = _place(raw, rng), rng.choice((1, 4, 100))
    del raw[place : place + length]
    return f"{length} bytes deleted at {place}"


def _double(raw: bytearray, rng: Random) -> str:
    place, length = _place(raw, rng), rng.choice((1, 16, 500))
    raw[place:place] = raw[place : place + length]
    return f"{length} bytes doubled at {place}"


def _replace(raw: bytearray, rng: Random) -> str:
    length = rng.choice((1, 8, 100, 5000))
    raw[:] = rng.choice((rng.randbytes(length), b"\0" * length, b"[" * length, b"PK\3\4" * length))
    return f"replaced by {length} other bytes or so"


def change_length(path: Path, rng: Random) -> str:
    """Change the length of a safetensors header, or insert bytes there."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    new = rng.choice((0, 1, 2**63, 2**64 - 1, 100_000_000, 99_999_999, length + 1, length - 1))
    path.write_bytes(struct.pack("<Q", new) + raw[8:])
    return f"{path.name}: a header of {new} bytes"


def change_kind(path: Path, rng: Random) -> str:
    """Put something else in the place of a file."""
    kind = rng.choice(list(KINDS))
    path.unlink()
    KINDS[kind](path)
    return f"{path.name}: is {kind}"


def _folder_with_file(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _unreadable(path: Path) -> None:
    path.write_bytes(b"x")
    path.chmod(0)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**31)


KINDS = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "a pipe": os.mkfifo,
    "a socket": lambda path: os.mknod(path, 0o600 | stat.S_IFSOCK),
    "a folder": _folder_with_file,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": _loop,
    "a link to /dev/zero": _endless,
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "without permission": _unreadable,
    "2 GB of zeros on no disk": _sparse,
}


def remove(path: Path) -> None:
    """Remove a folder that a case left, whatever is in it."""
    shutil.rmtree(path, ignore_errors=True)
