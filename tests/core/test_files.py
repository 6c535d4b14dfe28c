"""Files: atomic writes, reports of tensors that do not fit."""

import os
import re

import pytest
import torch

from gmflow_core.files.atomic import atomic_write
from gmflow_core.models.state_dict import check_shapes, shapes_of


def test_an_atomic_write_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("old", "new"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent.parent == path.parent  # a folder on the same disk
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["block", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    if failing != "block":
        monkeypatch.setattr(os, failing, fail)

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            if failing == "block":
                fail()

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with atomic_write(tmp_path / "file.txt") as temporary:
        temporary.write_text("new")
    assert calls == ["fsync", "replace"]


EXPECTED = {"a": (1, 2), "b": (3,)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": (1, 2)}, "1 tensors do not fit a net, first 'b': expected (3,), found none"),
        (
            {"a": (2, 1), "b": (4,)},
            "2 tensors do not fit a net, first 'a': expected (1, 2), found (2, 1)",
        ),
        ({**EXPECTED, "c": ()}, "1 tensors do not fit a net, first 'c': expected none, found ()"),
    ],
)
def test_tensors_that_do_not_fit_are_counted_and_the_first_is_quoted(found, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_shapes(EXPECTED, found, "a net")
    with pytest.raises(ValueError, match=f"^net.pt: {re.escape(message)}; get it again$"):
        check_shapes(EXPECTED, found, "a net", source="net.pt", advice="get it again")


def test_tensors_that_fit_pass():
    check_shapes(EXPECTED, shapes_of({"b": torch.empty(3), "a": torch.empty(1, 2)}), "a net")
