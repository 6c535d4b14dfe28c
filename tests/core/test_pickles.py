"""Hostile pickles: whatever is in the file, the converter ends soon, in bounds, in one error."""

import os
import pickle
import random
import struct
import sys
import tracemalloc

import numpy as np
import pytest

from gmflow_core.files.errors import FileError
from gmflow_core.source import pickle_machine, pickles
from gmflow_core.source.pickle_arrays import find_arrays, most_memory, most_output, most_time
from gmflow_core.source.pickles import convert_pickle

DEEP = 60_000
STEPS = 150_000  # instead of the reader's own, which take seconds
HUGE = struct.pack("<Q", 2**40)
CALLED = b"cbuiltins\n%b\n"
ARRAY = np.arange(6.0).reshape(2, 3)
GOOD = {"means": ARRAY, "var": np.ones(2), "weights": np.full(2, 0.5), "kind": {"a": [1, None]}}

HOSTILE = {  # content, and a part of the answer
    "deep key": (b"})" + b"\x85" * DEEP + b"Ns.", "found"),
    "deep item of a set": (b"\x8f()" + b"\x85" * DEEP + b"\x90.", "found"),
    "deep frozenset": (b"())" + b"\x85" * DEEP + b"\x91.", "found"),
    "deep list": (b"]" * DEEP + b"a" * (DEEP - 1) + b".", "found"),
    "key that is hard to hash": (
        b"}("
        + b"".join(b"\x8a\x0a%bN" % (i * (2**61 - 1)).to_bytes(10, "little") for i in range(9999))
        + b"u.",
        "found",
    ),
    "far entry of the memo": (b"Nr\xff\xff\xff\xff.", "found"),
    "endless entry of the memo": (b"Np99999999999999999999\n.", "out of range"),
    "length of a bytearray": (b"\x96" + HUGE + b".", "a size in it is wrong"),
    "length of bytes": (b"\x8e" + HUGE + b".", "a size in it is wrong"),
    "negative length": (b"T\xff\xff\xff\xff.", "a size in it is wrong"),
    "length of an integer": (b"\x8b" + struct.pack("<i", 2000) + b"\x7f" * 2000 + b".", "integer"),
    "digits of an integer": (b"I" + b"9" * 5000 + b"\n.", "too long"),
    "long name": (b"c" + b"a" * 20_000 + b"\nb\n.", "too long"),
    "zeros": (CALLED % b"bytearray" + b"J\0\0\0\x70\x85R.", "bytes of a value of type int"),
    "text as a number": (CALLED % b"complex" + b"(X\x02\0\0\0((tR.", "found"),
    "copies of a list": (
        b"(" + b"N" * 9999 + b"lq\x00" + CALLED % b"set" + b"q\x01"
        + b"h\x01h\x00\x85R" * 999 + b".",
        f"more than {STEPS:,} steps",
    ),
    "copies of arguments": (
        b"(" + b"N" * 9999 + b"tq\x00cx\ny\nq\x01" + b"h\x01h\x00\x81" * 999 + b".",
        f"more than {STEPS:,} steps",
    ),
    "many arrays": (
        pickle.dumps({"means": [np.ones(2)] * 70_000, "var": np.ones(2)}),
        "a list of 70000 arrays",
    ),
    "copies of text": (
        b"X" + struct.pack("<I", 10**5) + b"a" * 10**5
        + b"q\x00c_codecs\nencode\nq\x01" + b"h\x01h\x00\x85R" * 99 + b".",
        "more data than it holds",
    ),
    "copies of an array": (
        pickle.dumps({"means": [np.zeros(10**5)] * 50, "var": np.ones(50)}),
        "repeats arrays",
    ),
    "doubling": (
        b"]" + b"".join(b"q%c](%be" % (i, b"h%c" % i * 10) for i in range(99)) + b".",
        "found",
    ),
    "circle": (b"}q\x00X\x01\x00\x00\x00ah\x00s.", "['a']"),
    "many values": (b"(" + b"}" * (STEPS + 1) + b"l.", f"more than {STEPS:,} steps"),
    "shape": (pickle.dumps(np.zeros((3, 4))).replace(b"K\x03K\x04", b"K\x03K\xff"), "shape needs"),
    "name": (b"X\x02\0\0\0osX\x03\0\0\0\xed\xa0\x80\x93.", "asks for Python's"),
    "nothing": (b"", "ends in the middle"),
    "no value": (b".", "not there"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_end_soon_and_in_bounds(kind, monkeypatch):
    """In this process, so that no limit of the other one is what stops them."""
    monkeypatch.setattr(pickle_machine, "STEPS", STEPS)
    raw, expected = HOSTILE[kind]
    if len(raw) < 10_000:  # few steps, as they are slow when traced
        tracemalloc.start()
    try:
        header, content = find_arrays(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert expected in str(header)
    assert str(header).isprintable()
    assert not content
    assert peak < 2**20 + 250 * len(raw)


@pytest.mark.parametrize("key", [b"K\x01", b"N", b"))\x86", b"G" + bytes(8)])
def test_keys_that_are_no_text_are_never_hashed(key):
    """Hashing deep tuples would overflow the stack, and chosen numbers take quadratic time."""
    (found,) = pickle_machine.Machine(b"}" + key + b"Ns.").run()
    assert type(found) is object


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_any_order_in_memory_are_read(tmp_path, protocol):
    means = np.arange(24.0).reshape(2, 3, 4)
    for axes in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        turned = np.ascontiguousarray(means.transpose(axes)).transpose(np.argsort(axes))
        path = tmp_path / "source.pkl"
        path.write_bytes(pickle.dumps({**GOOD, "means": turned}, protocol))
        assert np.array_equal(convert_pickle(path).means.numpy(), means)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_damaged_pickles_give_a_mixture_or_a_reason(protocol):
    """Bytes are changed, removed, repeated and swapped."""
    rng = random.Random(protocol)
    whole = pickle.dumps(GOOD, protocol)
    header, content = find_arrays(whole)
    assert set(header["fields"]) == {"means", "variances", "weights"}
    assert bytes(content[0]) == ARRAY.tobytes()
    answers = set()
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            size = rng.randint(0, 8)
            change = rng.randrange(4)
            if change == 0:
                raw[at] = rng.randrange(256)
            elif change == 1:
                del raw[at : at + size]
            elif change == 2:
                raw[at:at] = raw[at : at + size] * rng.choice((1, 20))
            else:
                raw[at : at + size] = rng.choice(list(HOSTILE.values()))[0][:16]
            raw = raw or bytearray(b".")
        header, content = find_arrays(bytes(raw))
        answers.update(header)
        assert str(header).isprintable()
        assert sum(map(len, content)) <= most_output(len(raw))
        if "fields" not in header:
            assert not content
    assert answers >= {"refused", "fields"}


def convert(folder, content):
    path = folder / "mixture.pkl"
    path.write_bytes(content)
    return convert_pickle(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": np.full((2, 3), np.nan)}, "modes 0, 1 are not finite"),
        ({"means": np.zeros(())}, r"for means \(\)"),
        ({"means": np.zeros(2)}, "need the dimensions"),
        ({"means": np.zeros((0, 2**40)), "var": np.ones(0), "weights": np.ones(0)}, "dimensions"),
        ({"means": [10**400, 1]}, "too large"),
        ({"means": [np.ones(2), np.ones(3)]}, "different shapes"),
        ({"var": np.full(2, 1e300)}, "not finite or not positive"),
        ({"var": np.array([1.0, -1.0])}, "not finite or not positive"),
        ({"weights": np.array([-1.0, 2.0])}, "add up to nan"),
        ({"weights": np.ones(3) / 3}, "not one for each of 2 modes"),
        ({"covariance_type": "\x1b[31m" * 99}, r"type '\\x1b"),
        ({"covariance_type": {}}, "of the type a value of type dict"),
    ],
)
def test_arrays_that_are_no_mixture_are_refused(tmp_path, changes, message):
    with pytest.raises(FileError, match=message) as caught:
        convert(tmp_path, pickle.dumps({**GOOD, **changes}))
    assert str(caught.value).startswith(str(tmp_path / "mixture.pkl"))
    assert str(caught.value).isprintable()


def test_lists_of_arrays_and_of_numbers_convert(tmp_path):
    content = {"means": [*ARRAY], "stds": [np.float32(2), 3], "pi": np.array([1, 3], ">f2") / 4}
    source = convert(tmp_path, pickle.dumps(content))
    assert np.array_equal(source.means, ARRAY)
    assert source.std.flatten().tolist() == [2, 3]
    assert source.weights.tolist() == pytest.approx([0.25, 0.75])


def test_what_is_no_bare_pickle_is_named(tmp_path):
    for start, message in ((b"PK\x03\x04", "torch.save"), (b"\x1f\x8b\x08", "is compressed")):
        with pytest.raises(FileError, match=message):
            convert(tmp_path, start)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="is a pipe"):
        convert_pickle(tmp_path / "pipe")
    with pytest.raises(FileError, match="is a folder"):
        convert_pickle(tmp_path)


LOOP = "while True: pass"
FILL = """import source.pickle_arrays as m
m.limit_process(0)
x = []
while True: x.append(' ' * 2**20)"""
DIE = "import os; os.kill(os.getpid(), 11)"
TELL = """import resource, sys
sys.path.append(sys.argv[1])
import source.pickle_arrays as m
names = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_CORE", "RLIMIT_FSIZE")
tell = lambda file: [str(resource.getrlimit(getattr(resource, name))[0]) for name in names]
m.find_arrays = lambda file, kind: ({"found": tell(file)}, [])
m.main()
"""
LIE = """print(end='')
import json, struct, sys
part = {'type': '<f8', 'shape': [2**40], 'order': 'C', 'size': 2**43}
text = json.dumps({'fields': {'means': part}}).encode()
sys.stdout.buffer.write(struct.pack('<Q', len(text)) + text)
"""


def test_steps_are_bounded_in_the_other_process_too(tmp_path):
    with pytest.raises(FileError, match="more than 2,000,000 steps"):
        convert(tmp_path, b"(" + b"N" * 2_000_000 + b"l.")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_the_other_process_limits_itself_before_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "START", TELL)
    with pytest.raises(FileError) as caught:
        convert(tmp_path, pickle.dumps(GOOD))
    size = (tmp_path / "mixture.pkl").stat().st_size
    assert f"['{most_memory(size)}', '{most_time(size)}', '0', '0']" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (LOOP, "took longer than 1 s"),
        (FILL, r"failed \(exit status 1\): it takes too much memory"),
        (DIE, r"ended by the system \(SIGSEGV\)"),
        (LIE, "refused: reading it"),
    ],
    ids=["time", "memory", "signal", "lie"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")
def test_the_end_of_the_other_process_is_an_error_about_the_file(
    tmp_path, monkeypatch, code, message
):
    monkeypatch.setattr(pickles, "START", "import sys; sys.path.append(sys.argv[1])\n" + code)
    monkeypatch.setattr(pickles, "most_time", lambda size: 1 if code == LOOP else 60)
    with pytest.raises(FileError, match=message):
        convert(tmp_path, pickle.dumps(GOOD))
