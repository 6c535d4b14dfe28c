"""What commands write takes the place of no model and no other file that would be missed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core.cli import main
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.files.targets import is_same
from tests.core.test_adapter_metadata import published

POINTS, DIGITS = SHIPPED / "checkerboard_k64.safetensors", SHIPPED / "digits_k8.safetensors"


def sample(model, out, *options):
    """Run `gmflow sample` in one step, one sample of each."""
    command = ["sample", str(model), "--steps", "1", "--count", "1", "--device", "cpu"]
    main([*command, "--out", str(out), *map(str, options)])


@pytest.fixture
def model(tmp_path):
    """A model of the user's own, and a link to it."""
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "m.safetensors")
    return shutil.copy(DIGITS, tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "x/../m.safetensors", "link.safetensors"])
def test_the_model_is_not_overwritten(model, tmp_path, name):
    (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit, match="is the checkpoint itself, which would be overwritten"):
        sample(model, tmp_path / name)
    with pytest.raises(SystemExit, match="is the checkpoint itself"):
        sample(tmp_path / "link.safetensors", tmp_path / name)
    for option in ("--source", "--vae"):
        with pytest.raises(SystemExit, match=f"is {option} itself"):
            sample(DIGITS, tmp_path / name, option, model)
    with pytest.raises(SystemExit, match="is --vae itself"):
        sample(DIGITS, tmp_path / "x", "--vae", tmp_path / "x")
    assert model.read_bytes() == DIGITS.read_bytes()


def test_only_samples_are_replaced_by_samples(model, tmp_path):
    lora, text = tmp_path / "lora.safetensors", tmp_path / "text.safetensors"
    save_file({"samples": torch.zeros(1)}, lora)
    text.write_text("precious")
    for each in (model, lora, text):
        before = each.read_bytes()
        with pytest.raises(SystemExit, match="holds no samples, so it is not overwritten; give"):
            sample(POINTS, each)
        assert each.read_bytes() == before
    own = tmp_path / "own.safetensors"
    for source, name in ((POINTS, "points"), (DIGITS, "samples"), (POINTS, "points")):
        sample(source, own)
        assert name in load_file(own)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sample", "m", "--out", ""], "'' is no path; give a name"),
        (["sample", "m", "--out", " "], "' ' is no path"),
        (["sample", "m", "--out", ".png"], "'.png' has no name before its ending"),
        (["sample", "m", "--out", "a/.safetensors"], "give one such as result.safetensors"),
        (["demo", "--out", ".png"], "'.png' has no name"),
        (["convert", "m", ""], "'' is no path"),
        (["adapter", "m", "--out", ".safetensors"], "'.safetensors' has no name"),
        (["fetch", "gmflow", "--to", ""], "'' is no path"),
        (["fetch", "gmflow", "--comfyui", ""], "'' is no path"),
    ],
)
def test_names_that_are_none_are_refused(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(command)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_pictures_is_no_file_and_force_has_a_place(tmp_path):
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(SystemExit, match="notes is a file; give a folder"):
        sample(DIGITS, tmp_path / "notes")
    with pytest.raises(SystemExit, match="--force goes with --to or --comfyui"):
        main(["fetch", "gmflow", "--force"])


def test_an_adapter_is_written_over_itself_only(tmp_path):
    path, other = published(tmp_path / "a.safetensors"), published(tmp_path / "b.safetensors")
    before = other.read_bytes()
    with pytest.raises(SystemExit, match=r"b\.safetensors is there already; give another --out"):
        main(["adapter", str(path), "--steps", "8", "--out", str(other)])
    assert other.read_bytes() == before
    main(["adapter", str(path), "--steps", "8", "--out", str(path)])


def test_any_paths_are_compared():
    assert not is_same("a\0b", "b")
    assert not is_same("x" * 5000, "y" * 5000)
    assert is_same("not there/yet", "./not there/../not there/yet")
