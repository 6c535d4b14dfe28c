"""Single files on the hub: how they are named, and downloaded by the hub's own client."""

import json
import os
from pathlib import Path

import pytest

from gmflow_core.files.hub_file import HubFile, parse_hub_file
from tests import forked
from tests.hub_server import hub_server

NAME, FOLDER = "Lakonik/pi-FLUX.1", "gmflux_k8_piid_4step"
FILE = f"{FOLDER}/diffusion_pytorch_model.safetensors"
SCRIPT = """
import json, sys
from gmflow_core.files.hub_file import parse_hub_file
file, seen = parse_hub_file(sys.argv[1]), []
before = file.cached()
path = file.download(lambda done, total: seen.append((done, total)))
print(json.dumps([str(before), str(path), seen]))
"""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (f"{NAME}:{FOLDER}", HubFile(NAME, FOLDER)),
        (f" {NAME}:{FILE}\n", HubFile(NAME, FILE)),
        (f"{NAME}@v2:{FOLDER}", HubFile(NAME, FOLDER, "v2")),
        (f"{NAME}/{FOLDER}", HubFile(NAME, FOLDER)),
        ("owner/name", HubFile("owner/name")),
        (f"https://huggingface.co/{NAME}/tree/main/{FOLDER}", HubFile(NAME, FOLDER)),
        (f"https://hf.co/{NAME}/blob/main/{FILE}?download=true", HubFile(NAME, FILE)),
        (f"https://hf.co/{NAME}/resolve/refs%2Fpr%2F1/{FILE}", HubFile(NAME, FILE, "refs/pr/1")),
        ("owner/name:../../etc", None),
        ("owner/name:a//b", HubFile("owner/name", "a/b")),
        ("/no/such/path", None),
        ("nothing", None),
    ],
)
def test_a_file_is_understood_in_any_spelling(text, meant):
    assert parse_hub_file(text) == meant


def test_the_name_tells_the_folder_where_the_file_has_the_usual_name():
    assert HubFile(NAME, FILE).name == HubFile(NAME, FOLDER).name == FOLDER
    assert HubFile(NAME, "a/b_4step.safetensors").name == "b_4step.safetensors"


def run(hub, home, text):
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    return forked.run("-c", SCRIPT, text, imports=forked.LIBRARY, environment=environment)


def test_files_in_deeper_folders_are_not_downloaded(tmp_path):
    for file in (FILE, "one.safetensors"):
        place = tmp_path / "hub" / NAME / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.urandom(100))
    with hub_server(tmp_path / "hub") as hub:
        done = run(hub, tmp_path / "home", NAME)
        assert done.returncode == 0, done.stderr
        assert hub.fetched == ["one.safetensors"]


def test_of_several_files_none_is_downloaded(tmp_path):
    """Unless one of them has the usual name: then only that one is."""
    place = tmp_path / "hub" / NAME / FOLDER
    place.mkdir(parents=True)
    for number in range(10):
        (place / f"part{number}.safetensors").write_bytes(os.urandom(100))
    with hub_server(tmp_path / "hub") as hub:
        done = run(hub, tmp_path / "home", f"{NAME}:{FOLDER}")
        assert "part0.safetensors, part1.safetensors, " in done.stderr
        assert "part7.safetensors and 2 more found; give the file's address" in done.stderr
        assert hub.fetched == []
        (tmp_path / "hub" / NAME / FILE).write_bytes(os.urandom(100))
        done = run(hub, tmp_path / "home", f"{NAME}:{FOLDER}")
        assert done.returncode == 0, done.stderr
        assert hub.fetched == [FILE]


def test_a_file_is_downloaded_once_with_its_progress(tmp_path):
    place = tmp_path / "hub" / NAME / FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(os.urandom(1000))
    (place.parent / "config.json").write_text("not needed")
    with hub_server(tmp_path / "hub") as hub:
        for before in (True, False):
            done = run(hub, tmp_path / "home", f"{NAME}:{FOLDER}")
            assert done.returncode == 0, done.stderr
            cached, path, seen = json.loads(done.stdout.splitlines()[-1])
            assert Path(path).read_bytes() == place.read_bytes()
            assert (cached == "None") == before
            assert (seen[-1:] == [[1000, 1000]]) == before
        assert hub.fetched == [FILE]
        missing = run(hub, tmp_path / "home", f"{NAME}:nothing")
    assert "is not the place of one safetensors file on the hub: none found" in missing.stderr
