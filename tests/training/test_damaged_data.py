"""Damaged arrays, shards, indexes, plans and weights end in one class of error with their name."""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gmflow_core.files.atomic import scratch_folder
from gmflow_core.files.errors import FileError, WriteError
from tests.training.evaluation_runs import two_classes, write_prepared
from tests.training.image_folders import run, write_images
from training.common import files
from training.common.arrays import NpyFile, read_npz
from training.common.files import load_pytorch
from training.data.plan import check_plan
from training.data.shards import LatentDataset, read_index, shard_name, write_shard
from training.data.tokens import TokenFiles, read_tokens, write_tokens
from training.evaluation.chunks import Chunks
from training.evaluation.classifier import Classifier, ClassifierConfig, ClassifierFeatures
from training.evaluation.reference_file import read_reference

VALUES = [None, -1, 0, 10**30, 1.5, float("nan"), True, "x", "\ud800", [], {}, [[1]], {"file": 1}]


def mutated(raw, rng):
    """Change some bytes, cut, or repeat a part."""
    raw = bytearray(raw)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(raw[: rng.integers(len(raw))])
    if kind == 1:
        at = rng.integers(len(raw))
        return bytes(raw[:at] + raw[at : at + rng.integers(1, 64)] + raw[at:])
    near = min(len(raw), 400)  # headers break in more ways than numbers do
    for _ in range(rng.integers(1, 9)):
        raw[rng.integers(near if kind == 2 else len(raw))] = rng.integers(256)
    return bytes(raw)


def edited(value, rng):
    """Replace one entry of JSON somewhere, or remove it."""
    value = json.loads(json.dumps(value))
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        deeper = place[key]
        if isinstance(deeper, (dict, list)) and deeper and rng.random() < 0.7:
            place = deeper
            continue
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = VALUES[rng.integers(len(VALUES))]
        return value


def is_clear(read, path):
    """Return whether reading succeeds; fail if it raises anything but an error that names it."""
    try:
        read()
    except (FileError, FileNotFoundError) as error:
        text = str(error)
        text.encode()
        assert path.name in text or path.parent.name in text, text
        assert len(text) < 3000
        return False
    return True


def all_of(tokens):
    return list(tokens)


def read_all(folder, **options):
    data = LatentDataset(folder, **options)
    x, labels = data.__getitems__(range(len(data)))
    assert x.isfinite().all()
    assert labels.max() < len(data.classes)


def bytes_of_array(compressed=False):
    file = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(file, arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=np.ones(3), sigma=np.eye(3))
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy", "fortran", "tokens"])
def test_arrays_with_changed_bytes(kind, tmp_path):
    rng = np.random.default_rng(len(kind))
    path = tmp_path / {"npz": "a.npz", "compressed": "a.npz", "tokens": "a.safetensors"}.get(
        kind, "a.npy"
    )
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    if kind == "tokens":
        write_tokens(path, torch.from_numpy(values), {})
        whole = path.read_bytes()
    else:
        whole = {
            "npz": bytes_of_array(),
            "compressed": bytes_of_array(True),
            "npy": npy(values),
            "fortran": npy(np.asfortranarray(values)),
        }[kind]
    path.write_bytes(whole)
    read = (lambda: read_reference(path)) if path.suffix == ".npz" else (
        lambda: all_of(TokenFiles([path]))
    )  # fmt: skip
    assert is_clear(read, path)
    for _ in range(80):
        path.write_bytes(mutated(whole, rng))
        is_clear(read, path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a prepared folder of 13 pictures in 3 shards."""
    place = tmp_path_factory.mktemp("damaged")
    run(write_images(place / "images"), place / "out")
    return place


def test_shards_with_changed_bytes(prepared):
    rng, folder = np.random.default_rng(1), prepared / "out"
    path = folder / shard_name(1)
    whole = path.read_bytes()
    for number in range(60):
        path.write_bytes(mutated(whole, rng))
        is_clear(lambda memory=bool(number % 2): read_all(folder, in_memory=memory), path)
    path.write_bytes(whole)
    read_all(folder)


def test_edited_indexes_and_plans(prepared):
    rng, folder = np.random.default_rng(2), prepared / "out"
    plan = json.loads((folder / "plan.json").read_text())
    for name in ("index.json", "plan.json"):
        path = folder / name
        whole = path.read_text()
        for number in range(60):
            path.write_text(json.dumps(edited(json.loads(whole), rng)))
            if number % 4 == 0:
                path.write_bytes(mutated(whole.encode(), rng))
            if name == "index.json":
                is_clear(lambda: read_all(folder), path)
                continue
            is_clear(lambda: check_plan(folder, plan), path)
        path.write_text(whole)
    read_all(folder)


@pytest.mark.parametrize(
    "file", ["../out/shard-00000.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None]
)
def test_shards_lie_in_their_folder(file, prepared):
    path = prepared / "out" / "index.json"
    whole = path.read_text()
    index = json.loads(whole)
    index["shards"][0]["file"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(FileError, match="shard file"):
        read_index(prepared / "out")
    path.write_text(whole)


def twice(index):
    return {"shards": index["shards"] * 2, "count": 2 * index["count"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 14}, "says 14 samples, but its shards add up to 13"),
        (twice, "shard file .* named once"),
        ({"shape": [3, 2**20, 2**20]}, "shape is"),
        ({"classes": []}, "classes is"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"scaling_factor": True}, "scaling_factor is True"),
        ({"seed": -1}, "seed is -1"),
        ({"flip": 1}, "flip is 1"),
        ({"skipped": [{"file": "a"}]}, "skipped is"),
    ],
)
def test_entries_of_an_index_are_checked(changes, said, prepared):
    path = prepared / "out" / "index.json"
    whole = path.read_text()
    index = json.loads(whole)
    path.write_text(json.dumps(index | (changes(index) if callable(changes) else changes)))
    with pytest.raises(FileError, match=said):
        read_index(prepared / "out")
    path.write_text(whole)


@pytest.mark.parametrize("in_memory", [True, False])
def test_latents_that_are_not_finite_are_named(in_memory, tmp_path):
    x = torch.randn(6, 4, 2, 2)
    write_prepared(tmp_path, x, torch.arange(6) % 2, kind="latents")
    x[3, 0, 0, 1] = float("nan")
    write_shard(tmp_path / shard_name(0), x, torch.arange(6) % 2, {})
    with pytest.raises(FileError, match=r"shard-00000.* in its samples 3; delete it"):
        LatentDataset(tmp_path, in_memory=in_memory).__getitems__([1, 3])


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_prepared(tmp_path, *two_classes(20))
    data = LatentDataset(tmp_path, in_memory=False)
    data.__getitems__([0])
    os.truncate(tmp_path / shard_name(0), 1000)
    with pytest.raises(FileError, match="ends before its sample 19"):
        data.__getitems__([19])


def test_arrays_that_claim_more_than_they_hold(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        head = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**33,)}
        np.lib.format.write_array_header_1_0(head, header)
        archive.writestr("arr_0.npy", head.getvalue() + bytes(100))
    with pytest.raises(FileError, match=r"a\.npz .*takes 8,589,934,592 bytes"):
        read_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", head.getvalue() + bytes(2**22))
    monkeypatch.setattr("training.common.arrays.SMALL", 2**20)
    with pytest.raises(FileError, match="far more than the file"):
        read_npz(path)
    path = tmp_path / "a.npy"
    path.write_bytes(head.getvalue())
    with pytest.raises(FileError, match="is truncated"):
        NpyFile(path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(FileError, match="not numbers"):
        NpyFile(path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FileError, match="is a pipe"):
        read_npz(tmp_path / "pipe.npz")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "u1", "u2", "i8"])
def test_whole_arrays_of_every_type_are_right(kind, order, tmp_path):
    values = np.arange(60).reshape(12, 5)
    for name, array in (("c", values), ("f", np.asfortranarray(values))):
        np.save(tmp_path / f"{name}.npy", array.astype(order + kind))
        tokens = TokenFiles([tmp_path / f"{name}.npy"], range(3, 11))
        assert torch.cat(list(tokens)).double().tolist() == values[3:11].tolist()


def test_tokens_that_are_not_finite_or_of_no_numbers(tmp_path):
    write_prepared(tmp_path, *two_classes(20))
    tokens = torch.zeros(20, 3)
    tokens[4] = float("inf")
    write_tokens(tmp_path / "tokens.safetensors", tokens, {})
    with pytest.raises(ValueError, match=r"rows 4 of .* are not finite"):
        read_tokens(tmp_path)
    save_file({"tokens": torch.zeros(20, 3, dtype=torch.bool)}, tmp_path / "tokens.safetensors")
    with pytest.raises(FileError, match="in BOOL, not numbers"):
        read_tokens(tmp_path)


def test_features_with_changed_bytes_or_settings(tmp_path):
    path = tmp_path / "f.safetensors"
    torch.manual_seed(0)
    network = Classifier(ClassifierConfig(4, 4, 2, channels=8, features=4))
    ClassifierFeatures(network, ("a", "b"), {"accuracy": 0.5}).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(3)

    def read():
        assert ClassifierFeatures.load(path).extract(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))

    assert is_clear(read, path)
    for _ in range(60):
        path.write_bytes(mutated(whole, rng))
        is_clear(read, path)
    for config in ({"channels": 10**12}, {"channels": 10**6}, {"features": -1}, {"height": "4"}):
        length = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + length])
        old = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps({**old, **config})
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        with pytest.raises(FileError, match=r"f\.safetensors"):
            ClassifierFeatures.load(path)


def test_measures_with_changed_bytes(tmp_path):
    chunks, rng = Chunks(tmp_path, {"a": 1}, 5, 5), np.random.default_rng(4)
    chunks.write(0, {"x": torch.ones(5, 2)}, {"b": 2})
    assert chunks.state(0) == "whole"
    whole = chunks.path(0).read_bytes()
    for _ in range(60):
        chunks.path(0).write_bytes(mutated(whole, rng))
        if chunks.state(0) == "whole":
            is_clear(lambda: chunks.read(0), chunks.path(0))
        if chunks.state(0) == "foreign":
            is_clear(lambda: chunks.differences(0), chunks.path(0))
    chunks.write(0, {"x": torch.full((5, 2), torch.nan)}, {})
    with pytest.raises(FileError, match="NaN or infinity in 'x'"):
        chunks.read(0)


def test_without_room_for_temporary_files_no_file_is_blamed(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(WriteError, match=r"no temporary folder .*TMPDIR"):
        load_pytorch(tmp_path / "a.pt")
    monkeypatch.setattr(files, "temporary_folder", lambda: nullcontext(tmp_path / "none"))
    with pytest.raises(WriteError, match=r"none cannot be written .*TMPDIR"):
        load_pytorch(tmp_path / "a.pt")


def test_what_killed_processes_left_among_temporary_files_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    with scratch_folder() as ours:
        left = tmp_path / ours.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
        left.mkdir()
        with files.temporary_folder() as folder:
            assert sorted(tmp_path.iterdir()) == sorted([ours, folder])
    assert list(tmp_path.iterdir()) == []


def test_deeply_nested_pickles_end_another_process_at_most(tmp_path):
    """Hashing or freeing such a tuple recurses without end."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        pickle = b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/version", "3")
    with pytest.raises(FileError, match=r"a\.pt (ended the process|is refused)"):
        load_pytorch(path)
