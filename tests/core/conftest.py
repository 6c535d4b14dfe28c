"""Fixtures: a published model in the layout of diffusers, in a folder and on a stand-in hub."""

import inspect
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest

from tests.diffusers_folder import WEIGHTS, random_model, write_published_folder

LABELS = {"0": "tench, Tinca tinca", "2": "größer", "9": "toilet tissue"}


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def folder(tmp_path, model):
    return write_published_folder(tmp_path / "published", model, labels=LABELS)


class Hub:
    """Stand-in for huggingface_hub.snapshot_download: copies the files of a folder that match."""

    def __init__(self, remote, cache):
        self.remote, self.cache, self.calls = remote, cache, []

    def __call__(self, repo_id, *, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision))
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def weights(self):
        """List the files of weights that were downloaded."""
        return sorted(
            path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*.safetensors")
        )


@pytest.fixture
def hub(tmp_path, folder, monkeypatch):
    (folder / "vae" / WEIGHTS).write_bytes(b"not needed")
    (folder / "README.md").write_text("not needed")
    arguments = inspect.signature(huggingface_hub.snapshot_download).parameters
    assert {"repo_id", "revision", "allow_patterns"} <= arguments.keys()
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    return hub
