"""What commands say when files, memory, disks and other processes let them down."""

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmflow_core.files.errors import FileError
from gmflow_core.files.locks import LockedError, locked, locked_file
from tests.training.test_checkerboard import SMALL, train
from training import digits, fit_source, rae
from training.checkerboard import main
from training.common.processes import again, command, kept_work, message_of, stop_signals
from training.loop.curves import Curves

ROOT = Path(__file__).parents[2]


class Failing(torch.utils.data.Dataset):
    """Data whose items cannot be read."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {
            "file": FileError("a.png", "is damaged", "get it again"),
            "value": ValueError("no such thing"),
            "bug": KeyError("x"),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("file", "error: a.png is damaged; get it again"),
        ("value", "error: no such thing"),
        ("killed", r"error: DataLoader worker .*--workers a smaller number"),
    ],
)
def test_errors_of_loaders_end_in_their_own_line(kind, said):
    with pytest.raises(SystemExit, match=rf"^{said}") as caught, command():
        next(iter(torch.utils.data.DataLoader(Failing(kind), num_workers=1)))
    assert "\n" not in str(caught.value)


def test_mistakes_in_the_code_keep_their_traceback():
    with pytest.raises(KeyError), command():
        next(iter(torch.utils.data.DataLoader(Failing("bug"), num_workers=1)))
    for error in (TypeError("a"), RuntimeError("shape mismatch"), AttributeError("a")):
        assert message_of(error) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; .*--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), "CUDA .* 2 GiB; .*memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "can't .*memory"),
        (RuntimeError("[pair.cc:534] Connection closed by peer"), "another process .* ended"),
        (torch.distributed.DistBackendError("NCCL"), "another process .* ended"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), r"the disk is full \(a\): make"),
        (ValueError("bad \ud800 \x1b[31m"), r"bad \\ud800 \\x1b\[31m"),
        (ValueError("x" * 10**6), "x{1900,1999}[.]{3}$"),
        (PermissionError(13, "Permission denied", "a"), "Permission denied: 'a'"),
    ],
)
def test_what_comes_from_outside_is_one_printable_line(error, said):
    with pytest.raises(SystemExit, match=f"^error: .*{said}") as caught, command():
        raise error
    assert all(c.isprintable() for c in str(caught.value))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_like_ctrl_c(number, capsys, monkeypatch):
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit, match="130"), command():
        signal.raise_signal(number)
    assert f"stopped by {number.name}; run the same command again" in capsys.readouterr().err
    assert signal.getsignal(number) is signal.SIG_DFL
    monkeypatch.setattr("sys.argv", ["train.py", "--restart"])
    with pytest.raises(SystemExit), command():
        raise KeyboardInterrupt
    assert "; run the same command without --restart to go on" in capsys.readouterr().err
    kept_work.clear()  # as long as there is only an earlier run's work
    assert again() == "run the same command again"
    kept_work.set()
    with stop_signals() as stopped:
        signal.raise_signal(number)
    assert stopped.is_set()


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command(), stop_signals() as stopped:
            signal.raise_signal(signal.SIGHUP)
        assert not stopped.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


PRINTING = """
import sys
from training.common.processes import command
with command():
    sys.stdin.read()
    print("\\ud800 ü" * 10**5)
"""


@pytest.mark.parametrize("closed", [True, False])
def test_output_that_nobody_reads_or_no_terminal_can_show(closed):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    given = [sys.executable, "-c", PRINTING]
    with subprocess.Popen(given, cwd=ROOT, env=environment, **pipes) as process:
        if closed:
            process.stdout.close()
            process.stdin.close()
            errors = process.stderr.read().decode()
        else:
            errors = process.communicate()[1].decode()
        process.wait()
    assert "Traceback" not in errors
    assert process.returncode == (1 if closed else 0)
    assert ("the program that read this command's output ended" in errors) == closed


WITHOUT_STREAMS = """
import os, sys
from gmflow_core.terminal import at_terminal
with at_terminal():
    with open("result", "w") as file:
        print("out", flush=True)
        print("progress", file=sys.stderr)
        sys.stderr.write("as tqdm does")
        os.write(1, b"as a library in C does")
        os.write(2, b"as a library in C does")
        file.write("whole")
"""


def test_closed_streams_cost_no_result(tmp_path):
    """Without them, the result's file would be opened under the number of one."""
    closing = 'exec "$0" -c "$1" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = ["sh", "-c", closing, sys.executable, WITHOUT_STREAMS]
    done = subprocess.run(given, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "whole"


def test_a_second_start_names_the_first(tmp_path):
    given = [*SMALL, "--iterations", "10", "--out", str(tmp_path / "run")]
    with (
        locked(tmp_path / "run", "the first"),
        pytest.raises(SystemExit, match=r"run is in use by process \d+ .*the first"),
    ):
        main(given)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".gmflow.lock"]
    files = {
        "source.safetensors": (fit_source.main, ["convert", "a.pkl"]),
        "ditdh.safetensors": (rae.main, ["convert", "--source", "a.pt"]),
        "digits": (digits.main, []),
    }
    for name, (run, arguments) in files.items():
        out = tmp_path / name
        with (
            locked_file(out, "the first"),
            pytest.raises(SystemExit, match=rf"{name} is in use by process \d+ .*the first"),
        ):
            run([*arguments, "--out", str(out)])
        assert not out.exists()


def test_files_of_one_folder_have_locks_of_their_own(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    again = pytest.raises(LockedError, match="another name")
    with locked_file(a), locked_file(b), locked(tmp_path), again, locked_file(a):
        pass
    with locked_file(tmp_path / ("x" * 255)):  # the longest name there is
        pass
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, 10)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gmflow_core.files.atomic.os.replace", full)
    given = [*SMALL, "--iterations", "20", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"the disk is full, .*needs .* MB.*is unchanged"):
        main(given)
    monkeypatch.undo()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".gmflow-*"))
    assert train(tmp_path, 20).step == 20


def test_curves_that_cannot_be_written_end_with_a_note(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    curves = Curves(tmp_path / "file", 1)  # no folder can be there
    curves.numbers({"loss": 1.0}, 1)
    curves.close()
    curves = Curves(tmp_path, 1)
    curves._records._writer.close()  # what a lost disk does to it

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    curves._records._writer = Full()
    for step in range(3):
        curves.numbers({"loss": 1.0}, step)
    curves.close()
    assert capsys.readouterr().err.count("end here") == 2


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("checkerboard", f"--batch-size {2**63}", "--batch-size is 9223372036854775808"),
        ("checkerboard", f"--eval-samples {2**70}", "--eval-samples is 11805"),
        ("checkerboard", "--lr inf", "--lr is inf"),
        ("imagenet", "--weight-decay nan", "--weight-decay is nan"),
        ("imagenet", "--workers 100000", "--workers is 100000"),
        ("evaluate", "--checkpoint a --steps 2000000", "--steps is 2000000"),
        ("fit_source", f"--data a --modes 2 --encoder-size {2**40}", "--encoder-size is"),
        ("fit_source", "--data a --modes 2 --tolerance nan", "--tolerance is nan"),
        ("evaluate", f"--checkpoint a --seed {2**62}", "--seed is 4611"),
        ("digits", f"--copies {2**40}", "--copies is"),
        ("prepare", "--data a --size 1000000", "--size is 1000000"),
        ("source_toys", f"--samples {2**40}", "--samples is"),
    ],
)
def test_numbers_beyond_any_use_are_refused_by_name(module, line, message, tmp_path, capfd):
    run = importlib.import_module(f"training.{module}").main
    with pytest.raises(SystemExit) as end:
        run([*line.split(), "--out", str(tmp_path / "out")])
    said = "".join(capfd.readouterr()) + str(end.value.code)
    assert end.value.code == 2  # as of any wrong argument
    assert message in said
    assert len(said) < 1500
    assert not (tmp_path / "out").exists()


def test_statistics_check_their_numbers_before_the_network_is_loaded(tmp_path):
    for option in ("--batch-size", "--workers"):
        given = ["statistics", "--data", "a", "--out", str(tmp_path / "out"), option, "-1"]
        with pytest.raises(SystemExit, match=f"{option} is -1"):
            rae.main([*given, "--device", "cpu"])
