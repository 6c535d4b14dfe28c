"""Altered files of sources, EM states and running moments: each ends in an error about the file."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core.cli import main
from gmflow_core.demo_command import POINTS_MODEL
from gmflow_core.files.errors import FileError
from gmflow_core.source.em import fit_mixture
from gmflow_core.source.files import load_source, read_source_metadata, save_source
from gmflow_core.source.moments import RunningMoments
from gmflow_core.source.source import GaussianMixtureSource
from tests.clusters import clusters
from tests.helpers import normal


def source_of(modes=3, shape=(2, 4), assigner=None):
    weights = torch.full((modes,), 1 / modes).log()
    return GaussianMixtureSource(normal(modes, *shape), torch.ones(modes, 1, 1), weights, assigner)


def write_source(path):
    tokens = GaussianMixtureSource(normal(3, 5), torch.ones(3, 5), torch.full((3,), 1 / 3).log())
    save_source(source_of(assigner=tokens), path)


def write_em(path):
    fit_mixture(clusters(count=60).float(), 3, state=path, max_iterations=3, tolerance=0)


def write_moments(path):
    moments = RunningMoments(3, (2, 4))
    moments.add(normal(30, 2, 4), torch.arange(30) % 3)
    moments.save(path, {"rows": [0, 30]})


KINDS = {  # how a file is written and read
    "source": (write_source, load_source),
    "em": (write_em, lambda path: fit_mixture(clusters(count=60).float(), 3, state=path)),
    "moments": (
        write_moments,
        lambda path: RunningMoments(3, (2, 4)).restore(path, {"rows": [0, 30]}, 30),
    ),
}


def header_of(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def change(path, tensors=None, metadata=None):
    """Change tensors (None removes one) and metadata of a file."""
    found, about = load_file(path), header_of(path)[0]["__metadata__"]
    for name, value in (tensors or {}).items():
        found[name] = value(found[name]) if callable(value) else value
    save_file(
        {n: t for n, t in found.items() if t is not None}, path, {**about, **(metadata or {})}
    )


def one(value):
    def replace(tensor):
        tensor.flatten()[0] = value
        return tensor

    return replace


NESTED = "[" * 10**5
ALTERED = [
    ("source", {"tensors": {"means": one(torch.nan)}}, "not finite"),
    ("source", {"tensors": {"std": one(-1)}}, "not positive"),
    ("source", {"tensors": {"log_weights": one(3)}}, "weights add up to"),
    (
        "source",
        {"tensors": {"means": torch.zeros(3, 4, 2)}},
        r"has means of \(3, 4, 2\) instead of",
    ),
    ("source", {"tensors": {"assigner.std": torch.ones(3, 4)}}, r"has assigner.std of \(3, 4\)"),
    ("source", {"tensors": {"means": torch.zeros(3, 2, 4).int()}}, "has means in torch.int32"),
    ("source", {"tensors": {"std": None}}, "holds .* instead of"),
    ("source", {"metadata": {"config": NESTED}}, "no readable config"),
    ("source", {"metadata": {"config": "{}"}}, "has the num_modes None"),
    ("source", {"metadata": {"config": '{"num_modes": 1e12, "shape": [2]}'}}, "num_modes 1000"),
    ("source", {"metadata": {"config": '{"num_modes": 3, "shape": 5}'}}, "has the shape 5"),
    ("source", {"metadata": {"config": '{"num_modes": 3, "shape": [2, true]}'}}, "has the shape"),
    (
        "source",
        {"metadata": {"config": '{"num_modes": 3, "shape": [2, 4], "assigner": {"a": 1}}'}},
        "has the assigner",
    ),
    ("source", {"metadata": {"training": "[]"}}, "instead of an object"),
    ("source", {"metadata": {"data": '{"labels": 5}'}}, "has the labels 5"),
    ("em", {"tensors": {"means": one(torch.inf)}}, "not finite"),
    ("em", {"tensors": {"var": one(-1)}}, "has variances below"),
    ("em", {"tensors": {"log_weights": one(3)}}, "weights that add up to"),
    ("em", {"tensors": {"log_likelihoods": one(torch.nan)}}, "'log_likelihoods' that are not"),
    ("em", {"tensors": {"log_likelihoods": torch.zeros(1, 1)}}, "has log_likelihoods of"),
    ("em", {"tensors": {"var": torch.ones(3, 1)}}, r"has var of \(3, 1\) instead of \(3, 5\)"),
    ("em", {"tensors": {"means": torch.zeros(4, 5)}}, r"has means of \(4, 5\)"),
    ("em", {"tensors": {"means": torch.zeros(3, 5).long()}}, "has means in torch.int64"),
    ("em", {"tensors": {"mean": None}}, "holds .* instead of"),
    ("em", {"metadata": {"settings": NESTED}}, "no readable settings"),
    ("em", {"metadata": {"settings": "3"}}, "settings 3 instead of an object"),
    ("em", {"metadata": {"settings": '{"seed": "\\ud800"}'}}, "state of another fit"),
    ("moments", {"tensors": {"counts": one(-1)}}, "fewer than no samples"),
    ("moments", {"tensors": {"counts": one(21)}}, "counts 41 samples, more than there are"),
    ("moments", {"tensors": {"counts": torch.ones(3)}}, "has counts in torch.float32"),
    ("moments", {"tensors": {"squares": one(-1)}}, "negative"),
    ("moments", {"tensors": {"means": one(torch.nan)}}, "not finite"),
    ("moments", {"tensors": {"means": torch.zeros(1, 2, 4)}}, "has means of"),
    ("moments", {"metadata": {"settings": NESTED}}, "no readable settings"),
    ("moments", {"metadata": {"settings": '{"rows": [0, 31]}'}}, "of another fit"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), ALTERED)
def test_altered_files_are_named_with_what_is_wrong(tmp_path, kind, changes, message):
    write, read = KINDS[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    read(path)
    change(path, **changes)
    with pytest.raises(FileError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} ")
    assert "; " in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    """Bytes of the header and of the numbers are changed; what is read must be finite."""
    write, read = KINDS[kind]
    path, rng = tmp_path / "file.safetensors", random.Random(0)
    write(path)
    whole = path.read_bytes()
    header, refused = 8 + struct.unpack("<Q", whole[:8])[0], []
    for number in range(60):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(8, header if number % 2 else len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            result = read(path)
        except FileError as error:
            refused.append(str(error))
            continue
        result = result.source if kind == "em" else result
        if isinstance(result, GaussianMixtureSource):
            assert result.means.isfinite().all()
    assert len(refused) > 10
    assert all(message.startswith(f"{path} ") for message in refused)


def test_refused_moments_leave_the_sums_as_they_were(tmp_path):
    path = tmp_path / "moments.safetensors"
    write_moments(path)
    change(path, {"counts": one(-5)})
    moments = RunningMoments(3, (2, 4))
    with pytest.raises(FileError):
        moments.restore(path, {"rows": [0, 30]})
    assert not moments.means.any()
    assert not moments.counts.any()


def test_a_record_of_another_type_is_no_other_source():
    for record in (5, [], {"num_modes": 3}, {"num_modes": 3, "shape": 7}):
        with pytest.raises(ValueError, match=r"has the record .* edited or damaged"):
            source_of().require_record(record, "m")
    with pytest.raises(ValueError, match="with a source of None modes"):
        source_of().require_record({"num_modes": None, "shape": [[2], "a"]}, "m")


def test_a_single_wrong_mode_is_named():
    source = source_of()
    for modes in ([9999], torch.tensor([9999, 9999])):
        with pytest.raises(
            ValueError, match=r"^mode 9999 does not fit a source of 3 modes; give 0"
        ):
            source.moments(modes)
    moments = RunningMoments(3, (2, 4))
    with pytest.raises(ValueError, match=r"^mode 3 does not fit a mixture of 3 modes"):
        moments.add(normal(1, 2, 4), torch.tensor([3]))


# The command line


@pytest.mark.parametrize("command", ["inspect", "sample", "convert"])
@pytest.mark.parametrize("content", ["pipe", "pickle", "short", "source", "missing"])
def test_gmflow_ends_in_one_line_about_any_file(tmp_path, capsys, command, content):
    path = tmp_path / "a\udcff\x1b[31m.safetensors"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "source":
        write_source(tmp_path / "plain.safetensors")
        os.rename(tmp_path / "plain.safetensors", path)
    elif content != "missing":
        path.write_bytes(b"PK\x03\x04" * 9 if content == "pickle" else b"{}")
    extra = {"convert": [str(tmp_path / "out.safetensors")]}.get(command, [])
    with pytest.raises(SystemExit) as caught:
        main([command, str(path), *extra])
    message = caught.value.code
    assert message.startswith("gmflow: error: ")
    assert message.isprintable()
    assert not capsys.readouterr().out


def test_gmflow_says_what_cannot_be_written_and_leaves_nothing(tmp_path):
    out = tmp_path / "out.png"
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(SystemExit, match=r"out\.png cannot be written: it is a folder; give"):
        main(["sample", str(POINTS_MODEL), "--count", "20", "--steps", "1", "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_inspect_prints_hostile_text_as_escapes_and_in_bounds(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    path.write_bytes(POINTS_MODEL.read_bytes())
    data = {"labels": ["\ud800\x1b[31m" * 10**4] * 4, "note": "\ud801\u202e\n" * 10**5}
    change(
        path, metadata={"data": json.dumps(data), "training": json.dumps({"a": ["\ud800"] * 10**5})}
    )
    main(["inspect", str(path)])
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert len(printed) < 300_000


def test_a_model_is_named_where_a_source_is_asked_for():
    with pytest.raises(FileError, match="holds a GMFlowMLP in format gmflow-1, not a Gaussian"):
        read_source_metadata(POINTS_MODEL)
