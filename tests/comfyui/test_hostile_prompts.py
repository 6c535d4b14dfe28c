"""Text, files and values of any kind: each is named, and the server answers the next prompt."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gmflow_core.demo_command import POINTS_MODEL

from .client import Comfy, PromptError
from .graphs import latent_of, node
from .installation import COMFYUI

SURROGATE = "\ud800"
NAN = float("nan")
DIGITS = "digits_k8.safetensors"


def graph(**sampler) -> dict:
    """Return a small prompt that draws digits."""
    prompt = {
        "model": node("GMFlowLoader", model_name=DIGITS),
        "labels": node("GMFlowClassLabels", model=["model", 0], label="3"),
        "sample": node(
            "GMFlowSampler",
            model=["model", 0],
            latent_image=["labels", 2],
            positive=["labels", 0],
            **{"seed": 0, "steps": 1, "solver": "gm-ode", "order": 1, "substeps": 1},
            **{"shift": 1.0, "denoise": 1.0},
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test"),
    }
    prompt["sample"]["inputs"].update(sampler)
    return prompt


def changed(name: str, **inputs) -> dict:
    """Return the prompt with other inputs of one of its nodes."""
    prompt = graph()
    prompt[name]["inputs"].update(inputs)
    return prompt


def goes_on(server: Comfy) -> bool:
    """Run a good prompt, which ComfyUI has not cached."""
    goes_on.seed = getattr(goes_on, "seed", 0) + 1
    return bool(latent_of(server, graph(seed=goes_on.seed)).isfinite().all())


TEXTS = {
    "surrogate": SURROGATE,
    "surrogate path": f"/a/{SURROGATE}.safetensors",
    "surrogate id": f"owner/{SURROGATE}",
    "NUL": "/a\0b",
    "long": "/" + "x" * 5000,
    "very long": "x" * 2_000_000,
    "controls": "/\x1b[31m\x07\u202e.safetensors",
    "pipe": "/dev/zero",
    "folder": "/",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_of_any_kind_is_named(comfy: Comfy, text: str) -> None:
    for prompt in (
        changed("model", hub_id_or_path=text),
        changed("model", model_name=text),
        changed("labels", label=text),
        changed("labels", more_labels=text),
    ):
        with pytest.raises(PromptError) as error:
            comfy.run(prompt)
        assert "Error" in str(error.value) or "alidation failed" in str(error.value)
        assert len(str(error.value)) < 20_000
    assert goes_on(comfy)


def test_a_surrogate_in_every_text(comfy: Comfy) -> None:
    """No text input of any node of ours ends the thread that runs prompts."""
    texts = 0
    for name, about in comfy.object_info().items():
        inputs = {**about["input"].get("required", {}), **about["input"].get("optional", {})}
        for key, (kind, *_) in inputs.items():
            if about["category"].startswith("GMFlow") and (kind == "STRING" or kind == "COMBO"):
                texts += 1
                prompt = graph()
                prompt["bad"] = node(name, **dict.fromkeys(inputs, "0"))
                prompt["bad"]["inputs"][key] = f"{SURROGATE}{key}"
                prompt["show"] = node("PreviewAny", source=["bad", 0])
                comfy.run(prompt, expect_error=True)
    assert texts > 10
    assert goes_on(comfy)


WRONG = {
    "model null": ("sample", {"model": None}, "input 'model' is null"),
    "model number": ("sample", {"model": 5}, "input 'model' is 5; connect a MODEL"),
    "model object": ("sample", {"model": {"a": 1}}, "'model' is a dict"),
    "model list": ("sample", {"model": {"__value__": [1, 2, 3]}}, "'model' is a list of 3 values"),
    "latent null": ("sample", {"latent_image": None}, "input 'latent_image' is null"),
    "latent empty": ("sample", {"latent_image": {}}, "'latent_image' is a dict"),
    "latent ints": ("sample", {"latent_image": {"samples": [1]}}, "whose samples are a list"),
    "conditioning": ("sample", {"positive": {"__value__": [[1, 2]]}}, "'positive' is a list that"),
    "no conditioning": ("sample", {"positive": {"__value__": []}}, "class labels"),
    "text": ("labels", {"more_labels": {"__value__": [1, 2]}}, "no class"),
    "NaN": ("sample", {"denoise": NAN}, "input 'denoise' is nan; it must be a number from 0 to 1"),
    "NaN text": ("sample", {"shift": "nan"}, "input 'shift' is nan"),
    "infinity": ("sample", {"steps": float("inf")}, "convert an input value to a INT"),
    "combo": ("model", {"weight_dtype": "fp3"}, "fp3.*(not in|choose one of)"),
    "name": ("model", {"model_name": {"a": 1}}, "input 'model_name' is a dict"),
    "name list": ("model", {"model_name": {"__value__": [[1]]}}, "input 'model_name' is a list"),
}


@pytest.mark.parametrize(("at", "inputs", "complaint"), WRONG.values(), ids=WRONG)
def test_values_of_other_types_name_their_input(
    comfy: Comfy, at: str, inputs: dict, complaint: str
) -> None:
    with pytest.raises(PromptError, match=complaint):
        comfy.run(changed(at, **inputs))


@pytest.mark.parametrize("batches", [1, 4])
def test_too_many_labels_are_refused_with_numbers(comfy: Comfy, batches: int) -> None:
    lines = "\n".join(["3"] * (100_000 // batches))
    with pytest.raises(PromptError, match=r"\d\d,000 images|too many labels, 100,000"):
        comfy.run(changed("labels", more_labels=lines, label="(only more_labels)", repeat=batches))
    assert goes_on(comfy)


@pytest.fixture
def junk(comfy: Comfy) -> Iterator[Path]:
    """A folder of hostile files in models/gmflow; the server has one list of its own each time."""
    folder = comfy.base / "models" / "gmflow" / "junk"
    folder.mkdir()
    yield folder
    if (folder / "closed").exists():
        (folder / "closed").chmod(0o700)
    shutil.rmtree(os.fsencode(folder))
    comfy.object_info()


def write_header(path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with these metadata, which the library would not refuse."""
    tensors = load_file(POINTS_MODEL)
    save_file(tensors, path, metadata)


def options_of(comfy: Comfy, name: str, key: str) -> list[str]:
    entry = comfy.object_info()[name]["input"]["required"][key]
    return entry[1].get("options") or entry[0]


def test_no_file_takes_a_node_away(comfy: Comfy, junk: Path) -> None:
    names = set(comfy.object_info())
    base = {"format": "gmflow-1", "model_class": "GMDiT", "config": "{}", "training": "{}"}
    datas = {
        "number": '{"labels": 5}',
        "text": '{"labels": "abc"}',
        "deep": "[" * 100_000,
        "deep_labels": '{"labels": ' + "[" * 5000 + "]" * 5000 + "}",
        "many": json.dumps({"labels": [f"many {i}" for i in range(300_000)]}),
        "odd": json.dumps({"labels": [SURROGATE, "a\0b", "x" * 10_000]}),
        "none": "",
    }
    for name, data in datas.items():
        write_header(junk / f"{name}.safetensors", {**base, "data": data})
    (junk / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{")
    (junk / "model").mkdir()
    (junk / "model" / "model_index.json").mkdir()
    config = {"num_embeds_ada_norm": 30_000_000}
    (junk / "classes" / "transformer").mkdir(parents=True)
    (junk / "classes" / "transformer" / "config.json").write_text(json.dumps(config))
    (junk / "classes" / "model_index.json").write_text('{"id2label": {}}')
    os.mkfifo(junk / "pipe.safetensors")
    (junk / "gone.safetensors").symlink_to(junk / "nothing")
    (junk / "self.safetensors").symlink_to(junk / "self.safetensors")
    if "seed_assets" not in (COMFYUI / "server.py").read_text(encoding="utf-8"):
        for name in ("loop", "loop2"):  # where it is, ComfyUI walks these without end itself
            (junk / name).symlink_to(".")
    (junk / "closed").mkdir(mode=0o000)
    (junk / "picture.pt").write_bytes(b"\x80\x02.")
    (junk / "line\nbreak.safetensors").write_bytes(POINTS_MODEL.read_bytes())
    odd = os.fsencode(junk) + b"/\xff\xfe.safetensors"
    Path(os.fsdecode(odd)).write_bytes(POINTS_MODEL.read_bytes())

    assert names <= set(comfy.object_info())
    labels = options_of(comfy, "GMFlowClassLabels", "label")
    assert len(labels) < 25_000
    assert all(name.isprintable() for name in labels)
    models = [name for name in options_of(comfy, "GMFlowLoader", "model_name") if "junk" in name]
    assert all(name.isprintable() for name in models)
    assert not any("loop" in name or "pipe" in name or ".pt" in name for name in models)
    readable = [name for name in models if "udcff" in name or "break" in name]
    assert len(readable) == 2
    for name in readable:
        prompt = changed("model", model_name=name)
        prompt["sample"]["inputs"]["latent_image"] = ["empty", 0]
        prompt["empty"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
        del prompt["sample"]["inputs"]["positive"], prompt["labels"]
        assert latent_of(comfy, prompt).isfinite().all()
    for name in set(models) - set(readable):
        with pytest.raises(PromptError, match=r"junk"):
            comfy.run(changed("model", model_name=name))
    with pytest.raises(PromptError, match=r"pickle file, which could run any code"):
        comfy.run(changed("model", model_name="junk/picture.pt"))
    assert goes_on(comfy)


def test_many_files_are_listed_in_part(comfy: Comfy, junk: Path) -> None:
    for i in range(30_000):
        (junk / f"{i}.safetensors").touch()
    assert 19_000 < len(options_of(comfy, "GMFlowLoader", "model_name")) < 20_100
    assert "holds too much to list" in comfy.log()
    assert goes_on(comfy)


@pytest.mark.parametrize("kind", ["quotes", "file", "blank", "address"])
def test_a_model_is_found_in_any_spelling(comfy: Comfy, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "my model.safetensors"
    path.write_bytes((POINTS_MODEL.parent / DIGITS).read_bytes())
    text = {"quotes": f'"{path}"', "file": path.as_uri(), "blank": f"  {path}\n"}.get(kind)
    if text is None:
        text, complaint = "https://huggingface.co/datasets/a/b", "not the address of a model"
        with pytest.raises(PromptError, match=complaint):
            comfy.run(changed("model", hub_id_or_path=text))
    else:
        assert latent_of(comfy, changed("model", hub_id_or_path=text)).isfinite().all()


def test_points_of_other_channels_are_named(comfy: Comfy) -> None:
    """They are no empty ones, which ComfyUI brings into shape, and go to a stock sampler."""
    prompt = graph()
    prompt["points"] = node("GMFlowLoader", model_name=POINTS_MODEL.name)
    prompt["none"] = node("GMFlowUnconditional")
    prompt["stock"] = node(
        "KSampler",
        model=["points", 0],
        positive=["none", 0],
        negative=["none", 0],
        latent_image=["sample", 0],
        **{"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler"},
        **{"scheduler": "simple", "denoise": 1.0},
    )
    prompt["save"]["inputs"]["samples"] = ["stock", 0]
    with pytest.raises(PromptError, match=r"shape \(1, 3, 8, 8\), and this model \(GMModel\)"):
        comfy.run(prompt)


def test_pictures_that_fit_no_memory_are_refused(comfy: Comfy) -> None:
    prompt = graph()
    prompt["big"] = node(
        "LatentUpscale",
        samples=["labels", 2],
        upscale_method="nearest-exact",
        width=8192,
        height=8192,
        crop="disabled",
    )
    prompt["pixels"] = node("GMFlowPixels", samples=["big", 0], scale=256, columns=0)
    prompt["save"] = node("PreviewImage", images=["pixels", 0])
    with pytest.raises(PromptError, match=r"1 pictures of the shape \(262144, 262144, 3\)"):
        comfy.run(prompt)


def test_a_source_of_another_type_is_named(comfy: Comfy) -> None:
    prompt = graph()
    inputs = {"source": 5, "noise_seed": 0, "batch_size": 1, "choice": "by weight"}
    prompt["noise"] = node("GMFlowSourceNoise", **inputs)
    prompt["sample"]["inputs"]["latent_image"] = ["noise", 2]
    with pytest.raises(PromptError, match="'source' is 5; connect 'GM Load Mixture Source'"):
        comfy.run(prompt)


def test_latents_are_checked(comfy: Comfy) -> None:
    """Numbers that are not finite are refused by the input's name."""
    prompt = changed("sample", latent_image=["m39", 0])
    for i in range(40):
        prompt[f"m{i}"] = node(
            "LatentMultiply", samples=[f"m{i - 1}" if i else "one", 0], multiplier=10.0
        )
    prompt["one"] = graph()["sample"]
    with pytest.raises(PromptError, match="'latent_image' is a LATENT whose samples hold"):
        comfy.run(prompt)


def test_files_that_come_later_or_under_two_names(comfy: Comfy, junk: Path, tmp_path: Path) -> None:
    """A link into a disk that is mounted later is noticed; a folder answers to all its names."""
    disk = tmp_path / "disk"
    (junk / "disk").symlink_to(disk)
    (junk / "one.safetensors").symlink_to(disk / "far.safetensors")
    (junk / "a").mkdir()
    (junk / "b").symlink_to("a")
    shutil.copy(POINTS_MODEL.with_name(DIGITS), junk / "a" / "digits.safetensors")
    names = options_of(comfy, "GMFlowLoader", "model_name")
    assert "junk/a/digits.safetensors" in names
    assert not any("disk" in name or "one.safetensors" in name for name in names)
    time.sleep(2.1)  # until the list is kept
    comfy.object_info()
    disk.mkdir()
    shutil.copy(POINTS_MODEL, disk / "far.safetensors")
    names = options_of(comfy, "GMFlowLoader", "model_name")
    assert {"junk/disk/far.safetensors", "junk/one.safetensors"} <= set(names)
    for name in ("junk/a/digits.safetensors", "junk/b/digits.safetensors"):
        prompt = changed("model", model_name=name)
        prompt["sample"]["inputs"]["seed"] = len(name)
        assert latent_of(comfy, prompt).isfinite().all()
