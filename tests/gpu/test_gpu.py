"""The GPU's checks at tiny sizes on a CPU: they run, and what is wrong ends them in words."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from gmflow_core.fast import tiled
from tests.gpu import layers, run, waits
from tests.gpu.__main__ import main

CPU = ["--device", "cpu"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def same_environment():
    """Put back what the command sets for its process."""
    with mock.patch.dict(os.environ):
        yield


def test_parts_run_at_tiny_sizes_and_write_their_figures(tmp_path, monkeypatch):
    """The quick ones, in a process of their own, and one more beside them."""
    out, names = tmp_path / "new" / "gpu.json", ["solvers", "processes", "waits"]
    given = [*CPU, "--only", *names, "--out", str(out)]
    command = [sys.executable, "-m", "tests.gpu", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3/3 waits: waits for the device" in done.stdout
    found = json.loads(out.read_text())
    assert found["command"] == f"python -m tests.gpu --device cpu --only {' '.join(names)}"
    states = {name: part["state"] for name, part in found["parts"].items()}
    assert states == dict.fromkeys(names, "right")
    assert found["machine"]["torch"] == torch.__version__
    assert any("published weights" in each for each in found["not covered"])
    sharded = found["parts"]["processes"]["cases"]["FSDP 2, gloo, 2 pieces, fp32"]
    assert sharded["difference"] < 1e-4
    assert found["parts"]["waits"]["cases"]["a step of gm-sde"]["waits"] == 1  # eigh
    monkeypatch.setattr(layers, "COMFYUI", tmp_path)
    main([*CPU, "--only", "int8", "--out", str(out)])  # the others stay, with their date
    parts = json.loads(out.read_text())["parts"]
    assert parts["int8"]["state"] == "right"
    assert parts["int8"]["cases"]["the nodes' layers in ComfyUI"].startswith("not run: there is no")
    assert parts["waits"]["from"]["date"] == found["machine"]["date"]


def test_the_first_wrong_part_ends_the_command_with_its_name(tmp_path, monkeypatch, capsys):
    rollout = tiled.rollout_in_tiles
    monkeypatch.setattr(tiled, "rollout_in_tiles", lambda *given: 1.001 * rollout(*given))
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as end:
        main([*CPU, "--only", "forms", "int8", "--out", str(out)])
    expected = "the part forms is wrong: rollout, tiled: K = 3, C = 4, 5 x 8, batch 1, 6 substeps: "
    expected += "expected a relative error of at most 5e-05, found 0.001"
    assert str(end.value.code).startswith(expected)  # Python prints a text, and ends with status 1
    assert "int8:" not in capsys.readouterr().out.split("not covered")[0]
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == ["forms"]
    assert parts["forms"]["state"].startswith("wrong: rollout, tiled")


def failing(error):
    def part(run):
        yield "a case", {"figure": 1.0}
        raise error

    return part


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (run.NotRunError("the package x is not installed"), None),
        (RuntimeError("CUDA error\nmore"), "expected to run, found RuntimeError: CUDA error$"),
    ],
)
def test_what_is_missing_is_said_and_what_fails_ends_the_command(error, said, monkeypatch, capsys):
    monkeypatch.setattr(layers, "int8", failing(error))
    monkeypatch.setattr(waits, "waits", failing(run.NotRunError("as an example")))
    given = [*CPU, "--only", "int8", "waits"]
    if said is None:
        main(given)
        out = capsys.readouterr().out
        assert "int8: not run: the package x is not installed" in out
        assert "waits: not run: as an example" in out
        return
    with pytest.raises(SystemExit, match=f"the part int8 is wrong: {said}"):
        main(given)


def test_a_part_that_takes_too_long_is_wrong(monkeypatch):
    def slow(run):
        try:
            time.sleep(60)
        except Exception:  # as machine forms do, which take any error for their own
            pytest.fail("the limit was taken for an error")
        yield "never", {}

    monkeypatch.setattr(waits, "waits", slow)
    with pytest.raises(SystemExit, match="waits is wrong: time of waits: expected at most 1 s"):
        main([*CPU, "--only", "waits", "--time-limit", "0.1"])


def test_a_gpus_waits_are_told_by_their_lines(monkeypatch):
    """CUDA's record is a warning of the line that waits; the one of eigh is known."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for number in range(2):
            warnings.warn(f"{waits.SAID} {number}", UserWarning, stacklevel=1)
        warnings.warn("of something else", UserWarning, stacklevel=1)

    found = waits.places(step, "cuda")
    (place,) = found
    assert place.startswith("tests/gpu/test_gpu.py:")
    assert (found[place], modes) == (2, ["warn", "default"])
    with pytest.raises(run.WrongError, match=r"waits of a step: expected none.*test_gpu\.py"):
        waits.figures(found, "a step", 1)
    known = Counter({"gmflow_core/gaussians/transport.py:54": 2})
    assert waits.figures(known, "a step", 2)["waits"] == 1


@pytest.mark.parametrize("seconds", ["nan", "-5", "0", "inf"])
def test_a_limit_that_is_no_time_is_refused(seconds):
    with pytest.raises(SystemExit, match=r"error: --time-limit is .*; it must be a number of s"):
        main([*CPU, "--only", "waits", f"--time-limit={seconds}"])


@pytest.mark.parametrize(
    "place", ["/proc/x.json", "file/x.json", "folder", "bad.json", "list.json"]
)
def test_a_file_that_cannot_be_written_is_refused_before_any_part(place, tmp_path, monkeypatch):
    monkeypatch.setattr(waits, "waits", lambda run: pytest.fail("the part ran"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.json").write_text('{"machine"')
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        main([*CPU, "--only", "waits", "--out", str(tmp_path / place)])
    old = place in ("bad.json", "list.json")
    said = "holds no results of this command" if old else "cannot be written"
    assert str(end.value).startswith("error: ")
    assert said in str(end.value)
    assert "\n" not in str(end.value)


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device; --device cpu"):
        main([])


@pytest.mark.parametrize(
    ("losses", "said"),
    [([1.0, 2.0, 3.0], "fall below 1,"), ([1.0, float("nan")], "finite losses")],
)
def test_losses_that_do_not_fall_are_wrong(losses, said):
    with pytest.raises(run.WrongError, match=said):
        run.check_falls(losses, "losses")
    with pytest.raises(run.WrongError, match="found nan"):
        run.check_near(torch.tensor([float("nan")]), torch.ones(1), 1.0, "a value")
