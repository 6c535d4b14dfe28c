"""Whatever stands in a file, readers answer with one class of error that can be printed."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gmflow_core.files import atomic, locks, safetensors_files
from gmflow_core.files.atomic import WriteError, atomic_folder, atomic_write, remove_leftovers
from gmflow_core.files.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.files.errors import (
    FileError,
    check_regular_file,
    make_printable,
    printable,
    quoted,
    reading,
)
from gmflow_core.files.json_files import DEEPEST, parse_json, read_json, write_json
from gmflow_core.files.locks import LockedError, locked, locked_file
from gmflow_core.files.safetensors_files import (
    is_finite,
    open_safetensors,
    read_safetensors,
    write_safetensors,
)
from gmflow_core.models import GMDiT, GMFlowMLP
from gmflow_core.models.gmdit import GMDiTConfig
from gmflow_core.models.mlp import GMFlowMLPConfig
from tests import forked


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(GMFlowMLP(GMFlowMLPConfig(num_components=2, hidden_dim=8, embed_dim=4)), path)
    return path


def with_metadata(path, **changes):
    """Change the metadata of a safetensors file; None removes an entry."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    for name, value in changes.items():
        if value is None:
            del header["__metadata__"][name]
        else:
            header["__metadata__"][name] = value
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# Text from outside


@pytest.mark.parametrize("text", ["\ud800", "a\x1b[31mred", "\x00", "‮gnp.exe", "a\rb"])
def test_messages_can_be_printed_and_logged(text):
    for safe in (printable(text), quoted(text), str(FileError(text, f"holds {text}"))):
        assert all(c.isprintable() for c in safe)
        safe.encode()


def test_errors_that_led_to_an_error_are_printable_too():
    error = ValueError("bad \ud801")
    error.__cause__ = OSError("worse \ud800")
    error.__cause__.__context__ = error  # a circle
    make_printable(error)
    assert str(error) == "bad \\ud801"
    assert str(error.__cause__) == "worse \\ud800"


def test_quotes_are_short_even_of_what_cannot_be_printed():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert quoted(nested) == "<list>"
    assert len(quoted("x" * 10**6)) <= 200
    assert quoted(10**5000) == "<int>"
    while nested:  # or freeing it would recurse
        nested = nested[0]


# Reading


def test_every_kind_of_error_names_the_file():
    for error in (RecursionError(), MemoryError(), KeyError("k"), OSError(13, "no"), EOFError()):
        with (
            pytest.raises(FileError, match=r"^a\.npz is damaged \(.+\); get it again$"),
            reading("a.npz", "get it again"),
        ):
            raise error


def test_what_is_no_regular_file_is_named_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe is a pipe"):
        check_regular_file(tmp_path / "pipe")
    with pytest.raises(FileError, match="is a folder"):
        check_regular_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_regular_file(tmp_path / "nothing")
    for name in ("a\0b", "\ud800"):
        with pytest.raises((FileError, FileNotFoundError)) as caught:
            check_regular_file(name)
        str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 10**5, "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "1" * 5000, '{"a": ' * 10**5],
)
def test_json_that_is_damaged_or_nested_deeply_is_refused(text):
    with pytest.raises(FileError, match=r"^f "):
        parse_json(text, "f")


def test_json_files_are_bounded_and_keep_all_names(tmp_path):
    write_json(tmp_path / "a.json", {"é": "\udcff"})
    assert read_json(tmp_path / "a.json") == {"é": "\udcff"}
    with pytest.raises(FileError, match="more than 5 bytes"):
        read_json(tmp_path / "a.json", largest=5)
    deep = json.loads("[" * DEEPEST + "]" * DEEPEST)
    write_json(tmp_path / "b.json", deep)
    assert read_json(tmp_path / "b.json") == deep


# Checkpoints


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**12},
        {"num_layers": 1000},
        {"num_layers": True},
        {"hidden_dim": 10**9},
        {"hidden_dim": 2**31 - 1},
        {"embed_dim": 10**400},
        {"min_period": float("nan")},
        {"max_period": float("inf")},
        {"constant_log_std": "0"},
        {"num_classes": 10**7},
    ],
)
def test_sizes_are_compared_with_the_file_before_anything_is_built(saved, changes, monkeypatch):
    config = json.dumps({**read_metadata(saved)["config"], **changes})
    with_metadata(saved, config=config)
    built = []
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: built.append(self))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_checkpoint(saved)
    assert len(built) < 100


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**12},
        {"log_std_layers": 10**9},
        {"spectrum_layers": (8,) * 2000},
        {"spectrum_layers": (0,)},
        {"latent_size": 2**20},
        {"constant_log_std": float("nan")},
    ],
)
def test_networks_refuse_settings_that_no_network_has(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GMDiT(GMDiTConfig(**changes))


FEW_STEPS = {
    "steps": 1,
    "shift": 1.0,
    "final_step_size": 1.0,
    "temperature": 1.0,
    "policy": "GMFlow",
}


@pytest.mark.parametrize(
    "data",
    [
        {"labels": 5},
        {"labels": {"0": "a"}},
        {"labels": [1]},
        {"scaling_factor": 0},
        {"scaling_factor": float("nan")},
        {"scaling_factor": -1.0},
        {"space": 3},
        {"source": 7},
        {"source": {"conditioning": "mode", "num_modes": "8", "shape": [1]}},
        {"source": {"conditioning": "mode", "num_modes": 8, "shape": 1}},
        {"source": {"conditioning": [], "num_modes": 8, "shape": [1]}},
        {"few_steps": 4},
        {"few_steps": {**FEW_STEPS, "steps": 0}},
        {"few_steps": {**FEW_STEPS, "shift": "3"}},
        {"few_steps": {**FEW_STEPS, "final_step_size": 1.5}},
        {"few_steps": {**FEW_STEPS, "temperature": None}},
        {"few_steps": {**FEW_STEPS, "policy": "none"}},
        {"few_steps": {**FEW_STEPS, "guidance": "a\x1b[0m"}},
    ],
)
def test_records_of_the_samples_are_checked(saved, data):
    with_metadata(saved, data=json.dumps(data))
    with pytest.raises(FileError, match=r"model.safetensors has the .* instead of"):
        load_checkpoint(saved)


def test_names_of_classes_can_be_printed(saved):
    with_metadata(saved, data=json.dumps({"labels": ["\ud800", "cat\x1b[0m"]}))
    assert read_metadata(saved)["data"]["labels"] == ["\\ud800", "cat\\x1b[0m"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    model = GMFlowMLP(GMFlowMLPConfig(num_components=2, hidden_dim=8, embed_dim=4))
    model.net[0].bias.data[3] = value
    save_checkpoint(model, tmp_path / "m.safetensors")
    with pytest.raises(FileError, match=r"1 numbers in 'net.0.bias' that are not finite"):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]
)
def test_finite_numbers_are_told_from_others_in_every_type(dtype):
    largest = torch.full((100,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert is_finite(largest)
    bad = torch.ones(100)
    bad[7] = float("nan")
    assert not is_finite(bad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8])
def test_weights_that_are_whole_numbers_are_refused_by_name(saved, dtype):
    tensors, metadata = read_safetensors(saved)
    tensors["net.0.bias"] = tensors["net.0.bias"].to(dtype)
    write_safetensors(tensors, saved, metadata)
    with pytest.raises(FileError, match=rf"'net.0.bias' in {dtype}"):
        load_checkpoint(saved)


def test_whole_numbers_and_nothing_are_finite():
    assert is_finite(torch.arange(5))
    assert is_finite(torch.empty(0))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    """A mapped file would end the process with SIGBUS."""
    path = tmp_path / "m.safetensors"
    write_safetensors({"a": torch.zeros(2**22), "b": torch.ones(4)}, path, {})
    code = f"""
import os
from gmflow_core.files.errors import FileError, reading
from gmflow_core.files.safetensors_files import open_safetensors
file = open_safetensors({str(path)!r})
os.truncate({str(path)!r}, 5000)
try:
    with reading({str(path)!r}):
        file.get_tensor("a")
except FileError as error:
    print("named", error)
"""
    done = forked.run("-c", code, imports=forked.LIBRARY)
    assert "named" in done.stdout, (done.returncode, done.stderr)


# Writing


def test_permissions_follow_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o377, 0o400)):
        before = os.umask(mask)
        try:
            write_safetensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {})
            write_json(tmp_path / "a.json", 1)
            with pytest.raises(KeyError), atomic_folder(tmp_path / "folder"):
                raise KeyError
        finally:
            os.umask(before)
        assert len(os.listdir(tmp_path)) == 2
        for name in ("a.safetensors", "a.json"):
            assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_errors_of_writing_say_the_path_the_need_and_what_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for failing, said in ((28, "the disk is full, and it needs"), (30, "not permitted")):
        with (
            pytest.raises(WriteError, match=rf"file cannot be written: .*{said}.*unchanged$"),
            atomic_write(path, 5_000_000),
        ):
            raise OSError(failing, os.strerror(failing))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_library_without_room_is_told_as_the_system_is(tmp_path, monkeypatch):
    """SafetensorError is no OSError, and its message holds the number."""

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_files, "save_file", fail)
    with pytest.raises(WriteError, match=r"a\.safetensors cannot be written: the disk is full"):
        write_safetensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {})
    assert os.listdir(tmp_path) == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with (
        pytest.raises(WriteError, match="out cannot be written: the disk is full"),
        atomic_folder(tmp_path / "out"),
    ):
        raise OSError(28, os.strerror(28))
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "out") as part:
        (part / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=function: (done.append(n), f(*a))[1])
    write_json(tmp_path / "a.json", 1)
    assert done == ["fsync", "replace"]


def test_leftovers_of_ended_processes_are_removed_and_no_others(tmp_path):
    code = (
        "import os, sys; from gmflow_core.files.atomic import atomic_write\n"
        f"with atomic_write({str(tmp_path / 'file')!r}) as part:\n"
        "    part.write_text('half'); print('in', flush=True); sys.stdin.read(); os._exit(9)"
    )
    process = forked.Process("-c", code, imports=forked.LIBRARY)
    process.stdout.readline()
    foreign = tmp_path / ".gmflow-other_machine-1-abc.tmp"
    foreign.mkdir()
    assert remove_leftovers(tmp_path) == []  # the process still runs, the other is new
    process.communicate()
    os.utime(foreign, (1, 1))
    with atomic_write(tmp_path / "mine") as part:
        part.write_text("slow")
        for path in (part, part.parent):
            os.utime(path, (1, 1))  # a file that takes days is still written by this process
        with locked(tmp_path):  # the next start of the same job
            pass
        assert [path.name for path in tmp_path.glob(".gmflow-*.tmp")] == [part.parent.name]
    assert (tmp_path / "mine").exists()
    foreign.mkdir()
    os.utime(foreign, (1, 1))
    with locked(tmp_path):
        assert not foreign.exists()
    with pytest.raises(ValueError, match="the working folder, or an empty name"), locked(""):
        pass


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read all files
    with pytest.raises(FileError, match="may not be read; change its permissions"):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_pipe_or_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="is a pipe, socket or device; give the name of a file"):
        write_json(tmp_path / "pipe", 1)
    assert (tmp_path / "pipe").is_fifo()
    if Path("/proc/self").exists():  # without a lock, nobody holds it
        with pytest.raises(WriteError, match="cannot be written"), locked_file("/proc/self/a"):
            pass


def test_leftovers_of_another_container_stay_for_a_day(tmp_path, monkeypatch):
    """Containers may share the machine's name, and each has processes of the same numbers."""
    for namespace, number in ((5, 2**22 + 1), (6, 2**22 + 1), (6, os.getpid())):  # none runs
        monkeypatch.setattr(atomic, "_namespace", lambda n=namespace: n)
        (tmp_path / f".gmflow-{atomic._host()}-{number}-{namespace}.tmp").mkdir()
    assert [path.name[-5:] for path in remove_leftovers(tmp_path)] == ["6.tmp"]
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    assert len(remove_leftovers(tmp_path)) == 2


def test_a_disk_without_locks_is_warned_about(tmp_path, monkeypatch):
    def fail(self, **_):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(locks.FileLock, "acquire", fail)
    with pytest.warns(UserWarning, match=r"without file locks \(no flock here\)"), locked(tmp_path):
        pass


def test_a_second_process_is_told_who_works_on_a_folder(tmp_path):
    code = (
        "import sys; from gmflow_core.files.locks import locked\n"
        f"with locked({str(tmp_path)!r}, 'the first command'):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    process = forked.Process("-c", code, imports=forked.LIBRARY)
    process.stdout.readline()
    with (
        pytest.raises(LockedError, match=f"process {process.pid} on .*the first command"),
        locked(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path):  # the lock died with its process
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WriteError, match="file/out cannot be written"),
        locked(tmp_path / "file" / "out"),
    ):
        pass
    for name in ("a/" * 2100, "a" * 300, "bad\0name", "\ud800"):  # no folder can have these names
        with pytest.raises(WriteError, match="cannot be written"), locked(Path(name)):
            pass
        with pytest.raises(WriteError, match="cannot be written"):
            write_json(Path(name) / "a.json", 1)


def test_tensors_under_a_pipe_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="pipe"):
        open_safetensors(tmp_path / "a.safetensors")
