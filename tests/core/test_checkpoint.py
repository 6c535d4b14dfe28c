"""Checkpoints: round trips, failed writes, and an error with advice for every kind of bad file."""

import io
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.files import safetensors_files
from gmflow_core.files.checkpoint import load_training_state
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from tests.helpers import normal


def network(**changes):
    return GMFlowMLP(
        GMFlowMLPConfig(
            **{"num_components": 3, "embed_dim": 8, "hidden_dim": 6, "num_layers": 1, **changes}
        )
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "model.safetensors"


@pytest.fixture
def saved(path):
    save_checkpoint(network(), path)
    return path


# Round trips


@pytest.mark.parametrize("constant_log_std", [None, 0.0])
def test_weights_config_facts_and_training_state_come_back(path, constant_log_std):
    model, facts = (
        network(constant_log_std=constant_log_std),
        {"steps": 7, "note": "über", "losses": [1.5, None]},
    )
    state = {
        "step": torch.tensor(7),
        "optimizer.0.exp_avg": torch.randn(3, 2),
        "net.0.weight": torch.ones(1),
    }
    save_checkpoint(model, path, facts=facts, state=state)
    loaded, config = load_checkpoint(path)
    assert config == model.config == loaded.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {n: t.tolist() for n, t in loaded.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    assert torch.equal(loaded(normal(4, 2), 0.5).means, model(normal(4, 2), 0.5).means)
    config = {k: v for k, v in vars(config).items() if not k.startswith("dx_")}  # of DX policies
    assert read_metadata(str(path)) == {
        "model_class": "GMFlowMLP",
        "config": config,
        "training": facts,
        "data": {},
    }
    found = load_training_state(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_weights_may_be_stored_and_loaded_in_other_types(path):
    model = network()
    save_checkpoint(model, path, dtype=torch.bfloat16, state={"step": torch.tensor(3)})
    assert load_training_state(path)["step"].dtype == torch.int64
    assert next(load_checkpoint(path, dtype=None)[0].parameters()).dtype == torch.bfloat16
    loaded = load_checkpoint(path)[0].state_dict()
    assert all(
        torch.equal(loaded[name], t.to(torch.bfloat16).float())
        for name, t in model.state_dict().items()
    )


def test_a_checkpoint_without_training_state_has_an_empty_one(saved):
    assert load_training_state(saved) == {}


def test_what_the_samples_are_comes_back(path):
    data = {"labels": ["null", "eins"], "space": "pixels", "other": [1, None]}
    save_checkpoint(network(), path, data=data)
    assert read_metadata(path)["data"] == data


def test_a_file_from_before_the_data_entry_has_none(saved):
    rewrite(saved)
    assert read_metadata(saved)["data"] == {}
    load_checkpoint(saved)


def test_every_length_of_the_header_is_read(path):
    """Files begin with the length of the header, and some lengths begin like a pickle or a zip."""
    seen, model = set(), network()
    for pad in range(0, 300, 8):
        save_checkpoint(model, path, facts={"pad": "x" * pad})
        seen.add(path.read_bytes()[0])
        load_checkpoint(path)
    assert 0x80 in seen


# Writing


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, failing):
    before = saved.read_bytes()

    def fail(*args, **kwargs):
        if failing == "save_file":
            with open(args[1], "wb") as file:
                file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_files if failing == "save_file" else os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(network(), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    save_checkpoint(network(num_components=4), saved)
    assert load_checkpoint(saved)[1].num_components == 4
    assert list(saved.parent.iterdir()) == [saved]


def test_facts_that_are_no_json_are_refused_before_anything_is_written(saved):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(network(), saved, facts={"model": object()})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# Bad files


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nothing\.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")


def retrained(**config):
    """Return metadata with another config."""
    return {"config": json.dumps({**vars(network().config), **config})}


DAMAGED, UPDATE = "the file was edited or damaged", "update GMFlow, or train the model again"
BYTES = {  # what the file holds instead
    "truncated": (
        lambda whole: whole[:-10],
        "is not a whole safetensors file .*; if it was downloaded or copied, do that again",
    ),
    "cut in the header": (
        lambda whole: whole[:50],
        "is not a whole safetensors file .*do that again",
    ),
    "empty": (lambda _: b"", "is not a whole safetensors file .*do that again"),
    "web page": (
        lambda _: b"<html>404 Not Found</html>",
        "is not a whole safetensors file .*do that again",
    ),
    "bare pickle": (
        lambda _: pickle.dumps({"weight": 1}),
        "is a pickle file .*; use the .safetensors version",
    ),
    "zip pickle": (
        lambda _: torch_saved(True),
        "is a pickle file .*; use the .safetensors version",
    ),
    "legacy pickle": (
        lambda _: torch_saved(False),
        "is a pickle file .*; use the .safetensors version",
    ),
}
METADATA = {  # None removes an entry
    "foreign": (
        {"format": "pt"},
        "not a GMFlow checkpoint .*; load other models with their own loader",
    ),
    "no format": (
        {"format": None},
        "not a GMFlow checkpoint .*; load other models with their own loader",
    ),
    "newer format": (
        {"format": "gmflow-2"},
        "gmflow-2.; this version knows .* gmflow-1; update GMFlow",
    ),
    "unknown class": (
        {"model_class": "GMFlowX"},
        "holds a 'GMFlowX' .*; this version knows .'DiTDH', 'GMDiT', 'GMFlowMLP'.*; update GMFlow",
    ),
    "unknown key": (retrained(num_heads=4), f"num_heads.*; {UPDATE}"),
    "value out of range": (retrained(num_components=0), f"num_components is 0.*; {UPDATE}"),
    "value of another type": (retrained(hidden_dim=6.5), f"hidden_dim.*6.5.*; {UPDATE}"),
    "config that is a list": (
        {"config": "[1, 2]"},
        f"config .1, 2. instead of an object; {DAMAGED}",
    ),
    "config that is no JSON": ({"config": "{'a': 3}"}, f"no readable config .*; {DAMAGED}"),
    "no config": ({"config": None}, f"no readable config .*; {DAMAGED}"),
    "facts that are no JSON": ({"training": "{"}, f"no readable training record .*; {DAMAGED}"),
    "data that are no dictionary": (
        {"data": "[1, 2]"},
        f"data record .1, 2. instead of an object; {DAMAGED}",
    ),
}
TENSORS = {
    "missing": ({"out_means.weight": None}, r"'out_means.weight': expected \(6, 6\), found none"),
    "extra": (
        {"out_extra.weight": torch.ones(1)},
        r"'out_extra.weight': expected none, found \(1,\)",
    ),
    "misshaped": (
        {"out_means.weight": torch.ones(4, 6)},
        r"'out_means.weight': expected \(6, 6\), found \(4, 6\)",
    ),
}


def torch_saved(as_zip):
    torch.save(
        network().state_dict(), buffer := io.BytesIO(), _use_new_zipfile_serialization=as_zip
    )
    return buffer.getvalue()


def rewrite(path, tensors=(), metadata=()):
    """Rewrite the checkpoint with other tensors or metadata; None removes an entry."""
    config = json.dumps(vars(network().config))
    entries = {
        "format": "gmflow-1",
        "model_class": "GMFlowMLP",
        "config": config,
        "training": "{}",
        **dict(metadata),
    }
    contents = {**load_file(path), **dict(tensors)}
    present = [
        {name: value for name, value in part.items() if value is not None}
        for part in (contents, entries)
    ]
    save_file(present[0], path, present[1])


def assert_named(path, advice):
    with pytest.raises(ValueError, match=f"model.safetensors.*{advice}"):
        load_checkpoint(path)


def test_a_folder_is_named(saved):
    saved.unlink()
    saved.mkdir()
    assert_named(
        saved,
        "is a folder without transformer/config.json, .*; give the .safetensors file inside it",
    )
    with pytest.raises(
        ValueError, match=r"model\.safetensors is a folder; give the \.safetensors file inside it"
    ):
        load_training_state(saved)


@pytest.mark.parametrize(("content", "advice"), BYTES.values(), ids=BYTES.keys())
def test_a_file_of_another_kind_is_named_with_what_to_do(saved, content, advice):
    saved.write_bytes(content(saved.read_bytes()))
    assert_named(saved, advice)


@pytest.mark.parametrize(("metadata", "advice"), METADATA.values(), ids=METADATA.keys())
def test_metadata_of_another_kind_are_named_with_what_to_do(saved, metadata, advice):
    rewrite(saved, metadata=metadata)
    assert_named(saved, advice)


@pytest.mark.parametrize(("tensors", "advice"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_named(saved, tensors, advice):
    rewrite(saved, tensors=tensors)
    assert_named(saved, f"1 tensors do not fit its config, first {advice}; {DAMAGED}")
