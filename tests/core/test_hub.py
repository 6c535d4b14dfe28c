"""Models by hub id: what is downloaded, what is not, and errors that say what to do."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from gmflow_core import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.files.hub import tidy_source
from tests.diffusers_folder import (
    WEIGHTS,
    change_json,
    random_model,
    same_model,
    write_published_folder,
)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("Lakonik/gmflow_imagenet_k8_ema", ("Lakonik/gmflow_imagenet_k8_ema", None)),
        ("me/FLUX.1-x@refs/pr/1", ("me/FLUX.1-x", "refs/pr/1")),
        (Path("owner/name@v2"), ("owner/name", "v2")),
    ],
)
def test_a_hub_id_is_downloaded_and_loaded(hub, model, source, call):
    assert read_metadata(source)["data"]["labels"][0] == "tench, Tinca tinca"
    assert hub.weights() == []
    assert same_model(load_checkpoint(source, dtype=None)[0], model)
    assert set(hub.calls) == {call}


def test_only_one_variant_of_the_weights_is_downloaded(hub, model):
    for part in ("transformer", "spectrum_net"):
        for name in (
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.fp16.safetensors",
        ):
            (hub.remote / part / name).write_bytes(b"not needed")
    load_checkpoint("owner/name")
    assert hub.weights() == [f"spectrum_net/{WEIGHTS}", f"transformer/{WEIGHTS}"]
    assert not (hub.cache / "README.md").exists()


@pytest.mark.parametrize("shards", [None, 2])
def test_weights_in_full_precision_are_downloaded_where_there_are_no_others(hub, shards):
    model = random_model(torch.float32)
    shutil.rmtree(hub.remote / "transformer")
    write_published_folder(hub.remote, model, variant=None, shards=shards)
    (hub.remote / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        b"not needed"
    )
    loaded, _ = load_checkpoint("owner/name", dtype=None)
    assert {p.dtype for p in loaded.spectrum_net.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.proj_out_2.weight, model.proj_out_2.weight)
    assert len(hub.weights()) == 1 + (shards or 1)


def test_nothing_large_is_downloaded_of_another_model(hub):
    change_json(hub.remote / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(
        ValueError, match=r"owner/name/transformer/config.json is of a 'FluxTransformer2DModel'"
    ):
        load_checkpoint("owner/name")
    assert hub.weights() == []


def test_what_is_on_disk_comes_before_the_hub(hub, folder, tmp_path, model):
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert same_model(load_checkpoint("owner/name", dtype=None)[0], model)
    assert hub.calls == []


@pytest.mark.parametrize(
    "source",
    ["nothing", "a/b/c", "./a/b", "../b", "/a/b", "runs/model.safetensors", "runs/model.pt"],
)
def test_what_is_neither_a_path_nor_an_id_does_not_go_to_the_hub(hub, source):
    with pytest.raises(
        FileNotFoundError, match=f"there is no checkpoint {Path(source)}: .*no hub id"
    ):
        load_checkpoint(source)
    assert hub.calls == []


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("owner/name", "owner/name"),
        (" 'owner/name/'\n", "owner/name"),
        ("\u200bowner\\name\ufeff", "owner/name"),
        ("owner/name@refs/pr/1", "owner/name@refs/pr/1"),
        ("https://huggingface.co/owner/name", "owner/name"),
        ("HTTPS://www.HuggingFace.co/owner/name/tree/main", "owner/name"),
        ("https://huggingface.co/owner/name/tree/v2", "owner/name@v2"),
        ("https://hf.co/owner/name/blob/main/a/b.safetensors?download=true#x", "owner/name"),
        ("https://hf.co/owner/name/resolve/refs%2Fpr%2F1/a.safetensors", "owner/name@refs/pr/1"),
        ("https://hf-mirror.com/owner/name.git", "owner/name"),
        ("https://mirror.example:8080/models/owner/name/", "owner/name"),
        ("https://endpoint.example/deep/path/owner/name/tree/main", "owner/name"),
        ("huggingface.co/owner/name", "owner/name"),
        ("mirror.example/owner/name/tree/main", "owner/name"),
        ("owner/name/tree/main", "owner/name"),
        ("git@hf.co:owner/name.git", "owner/name"),
        ("hf://owner/name@v1/transformer", "owner/name@v1"),
        (Path("https://hf.co/owner/name"), "owner/name"),
        ("~/models/", str(Path.home() / "models")),
        ("/a//b/", "/a//b"),
        ("/", "/"),
        ("./a/b", "./a/b"),
        ("", ""),
    ],
)
def test_a_source_is_understood_in_any_spelling(monkeypatch, text, meant):
    monkeypatch.setenv("HF_ENDPOINT", "https://endpoint.example/deep/path/")
    assert tidy_source(text) == meant


def test_a_path_is_found_in_any_spelling(tmp_path, model):
    path = tmp_path / "my model 100%.safetensors"
    save_checkpoint(model, path)
    for text in (path, f'"{path}"', path.as_uri(), f"{path.as_uri()}?x=1", f" {path}\n"):
        assert tidy_source(text) == str(path)
    assert tidy_source(str(path).replace(" ", "\\ ")) == str(path)
    assert tidy_source(str(path).replace("/", "\\")) == str(path)
    assert same_model(load_checkpoint(path.as_uri(), dtype=None)[0], model)
    odd = tmp_path / "'quoted' "
    odd.mkdir()
    assert tidy_source(str(odd)) == str(odd)  # what is there stays as it is


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a\0b", "NUL is one of them"),
        ("x" * 5000, "it has 5,000 characters"),
        ("https://huggingface.co/datasets/a/b", "not the address of a model"),
        ("https://huggingface.co", "not the address of a model"),
        ("https://example.org/\ud800", "not the address of a model"),
    ],
)
def test_what_can_be_no_source_is_refused(hub, text, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        load_checkpoint(text)
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Name or\nservice not known"), RuntimeError("401"), ValueError("bad id")],
)
def test_a_hub_that_does_not_answer_is_named_with_what_to_do(hub, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    with pytest.raises(
        OSError,
        match=rf"owner/name is no file or folder .*\({reason}\).* by other means and give its path",
    ):
        load_checkpoint("owner/name")


def test_without_the_hubs_package_it_says_how_to_get_it(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"owner/name is no file .*pip install huggingface_hub.* other means"
    ):
        read_metadata("owner/name")
