"""Test the command that writes CIFAR-10's pictures, on small files in the layouts of its own."""

import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from training.cifar10 import main
from training.data import cifar10
from training.data.cifar10 import NAMES, PARTS, PYTHON_NAMES, RECORD

COUNT = 3  # records of a file, in the place of 10,000
CLASSES = ["airplane", "cat", *(f"c{i}" for i in range(8))]


@pytest.fixture(autouse=True)
def few_records(monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", COUNT)


class Python2Pickler(pickle._Pickler):
    """Pickler that writes text and bytes as Python 2 wrote its strings in the published files."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        raw = value.encode("latin-1") if isinstance(value, str) else value
        short = pickle.SHORT_BINSTRING + struct.pack("<B", len(raw) % 256)
        self.write(short if len(raw) < 256 else pickle.BINSTRING + struct.pack("<i", len(raw)))
        self.write(raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python_2(value):
    """Return a pickle as Python 2 and NumPy 1 wrote it."""
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def python_3(value):
    return pickle.dumps(value, 2)


def write_files(folder, count=COUNT, labels=10, left_out=(), pickled=None):
    """Write files of `count` records; return their pictures (files, n, 32, 32, 3) and labels.

    Args:
        pickled: python_2 or python_3, for Python's form.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (len(PARTS), count, 32, 32, 3), np.uint8)
    numbers = rng.integers(0, labels, (len(PARTS), count), np.uint8)
    if pickled:
        names = [name.encode() for name in CLASSES]
        (folder / PYTHON_NAMES).write_bytes(pickled({b"label_names": names, b"num_vis": 3072}))
    else:
        (folder / NAMES).write_text("\n".join(CLASSES) + "\n\n")
    for name, own, classes in zip(PARTS, pictures, numbers, strict=True):
        if name in left_out:
            continue
        planes = own.transpose(0, 3, 1, 2).reshape(count, -1)
        if pickled:
            files = [b"%d.png" % number for number in range(count)]
            batch = {b"data": planes, b"labels": classes.tolist(), b"filenames": files}
            (folder / name.removesuffix(".bin")).write_bytes(pickled(batch))
        else:
            content = np.concatenate([classes[:, None], planes], 1).tobytes()
            (folder / name).write_bytes(content)
    return pictures, numbers


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pickled", [None, python_2, python_3])
def test_pictures_and_classes_are_those_of_the_files(tmp_path, capsys, packed, pickled):
    source = tmp_path / "files"
    pictures, numbers = write_files(source, labels=2, pickled=pickled)
    if packed:
        source = tmp_path / "cifar-10.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "files", "cifar-10-batches")
    out = tmp_path / "out"
    main(["--data", str(source), "--out", str(out)])
    assert "15 pictures" in capsys.readouterr().out
    for part, own, classes in (
        ("train", pictures[:-1].reshape(-1, 32, 32, 3), numbers[:-1].reshape(-1)),
        ("test", pictures[-1], numbers[-1]),
    ):
        for number, (picture, label) in enumerate(zip(own, classes, strict=True)):
            path = out / part / ("airplane", "cat")[label] / f"{number:05d}.png"
            assert (np.asarray(Image.open(io.BytesIO(path.read_bytes()))) == picture).all()
        assert len(list((out / part).rglob("*.png"))) == len(own)


@pytest.mark.parametrize(
    ("settings", "damage", "said"),
    [
        ({"left_out": ["data_batch_4.bin"]}, None, r"has no data_batch_4\.bin"),
        ({"labels": 30}, None, "has the label 2[0-9] of 10 classes"),
        ({}, lambda content: content[:-1], f"bytes, which is no multiple of {RECORD:,}"),
    ],
)
def test_wrong_files_are_named_and_leave_nothing(tmp_path, settings, damage, said):
    write_files(tmp_path / "data", **settings)
    if damage:
        path = tmp_path / "data" / "test_batch.bin"
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit, match=said):
        main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(SystemExit, match=r"cannot be read .*give cifar-10-binary\.tar\.gz"):
        main(["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9, -6])
def test_a_damaged_archive_is_refused(tmp_path, place):
    """One bit is wrong, in the pictures or in the checksum at the end."""
    write_files(tmp_path / "files")
    source = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(tmp_path / "files", "cifar-10-batches-bin")
    content = bytearray(source.read_bytes())
    content[place if place < 0 else int(place * len(content))] ^= 4
    source.write_bytes(content)
    with pytest.raises(SystemExit, match=r"cannot be read .*give cifar-10-binary\.tar\.gz"):
        main(["--data", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def refused(folder, said):
    """Check that files are refused with a message, and that nothing is written."""
    with pytest.raises(SystemExit, match=said) as end:
        main(["--data", str(folder), "--out", str(folder.parent / "out")])
    assert "give cifar-10-binary.tar.gz or cifar-10-python.tar.gz" in str(end.value)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("pickled", [None, python_2])
@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1])
def test_a_file_of_another_number_of_records_is_refused(tmp_path, pickled, count):
    """One that is cut between two records is, and nothing else in it shows that."""
    write_files(tmp_path / "files", pickled=pickled)
    write_files(tmp_path / "others", count=count, pickled=pickled)
    name = "data_batch_2" if pickled else "data_batch_2.bin"
    (tmp_path / "others" / name).replace(tmp_path / "files" / name)
    refused(tmp_path / "files", f"{name} has {count} records instead of {COUNT}")


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    write_files(tmp_path / "files")
    monkeypatch.setattr(cifar10, "MOST_BYTES", COUNT * RECORD - 1)
    refused(tmp_path / "files", r"has 9,219 bytes; the most is 9,218")


class Attack:
    def __reduce__(self):
        return os.system, ("echo attacked > attacked",)


@pytest.mark.parametrize("name", [PYTHON_NAMES, "test_batch"])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "files", pickled=python_2)
    (tmp_path / "files" / name).write_bytes(pickle.dumps({b"data": Attack()}, 2))
    refused(tmp_path / "files", rf"{name} is refused: it asks for Python's \w+\.system")
    assert not (tmp_path / "attacked").exists()


DATA = np.zeros((COUNT, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({b"data": DATA}, r"holds no arrays data and labels: it has \['data'\]"),
        ({b"data": DATA[:, 1:], b"labels": [0] * COUNT}, r"has data in uint8 \(3, 3071\)"),
        ({b"data": DATA.astype("f4"), b"labels": [0] * COUNT}, "has data in float32"),
        ({b"data": DATA, b"labels": [0]}, "has 1 labels for 3 pictures"),
        ({b"data": DATA, b"labels": [0, 1, 0.5]}, "no whole numbers"),
        ({b"data": DATA, b"labels": [0, 1, -1]}, "no whole numbers"),
        ({b"data": DATA, b"labels": [0, 1, 10]}, "has the label 10 of 10 classes"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, batch, said):
    write_files(tmp_path / "files", pickled=python_2)
    (tmp_path / "files" / "test_batch").write_bytes(python_2(batch))
    refused(tmp_path / "files", said)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([b"cat", b"../dog"], r"batches\.meta has the names \['cat', '\.\./dog'\]"),
        ([b"cat", 1], r"holds no short texts label_names: it has \['label"),
        ([b"c"] * 1001, "holds no short texts label_names"),
    ],
)
def test_wrong_names_are_refused(tmp_path, names, said):
    write_files(tmp_path / "files", pickled=python_2)
    (tmp_path / "files" / PYTHON_NAMES).write_bytes(python_2({b"label_names": names}))
    refused(tmp_path / "files", said)


def test_a_cut_pickle_is_refused(tmp_path):
    write_files(tmp_path / "files", pickled=python_2)
    path = tmp_path / "files" / "data_batch_1"
    path.write_bytes(path.read_bytes()[:5000])
    refused(tmp_path / "files", "data_batch_1 is refused: it ends in the middle")
