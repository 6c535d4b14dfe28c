"""Read and write tokens: one vector for each sample, by which a mixture source finds its mode.

Tokens come from array files or from a frozen encoder. Those of a prepared folder are kept beside
its shards in `tokens.safetensors`, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from gmflow_core.files.errors import FileError, check_regular_file, printable, quoted, reading
from gmflow_core.files.json_files import json_object
from gmflow_core.files.safetensors_files import open_safetensors, write_safetensors
from gmflow_core.source.source import listed
from training.common.arrays import NpyFile, read_npz
from training.data.shards import LatentDataset
from training.encoders.encoder import ENCODERS

FORMAT = "gmflow-tokens-1"
FILE = "tokens.safetensors"  # in a prepared folder
NAME = "tokens"  # name of the array in that file
CHUNK = 2**24  # elements that are read at a time
GIVE = "give a whole .npy, .npz or .safetensors file of samples (n, D), without Python objects"
NUMBERS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")  # types of safetensors
SETTINGS = ("encoder", "input_size", "size")  # entries of a record that say what made the tokens


class TokenFiles:
    """Samples (n, *shape) in array files, one file after the other.

    Each iteration yields the samples as chunks (m, D), at least one chunk, with 0 rows if there are
    no samples.

    Args:
        paths: .npy (read from disk piece by piece), .npz (read as a whole) or .safetensors files,
            each with one such array, or with one called "tokens".
        rows: the samples to yield; all of them if None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds no such array, or they do not fit each other.
    """

    def __init__(self, paths: Sequence[Path], rows: range | None = None):
        self.paths = list(paths)
        self.arrays = [_open_array(path) for path in self.paths]
        shapes = {tuple(_shape(array)[1:]) for array in self.arrays}
        if len(shapes) != 1:
            raise ValueError(
                f"{self.paths[0]} and its companions hold samples of different shapes: "
                f"{sorted(shapes)}; give files of one shape"
            )
        self.shape: tuple[int, ...] = shapes.pop()
        self.total = sum(_shape(array)[0] for array in self.arrays)
        self.rows = range(self.total) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def share(self, state: PartialState) -> TokenFiles:
        """Return the part of this process; the parts follow the order of the processes."""
        return self.part(share_of(len(self), state))

    def part(self, rows: range) -> TokenFiles:
        """Return these samples."""
        return TokenFiles(self.paths, rows)

    def __iter__(self) -> Iterator[Tensor]:
        if not self.rows:  # with more processes than samples
            yield torch.empty(0, math.prod(self.shape))
        step, start = max(1, CHUNK // math.prod(self.shape)), 0
        for path, array in zip(self.paths, self.arrays, strict=True):
            size = _shape(array)[0]
            for low in range(max(start, self.rows.start), min(start + size, self.rows.stop), step):
                rows = slice(low - start, min(low + step, start + size, self.rows.stop) - start)
                with reading(path, GIVE):
                    values = array[rows]
                    if not isinstance(values, Tensor):
                        wide = values.dtype.kind == "u" and values.dtype.itemsize > 1
                        values = torch.from_numpy(values.astype(float) if wide else values)
                yield values.flatten(1)
            start += size


def share_of(count: int, state: PartialState) -> range:
    """Return this process's part of `count` samples."""
    edges = [
        count * i // state.num_processes for i in (state.process_index, state.process_index + 1)
    ]
    return range(*edges)


def _shape(array: Any) -> list[int]:
    """Return the shape of a NumPy array or of a slice of safetensors."""
    return list(array.get_shape() if hasattr(array, "get_shape") else array.shape)


def _is_zip(path: Path) -> bool:
    """Return whether a file begins as an .npz file does."""
    check_regular_file(path)
    with reading(path, GIVE, "cannot be read"), open(path, "rb") as file:
        return file.read(2) == b"PK"


def _open_array(path: Path) -> Any:
    """Open the samples of a file as a NumPy array, or as a slice of safetensors."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {printable(str(path))}; {GIVE}")
    if path.suffix == ".safetensors":
        open_safetensors(path, GIVE)  # for its errors
        with reading(path, GIVE, "is no whole array file"):
            file = safe_open(path, framework="pt")
            found = {name: file.get_slice(name) for name in file.keys()}
            types = {name: part.get_dtype() for name, part in found.items()}
        for name, kind in types.items():
            if kind not in NUMBERS and (name == NAME or len(found) == 1):
                raise FileError(path, f"holds {quoted(name)} in {kind}, not numbers", GIVE)
    elif _is_zip(path):
        found = read_npz(path)[0]
    else:
        found = {NAME: NpyFile(path)}
    arrays = {
        name: array
        for name, array in found.items()
        if len(_shape(array)) >= 2 and math.prod(_shape(array))
    }
    if NAME not in arrays and len(arrays) != 1:
        held = {name: _shape(array) for name, array in found.items()}
        wanted = f'it must have one array of samples (n, D), or one called "{NAME}"'
        raise FileError(path, f"holds {quoted(held)}; {wanted}", "")
    return arrays[NAME] if NAME in arrays else next(iter(arrays.values()))


def read_tokens(folder: Path) -> Tensor:
    """Read the tokens of a prepared folder, in the order of its samples.

    The file is memory-mapped: the processes of a machine share the memory, and rows are read when
    they are used.

    Returns:
        (n, D).

    Raises:
        FileNotFoundError: the folder has no tokens.
        ValueError: the file is damaged, has another number of samples, or values that are not
            finite.
    """
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; make it with python -m training.fit_source --data {folder} "
            "--encoder ..."
        )
    files = TokenFiles([path])
    check_count(files, len(LatentDataset(folder, in_memory=False)), folder)
    tokens = files.arrays[0][:]
    bad, done = [], 0
    for chunk in files:
        bad += (done + (~chunk.isfinite().all(1)).nonzero().flatten()).tolist()
        done += len(chunk)
    if bad:
        raise ValueError(
            f"rows {listed(bad)} of {path} are not finite, so their samples belong to no mode; "
            "remove the file and make it anew"
        )
    return tokens


def check_count(tokens: TokenFiles, count: int, folder: Path) -> None:
    """Check that there is one token, a vector, for each of the `count` samples.

    Raises:
        ValueError: there is not.
    """
    if len(tokens) != count or len(tokens.shape) != 1:
        raise ValueError(
            f"{tokens.paths[0]} holds {len(tokens)} tokens of {tokens.shape}, but {folder} has "
            f"{count} samples; give one vector for each sample, in their order"
        )


def digest_of(tokens: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tokens as they are kept, in float32, whatever the chunks (m, D)."""
    found = hashlib.sha256()
    for chunk in tokens:
        found.update(chunk.float().contiguous().numpy())
    return found.hexdigest()


def tokens_digest(tokens: TokenFiles) -> str:
    """Return the digest of tokens: what the file's own record says, if it has one."""
    made = read_tokens_record(tokens.paths[0]) or {}
    return made.get("digest") or digest_of(tokens)


def tokens_record(tokens: TokenFiles) -> dict[str, Any]:
    """Return the record of given tokens: number, digest, and what made them if that is known."""
    made = read_tokens_record(tokens.paths[0]) or {}
    record = {
        "format": FORMAT,
        "files": [str(given) for given in tokens.paths],
        "count": len(tokens),
        "digest": tokens_digest(tokens),
    }
    return record | {name: made[name] for name in SETTINGS if name in made}


def keep_tokens(tokens: TokenFiles, folder: Path) -> None:
    """Copy tokens and their record into a prepared folder as `FILE`, unless they are there.

    Raises:
        ValueError: the folder holds other tokens, or `FILE` is damaged.
    """
    path = folder / FILE
    if any(given.resolve() == path.resolve() for given in tokens.paths):
        return
    record = tokens_record(tokens)
    check_record(path, {"format": FORMAT, "count": len(tokens)})
    if not path.exists():
        write_tokens(path, torch.cat([chunk.float() for chunk in tokens]), record)
    elif tokens_digest(TokenFiles([path])) != record["digest"]:
        given = ", ".join(map(str, tokens.paths))
        raise ValueError(
            f"{path} holds other tokens than {given}; remove it, or give it as --tokens"
        )


def check_encoder(folder: Path, fitted: dict[str, Any], source: str) -> None:
    """Check that the folder's tokens come from the encoder the source was fitted with.

    If one of the two does not say what made it, as many tokens as the source was fitted to must
    be those very ones. Nothing is checked if one does not say that either, as of older versions.

    Args:
        fitted: how the source was fitted, the "training" of its metadata.
        source: name of the source, for the error.

    Raises:
        ValueError: the tokens come from another encoder, were made with other settings, or are
            other ones.
    """
    here, there = read_tokens_record(folder / FILE) or {}, fitted_settings(fitted)
    if "encoder" not in here or "encoder" not in there:
        files, count = TokenFiles([folder / FILE]), there.get("count")
        if count == len(files) and there.get("digest") not in (None, tokens_digest(files)):
            raise ValueError(
                f"{folder / FILE} holds other tokens than those that {source} was fitted to; give "
                "a source that was fitted to the former, or remove the file and keep the latter "
                "there: training.fit_source --tokens"
            )
        return
    here, there = ({name: record.get(name) for name in SETTINGS} for record in (here, there))
    advice = "or remove the file and make the latter: training.fit_source --encoder"
    check_settings(here, there, f"{folder / FILE} holds", source, advice)


def fitted_settings(fitted: dict[str, Any]) -> dict[str, Any]:
    """Return what made the tokens that a source was fitted to, and their number and digest.

    What is not known is missing; the names are those of `tokens_record`.

    Args:
        fitted: the "training" of the source's metadata.
    """
    config, tokens = fitted.get("config") or {}, dict(fitted.get("tokens") or {})
    if config.get("encoder") is not None:
        tokens |= encoder_settings(
            config["encoder"], config.get("encoder_size"), config.get("image_size")
        )
    return tokens


def check_settings(
    here: dict[str, Any], there: dict[str, Any], what: str, source: str, advice: str
) -> None:
    """Check that tokens are made as those were that a source was fitted to.

    Args:
        here: how they are made.
        there: how those were made.
        what: where the tokens are, as subject and verb of the error.
        source: name of the source.
        advice: the other way out, beside another source.

    Raises:
        ValueError: they are not.
    """
    if here != there:
        raise ValueError(
            f"{what} tokens of {_settings_text(here)}, but {source} finds its modes by tokens of "
            f"{_settings_text(there)}; give a source that was fitted to the former, {advice}"
        )


def encoder_settings(encoder: str, input_size: int | None, size: int | None) -> dict[str, Any]:
    """Return the entries of a tokens' record that say what made them; see `encode_images`."""
    return dict(zip(SETTINGS, (ENCODERS.get(encoder, encoder), input_size, size), strict=True))


def _settings_text(settings: dict[str, Any]) -> str:
    """Return the settings that are given, as text for a message."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def check_record(path: Path, record: dict[str, Any]) -> None:
    """Check that the file at `path`, if there is one, holds tokens with this record.

    Raises:
        ValueError: it is damaged, or holds other tokens.
    """
    found = read_tokens_record(path)
    if found is None and path.exists():
        raise ValueError(
            f"{path} is damaged, or was not made by GMFlow; remove it, or give it as --tokens"
        )
    differ = [
        f"{key}: {quoted(found.get(key))} there, {quoted(value)} here"
        for key, value in record.items()
        if found and found.get(key) != value
    ]
    if differ:
        raise ValueError(
            f"{path} holds other tokens ({'; '.join(differ)}); remove it, or give it as --tokens"
        )


def read_tokens_record(path: Path) -> dict[str, Any] | None:
    """Read how the tokens in `path` were made; None if the file is missing or damaged."""
    try:
        with reading(path), open_safetensors(path) as file:
            return json_object((file.metadata() or {})["gmflow"], path, "record")
    except (FileError, OSError):
        return None


def write_tokens(path: Path, tokens: Tensor, record: dict[str, Any]) -> None:
    """Write tokens (n, D) and their record, atomically."""
    write_safetensors({NAME: tokens.contiguous()}, path, {"gmflow": json.dumps(record)})


class WithTokens(Dataset):
    """A prepared folder's samples, each with the token by which its mode is found.

    Raises:
        FileNotFoundError: as `read_tokens`.
        ValueError: as `read_tokens`.
    """

    def __init__(self, dataset: LatentDataset):
        self.dataset, self.tokens = dataset, read_tokens(dataset.folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples and labels as `LatentDataset`, and tokens (n, D) float32."""
        return *self.dataset.__getitems__(indices), self.tokens[indices].float()

    def __reduce__(self) -> tuple:
        """Send the data set alone: the other process maps the file itself."""
        return WithTokens, (self.dataset,)
