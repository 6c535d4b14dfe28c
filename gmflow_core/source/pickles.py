"""Read published mixtures in .pkl files without running anything that is in them.

A pickle is a program. This reader lets it make plain containers, numbers and arrays of numbers. An
object of any other class becomes an inert record of its attributes, and names of Python's own
modules (os.system and others) are refused. NumPy's and scikit-learn's own loaders take no part:
stand-ins from this file answer the names that a pickle asks for.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .source import GaussianMixtureSource

MEANS = ("means_", "means", "mean", "mu")
WEIGHTS = ("weights_", "weights", "pi")
LOG_WEIGHTS = ("log_weights",)
VARIANCES = ("covariances_", "covariances", "covs", "variances", "vars", "variance", "var")
STDS = ("stds", "std")
NUMBERS = "biuf"  # kinds of NumPy's types that are numbers


class Record:
    """Stand-in for an object of a class that is not loaded: its attributes and its arguments."""

    def __new__(cls, *parts: Any, **attributes: Any) -> Record:
        """Keep the arguments; pickles call this without `__init__`."""
        self = super().__new__(cls)
        self.parts, self.attributes = parts, attributes
        return self

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes, those in __slots__ too."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.attributes.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.attributes[key] = value

    def append(self, item: Any) -> None:
        self.parts = (*self.parts, item)


class _Type:
    """Stand-in for numpy.dtype."""

    order = "="

    def __init__(self, code: str, *_: Any):
        self.code = str(code)

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    @property
    def dtype(self) -> np.dtype | None:
        """NumPy's own type if it is one of numbers, else None."""
        code = self.code.lstrip("<>=|")
        return np.dtype(self.order + code) if code[:1] in NUMBERS and code[1:].isdigit() else None


class _Array:
    """Stand-in for numpy.ndarray, whose content comes with the state."""

    array: np.ndarray | None = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        shape, kind, fortran, raw = state[-4:]
        self.array = _array(raw, kind, shape, "F" if fortran else "C")


class _Inline:
    """Stand-in for joblib's NumpyArrayWrapper, whose array follows it in the file."""

    array: np.ndarray | None = None

    def __setstate__(self, state: dict) -> None:
        self.state = state

    def read(self, file: io.BufferedIOBase) -> None:
        """Read the array from the file.

        Raises:
            ValueError: it does not hold numbers.
        """
        kind, shape = self.state["dtype"], tuple(int(n) for n in self.state["shape"])
        if self.state.get("numpy_array_alignment_bytes") is not None:  # padding after its length
            file.read(int.from_bytes(file.read(1), "little"))
        if kind.dtype is None:
            raise ValueError(f"it has an array of type {kind.code!r}, which is not of numbers")
        size = int(np.prod(shape, dtype=object)) * kind.dtype.itemsize
        self.array = _array(file.read(size), kind, shape, self.state["order"])


def _array(raw: Any, kind: _Type, shape: tuple[int, ...], order: str = "C") -> np.ndarray | None:
    """Return bytes as an array; None if they are not numbers."""
    if kind.dtype is None:
        return None
    raw = raw.encode("latin-1") if isinstance(raw, str) else bytes(raw)
    return np.frombuffer(raw, kind.dtype).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _reconstructor(cls: Callable, *_: Any) -> Any:
    return cls()


def _frombuffer(raw: Any, kind: _Type, shape: tuple[int, ...], order: str) -> np.ndarray | None:
    return _array(raw, kind, shape, order)


def _scalar(kind: _Type, raw: Any) -> Any:
    array = _array(raw, kind, ())
    return None if array is None else array.item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"text in the encoding {encoding!r} is in it")
    return text.encode("latin-1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Inline,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    ("builtins", "object"): Record,
    ("__builtin__", "object"): Record,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("collections", "OrderedDict"): dict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}
PYTHON = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands"}  # and Python 2's
PYTHON -= {"__main__"}  # classes of the script that wrote the pickle


class _Unpickler(pickle._Unpickler):
    """Unpickler that refuses Python's own names and replaces classes by stand-ins.

    The C unpickler has no hook to read joblib's arrays between two objects, so this is the one
    written in Python.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module.split(".")[0] in PYTHON:
            raise ValueError(
                f"it asks for Python's {module}.{name}, which no mixture needs, "
                "so it may be an attack"
            )
        return Record

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to data outside of it, as files of torch.save do")

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (Record, _Type, _Array, _Inline)):
            raise ValueError(f"it changes a {type(self.stack[-2]).__name__}")
        pickle._Unpickler.load_build(self)
        if isinstance(self.stack[-1], _Inline):
            self.stack[-1].read(self._file)

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file, encoding="latin1")
        self._file = file


def read_pickle(path: str | Path) -> Any:
    """Read a pickle.

    Every object of an unknown class becomes a `Record`, every array a stand-in with an `array`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it asks for what is not allowed, or is not a whole pickle.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give the pickle of a mixture")
    raw = Path(path).read_bytes()
    if raw[:2] == b"PK":
        raise ValueError(
            f"{path} is a file of torch.save; only pickles of NumPy arrays are read: "
            "save it as one, or as safetensors"
        )
    try:
        return _Unpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a broken pickle can raise any of them
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is refused: {reason}; get the mixture from where you trust, as arrays "
            "(.npz, .safetensors)"
        ) from error


def convert_pickle(
    path: str | Path, assigner: GaussianMixtureSource | None = None
) -> GaussianMixtureSource:
    """Convert the mixture in a pickle to a source.

    The pickle holds an estimator of scikit-learn (or of a class with its attributes), or a dict of
    arrays. Names of the means (M, *shape): means_, means, mean or mu; of the variances, one for
    each mode or for each of its dimensions: covariances_, covariances, covs, variances, vars,
    variance or var, or their roots stds or std; of the weights: weights_, weights, pi, or their
    logarithms log_weights.

    Args:
        path: the pickle.
        assigner: the mixture of the tokens, for a source of latents; its weights are taken if the
            file has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is refused, or holds no such mixture; the message lists what it holds.
    """
    content = read_pickle(path)
    for fields in _candidates(content):
        means, squares, stds = (_field(fields, names) for names in (MEANS, VARIANCES, STDS))
        if means is not None and (squares is not None or stds is not None):
            break
    else:
        found = sorted({str(name) for fields in _candidates(content) for name in fields})
        raise ValueError(
            f"{path} holds no mixture: it has {found[:20]}, and means with variances are needed"
        )
    kind = fields.get("covariance_type", "diag")
    if kind not in ("diag", "spherical"):
        raise ValueError(
            f"{path} has covariances of the type {kind!r}; a source is diagonal or spherical: "
            "fit one of these"
        )
    std = _std(squares if stds is None else stds.square(), means, path)
    weights, log_weights = _field(fields, WEIGHTS), _field(fields, LOG_WEIGHTS)
    if log_weights is None and weights is not None:
        log_weights = weights.log()
    if log_weights is None and assigner is not None:
        log_weights = assigner.log_weights.double()
    if log_weights is None:
        raise ValueError(
            f"{path} has no weights of its modes; give the mixture of the tokens, which has them, "
            "with --assigner"
        )
    try:
        log_weights = log_weights.flatten().float()
        return GaussianMixtureSource(means.float(), std.float(), log_weights, assigner)
    except ValueError as error:
        raise ValueError(f"{path} holds a mixture that is none ({error})") from error


def _candidates(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the dicts and the attributes of records in a pickle's content, outermost first."""
    left, seen = deque([content]), set()
    while left:
        value = left.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        value = value.attributes if isinstance(value, Record) else value
        if isinstance(value, dict):
            yield value
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)


def _array_of(value: Any) -> Any:
    """Return the array of a stand-in; anything else as it is."""
    return value.array if isinstance(value, (_Array, _Inline)) else value


def _field(fields: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Return the first of these fields that holds numbers, in float64; None if there is none."""
    for name in names:
        value = _array_of(fields.get(name))
        if isinstance(value, list) and value:
            parts = [_array_of(part) for part in value]
            numbers = all(isinstance(part, (int, float, np.ndarray)) for part in parts)
            value = np.array(parts) if numbers else None
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.astype(np.float64))
    return None


def _std(var: Tensor, means: Tensor, path: str | Path) -> Tensor:
    """Return standard deviations that broadcast to the means.

    Args:
        var: one variance for each mode, or for each of its dimensions.
        means: (M, *shape).
        path: named in errors.
    """
    if var.numel() == len(means):
        var = var.reshape(-1, *[1] * (means.ndim - 1))
    if var.ndim != means.ndim or any(
        n not in (1, size) for n, size in zip(var.shape, means.shape, strict=True)
    ):
        raise ValueError(
            f"{path} has variances {tuple(var.shape)} for means {tuple(means.shape)}; a spherical "
            "source has one for each mode, a diagonal one has one for each of its dimensions"
        )
    return var.sqrt()
