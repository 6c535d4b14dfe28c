"""Names of classes: a list of them is bounded, and any text is answered."""

import unicodedata

import pytest
import torch

from gmflow_core import save_checkpoint
from gmflow_core.files import labels
from gmflow_core.files.labels import distinct, find_label, known_names
from tests.diffusers_folder import random_model

NAMES = ("tabby, tabby cat", "tiger cat", "tench")


def write(path, names):
    save_checkpoint(random_model(torch.float32), path, data={"labels": names})
    return str(path)


def test_the_list_of_names_is_bounded(tmp_path, monkeypatch):
    paths = [
        write(tmp_path / f"{i}.safetensors", [f"{i} {j}" for j in range(150)]) for i in range(3)
    ]
    assert known_names(paths[:2]) == ([f"{i} {j}" for i in range(2) for j in range(150)], True)
    monkeypatch.setattr(labels, "MOST_NAMES", 200)
    names, is_whole = known_names(paths)
    assert (len(names), is_whole) == (200, False)
    monkeypatch.undo()
    for name, most in (("MOST_READ", 1), ("MOST_SECONDS", -1)):
        monkeypatch.setattr(labels, name, most)
        names, is_whole = known_names(paths)
        assert (len(names), is_whole) == (150 * max(0, most), False)
        monkeypatch.undo()


def test_names_in_a_header_that_takes_long_to_parse_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "LARGEST_HEADER", 10_000)
    large = write(tmp_path / "large.safetensors", ["x" * 400] * 50)
    assert known_names([large, write(tmp_path / "a.safetensors", NAMES)]) == (list(NAMES), True)


@pytest.mark.parametrize("bad", [5, "abc", [1, 2], {"a": 1}, [[[]]]])
def test_a_bad_file_hides_no_other(tmp_path, bad):
    paths = [write(tmp_path / "bad.safetensors", bad), write(tmp_path / "good.safetensors", NAMES)]
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 9)
    paths += map(str, (tmp_path / "folder", tmp_path / "damaged.safetensors", "gone", "a\0b"))
    assert known_names(paths) == (list(NAMES), True)


@pytest.mark.parametrize("text", ["9" * 10_000, "\ud800", "x" * 100_000, "\x1b[31m", ""])
def test_any_text_is_answered(text):
    with pytest.raises(ValueError, match=r"class|classes") as error:
        find_label(text, NAMES, len(NAMES))
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    assert find_label("0002", NAMES, len(NAMES)) == 2


def test_long_names_are_cut_in_messages():
    with pytest.raises(ValueError, match="its classes") as error:
        find_label("zzz", ["x" * 500 + str(n) for n in range(20)], 20)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("count", "ends"), [(9, "8 kind 8. "), (20, "19 kind 19. "), (21, "")])
def test_a_few_classes_are_all_named(count, ends):
    """No name is left out for words that are as long as it."""
    ends = ends or f"7 kind 7; and {count - 8} more. "
    with pytest.raises(ValueError, match=rf"its classes: 0 kind 0; .*{ends}A number"):
        find_label("zzz", [f"kind {number}" for number in range(count)], count)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("text", ["café", "CAFÉ, bar", "Å", "ΐ", "straße", "größe"])
def test_accents_may_be_characters_of_their_own(form, text):
    """macOS writes names in decomposed Unicode."""
    for other in ("NFC", "NFD"):
        names = [unicodedata.normalize(other, name) for name in ("café, bar", "å", "ΐ", "Straße")]
        names.append(unicodedata.normalize(other, "GRÖSSE"))
        found = find_label(unicodedata.normalize(form, text), names, len(names))
        assert found == {"c": 0, "C": 0, "Å": 1, "ΐ": 2, "s": 3, "g": 4}[text[0]]


def test_names_that_differ_in_their_unicode_form_alone_are_told_apart_by_number():
    names = ["café", "cafe\u0301", "tench"]
    assert distinct(names) == ["café (0)", "cafe\u0301 (1)", "tench"]
    assert find_label("café (1)", names, 3) == 1
