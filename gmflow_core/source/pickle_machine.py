"""Run a pickle on inert values, so that nothing in it is run.

A pickle is a program for a small machine with a stack. This is such a machine; it only makes inert
values: numbers, text, containers, views of arrays, and records in the place of all other objects.
It calls nothing that a pickle names, and everything that could grow is bounded:

- a step takes at least one byte of the file, and there are at most STEPS of them. Each makes one
  value, and copying n items counts as n steps; so references to the same value never multiply it;
- sizes are compared with what is left of the file, and shapes with the bytes of their array;
- only text becomes a key of a dict (short bytes as text), and nothing walks through nested values
  by recursion, so depth costs nothing;
- bytes that are made by copying are at most GROWTH times the file's.

`pickle_arrays.py` runs it in a process of its own that knows Python's standard library only.
"""

from __future__ import annotations

import codecs
import mmap
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any

from .pickle_values import SHOWN, TYPES, Array, Name, Record, Refused, Type, named, shown, size_of

STEPS = 2 * 10**6  # opcodes, and items that are copied
GROWTH = 4  # bytes made from one byte of the file; a list of small numbers becomes float64
ROOM = 2**20  # bytes beyond that
LINE = 10_000  # characters of a number or name that is written as text
DIGITS = 1024  # bytes of an integer
LATIN = ("latin1", "latin-1")

# What a pickle may call. Each takes the machine and the arguments, a tuple or list.


def _make_list(machine: Machine, args: Any) -> list:
    """Return a list in the place of a set: nothing needs to be hashed."""
    items = args[0] if args else ()
    if not isinstance(items, (list, tuple)):
        raise Refused(f"it makes a set of {named(items)}")
    machine.spend(len(items))
    return list(items)


def _make_dict(machine: Machine, args: Any) -> dict:
    made: dict[Any, Any] = {}
    machine.spend(len(args[0]) if args else 0)
    for pair in args[0] if args else ():
        machine.put(made, *pair)
    return made


def _make_bytes(machine: Machine, args: Any) -> Any:
    """Return the content of a bytearray, never zeros of a length."""
    if not args:
        return b""
    if isinstance(args[0], str):
        return machine.encode(*args)
    if not isinstance(args[0], (bytes, memoryview)):
        raise Refused(f"it makes bytes of {named(args[0])}")
    return args[0]


def _make_scalar(machine: Machine, args: Any) -> Any:
    kind, raw = args
    made = Array().fill(machine.raw(raw), kind, (), "C")
    if made.raw is None:
        return None
    return struct.unpack(made.type[0] + TYPES[made.type[1:]], made.raw)[0]


def _make_from_buffer(machine: Machine, args: Any) -> Array:
    raw, kind, shape, order, *axes = args
    if order == "K" and axes:  # in the order "C", with these axes afterwards
        order = axes[0]
    return Array().fill(machine.raw(raw), kind, shape, order)


RECORD = Name(lambda machine, args: machine.record(args))
LIST = Name(_make_list)
NEW_ARRAY = Name(lambda machine, args: Array())
COPYREG = Name(lambda machine, args: machine.call(args[0], ()))
BUILTINS = {
    "object": RECORD,
    "complex": RECORD,
    "set": LIST,
    "frozenset": LIST,
    "bytearray": Name(_make_bytes),
}
ALLOWED: dict[tuple[str, str], Name] = {
    ("numpy", "ndarray"): NEW_ARRAY,
    ("numpy", "dtype"): Name(lambda machine, args: Type(args[0])),
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): Name(lambda machine, args: Array(follows=True)),
    ("_codecs", "encode"): Name(lambda machine, args: machine.encode(*args)),
    ("copyreg", "_reconstructor"): COPYREG,
    ("copy_reg", "_reconstructor"): COPYREG,
    ("collections", "OrderedDict"): Name(_make_dict),
    **{("builtins", name): made for name, made in BUILTINS.items()},
    **{("__builtin__", name): made for name, made in BUILTINS.items()},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): NEW_ARRAY for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Name(_make_scalar) for core in ("core", "_core")},
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): Name(_make_from_buffer)
        for core in ("core", "_core")
    },
}
PYTHON = sys.stdlib_module_names | {"__builtin__", "copy_reg", "commands"}  # and Python 2's
PYTHON -= {"__main__"}  # classes of the script that wrote the pickle

CONSTANTS = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
}
NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
COUNTED = {  # opcodes that are followed by a length and so many bytes
    pickle.SHORT_BINSTRING: ("<B", "latin-1"),
    pickle.BINSTRING: ("<i", "latin-1"),
    pickle.SHORT_BINUNICODE: ("<B", "utf-8"),
    pickle.BINUNICODE: ("<I", "utf-8"),
    pickle.BINUNICODE8: ("<Q", "utf-8"),
    pickle.SHORT_BINBYTES: ("<B", None),
    pickle.BINBYTES: ("<I", None),
    pickle.BINBYTES8: ("<Q", None),
    pickle.BYTEARRAY8: ("<Q", None),
    pickle.LONG1: ("<B", "integer"),
    pickle.LONG4: ("<i", "integer"),
}
GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
OUTSIDE = {
    **dict.fromkeys((pickle.PERSID, pickle.BINPERSID), "data outside of it, as torch.save's do"),
    **dict.fromkeys((pickle.EXT1, pickle.EXT2, pickle.EXT4), "a table of classes outside of it"),
    **dict.fromkeys((pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), "buffers outside of it"),
}


class Machine:
    """Machine that runs a pickle on inert values.

    Args:
        file: the whole file, bytes or a map of it.
    """

    def __init__(self, file: bytes | mmap.mmap):
        self.file, self.view, self.at = file, memoryview(file), 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack
        self.memo: dict[int, Any] = {}
        self.steps, self.growth = STEPS, GROWTH * len(file) + ROOM

    def run(self) -> Any:
        """Run the pickle and return its value.

        Raises:
            Refused: it does what is not allowed.
            Exception: it is damaged.
        """
        actions = self.actions
        while True:
            self.spend(1)
            code = self.file[self.at : self.at + 1]
            self.at += 1
            if code == pickle.STOP:
                return self.pop()
            if code in CONSTANTS:
                self.stack.append(CONSTANTS[code])
            elif code in NUMBERS:
                self.stack.append(self.number(NUMBERS[code]))
            elif code in COUNTED:
                self.stack.append(self.counted(*COUNTED[code]))
            elif code in GETS:
                self.stack.append(self.memo[self.number(GETS[code])])
            elif code in PUTS:
                self.memo[self.number(PUTS[code])] = self.stack[-1]
            elif code in TUPLES:
                self.stack.append(tuple(reversed([self.pop() for _ in range(TUPLES[code])])))
            elif code in actions:
                actions[code](self)
            elif code in OUTSIDE:
                raise Refused(f"it refers to {OUTSIDE[code]}")
            elif code:
                raise Refused(f"it is no pickle: {code!r} at byte {self.at - 1} is no opcode")
            else:
                raise Refused("it ends in the middle")

    # Reading and bounds

    def spend(self, steps: int) -> None:
        """Count steps."""
        self.steps -= steps
        if self.steps < 0:
            raise Refused(f"it takes more than {STEPS:,} steps; no such file needs as many")

    def grow(self, size: int) -> None:
        """Count bytes that are made by copying."""
        self.growth -= size
        if self.growth < 0:
            raise Refused("it makes far more data than it holds")

    def take(self, size: int) -> memoryview:
        """Return the next bytes of the file."""
        if not 0 <= size <= len(self.view) - self.at:
            raise Refused("it ends in the middle, or a size in it is wrong")
        self.at += size
        return self.view[self.at - size : self.at]

    def number(self, code: str) -> Any:
        """Return the next number, packed as in the module struct."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def counted(self, length: str, kind: str | None) -> Any:
        """Return text, bytes or an integer whose length comes first."""
        raw = self.take(self.number(length))
        if kind is None:
            return bytes(raw) if len(raw) < 4096 else raw
        if kind != "integer":
            return str(raw, kind, "surrogatepass") if kind == "utf-8" else str(raw, kind)
        if len(raw) > DIGITS:
            raise Refused(f"it has an integer of {len(raw)} bytes")
        return int.from_bytes(raw, "little", signed=True)

    def line(self, most: int | None = LINE) -> bytes:
        """Return the bytes up to the next line break."""
        end = self.file.find(b"\n", self.at)
        if end < 0 or (most is not None and end - self.at > most):
            raise Refused("it ends in the middle, or a line in it is too long")
        raw = bytes(self.take(end - self.at))
        self.at += 1
        return raw

    # Values

    def pop(self) -> Any:
        """Return the last value of the stack, not beyond a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("it takes a value that is not there")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Return the values since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def put(self, target: dict, key: Any, value: Any) -> None:
        """Set an entry; keys that are no text become new objects, which hash in no time."""
        if type(key) is bytes and len(key) <= SHOWN:
            key = key.decode("latin-1")
        target[key if type(key) is str else object()] = value

    def record(self, args: Any) -> Record:
        """Return the record of an object that was made of these arguments."""
        self.spend(len(args))
        return Record(list(args))

    def raw(self, value: Any) -> Any:
        """Return the bytes of an array; Python 2 wrote them as text."""
        return self.encode(value) if isinstance(value, str) else value

    def encode(self, text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
        """Return text as bytes."""
        if encoding not in LATIN:
            raise Refused(f"text in the encoding {shown(encoding)} is in it")
        if not isinstance(text, str):
            raise Refused(f"it encodes {named(text)}")
        self.grow(len(text))
        return text.encode("latin-1")

    def find(self, module: Any, name: Any) -> Name:
        """Return the stand-in for a class or function."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused(f"it asks for {named(module)} by {named(name)}")
        if module.split(".", 1)[0] in PYTHON and (module, name) not in ALLOWED:
            asked = f"{module[:SHOWN]}.{name[:SHOWN]}"
            asked = asked if asked.isascii() and asked.isprintable() else ascii(asked)
            raise Refused(
                f"it asks for Python's {asked}, which arrays never need, so it may be an attack"
            )
        return ALLOWED.get((module, name), RECORD)

    def call(self, function: Any, args: Any) -> Any:
        """Return the stand-in for the value of a call."""
        if not isinstance(function, Name) or not isinstance(args, (tuple, list)):
            raise Refused(f"it calls {named(function)} with {named(args)}")
        return function.make(self, args)

    def build(self) -> None:
        """Give an object its state."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Type):
            target.set_order(state[1])
        elif isinstance(target, Array) and target.follows:
            self.read_array(target, state)
        elif isinstance(target, Array):
            shape, kind, fortran, raw = state[-4:]
            target.fill(self.raw(raw), kind, shape, "F" if fortran else "C")
        elif isinstance(target, Record):
            for part in state if isinstance(state, tuple) else (state,):  # __slots__ come second
                if isinstance(part, dict):
                    self.spend(len(part))
                    target.attributes.update(part)
        else:
            raise Refused(f"it changes {named(target)}")

    def read_array(self, target: Array, state: Any) -> None:
        """Read an array that joblib wrote behind its wrapper."""
        kind, shape = state["dtype"], state["shape"]
        if not isinstance(kind, Type) or kind.code is None:
            text = kind.text if isinstance(kind, Type) else kind
            raise Refused(f"it has an array of type {shown(text)}, which is not of numbers")
        if state.get("numpy_array_alignment_bytes") is not None:  # padding after its length
            self.take(self.take(1)[0])
        target.fill(self.take(size_of(kind.code, shape)), kind, shape, state["order"])

    def extend(self, items: list[Any]) -> None:
        """Append items to the list on the stack."""
        target = self.stack[-1]
        target = target.parts if isinstance(target, Record) else target
        if not isinstance(target, list):
            raise Refused(f"it changes {named(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Set entries, keys and values by turns, of the dict on the stack."""
        target = self.stack[-1]
        target = target.attributes if isinstance(target, Record) else target
        if not isinstance(target, dict):
            raise Refused(f"it changes {named(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.put(target, key, value)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def call_last(self) -> None:
        """Call the function below the arguments."""
        args, function = self.pop(), self.pop()
        self.push(self.call(function, args))

    def call_with_names(self) -> None:
        """Call a class with arguments and named ones, which are dropped."""
        _, args, function = self.pop(), self.pop(), self.pop()
        self.push(self.call(function, args))

    def dictionary(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def instance(self) -> None:
        """Make an object of a class that is named here, or that follows the mark."""
        function, *args = self.pop_mark()
        self.push(self.call(function, args))

    def named_instance(self) -> None:
        function, args = self.name(), self.pop_mark()
        self.push(self.call(function, args))

    def name(self) -> Name:
        return self.find(self.line().decode(), self.line().decode())

    def name_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(self.find(module, name))

    def text(self) -> str:
        """Return text in quotes, as Python 2 wrote it."""
        raw = self.line(None)
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in b"'\"":
            raise Refused("it has text without quotes")
        return codecs.escape_decode(raw[1:-1])[0].decode("latin-1")

    def integer(self) -> int | bool:
        raw = self.line(DIGITS)
        return raw == b"01" if raw in (b"00", b"01") else int(raw.rstrip(b"L"))

    def check_protocol(self) -> None:
        if (version := self.number("<B")) > pickle.HIGHEST_PROTOCOL:
            raise Refused(f"it is written in version {version} of pickles, which is not known")

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def discard(self) -> None:
        """Remove the last value, or the mark if it is the last."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def memoize(self, number: int) -> None:
        if not 0 <= number < 2**32:
            raise Refused("it has a number of a value that is out of range")
        self.memo[number] = self.stack[-1]

    actions: dict[bytes, Callable[[Machine], None]] = {
        pickle.MARK: mark,
        pickle.POP: discard,
        pickle.POP_MARK: lambda m: m.pop_mark() and None,
        pickle.DUP: lambda m: m.push(m.stack[-1]),
        pickle.FLOAT: lambda m: m.push(float(m.line(DIGITS))),
        pickle.INT: lambda m: m.push(m.integer()),
        pickle.LONG: lambda m: m.push(m.integer()),
        pickle.STRING: lambda m: m.push(m.text()),
        pickle.UNICODE: lambda m: m.push(m.line(None).decode("raw-unicode-escape")),
        pickle.REDUCE: call_last,
        pickle.NEWOBJ: call_last,
        pickle.NEWOBJ_EX: call_with_names,
        pickle.BUILD: build,
        pickle.INST: named_instance,
        pickle.OBJ: instance,
        pickle.GLOBAL: lambda m: m.push(m.name()),
        pickle.STACK_GLOBAL: name_on_stack,
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.EMPTY_SET: lambda m: m.push([]),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
        pickle.LIST: lambda m: m.push(m.pop_mark()),
        pickle.FROZENSET: lambda m: m.push(m.pop_mark()),
        pickle.DICT: dictionary,
        pickle.APPEND: lambda m: m.extend([m.pop()]),
        pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
        pickle.ADDITEMS: lambda m: m.extend(m.pop_mark()),
        pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
        pickle.GET: lambda m: m.push(m.memo[int(m.line(DIGITS))]),
        pickle.PUT: lambda m: m.memoize(int(m.line(DIGITS))),
        pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
        pickle.PROTO: check_protocol,
        pickle.FRAME: lambda m: m.number("<Q") and None,
    }
