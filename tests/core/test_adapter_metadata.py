"""Facts that travel with an adapter: written, read, refused, and added to a published file."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmflow_core import AdapterFacts, read_adapter_facts, write_adapter
from gmflow_core.cli import main
from gmflow_core.files import adapter_metadata
from gmflow_core.files.adapter_metadata import facts_in, set_adapter_facts
from tests.core.test_adapter_heads import head_tensors
from tests.helpers import normal

FACTS = AdapterFacts("FLUX.1", 4, 3.2, 0.5, 3.5, 0.3, "GMFlow")
LORA = "transformer_blocks.0.ff.net.2.lora_{}.weight"


def tensors_of(policy="GMFlow"):
    pair = {LORA.format("A"): normal(4, 12), LORA.format("B"): normal(12, 4)}
    return {**head_tensors(policy), **pair}


def published(path, metadata=None):
    """Write an adapter as it is published, with a header that is not aligned to 8 bytes."""
    metadata = (
        {"policy_config": '{"type": "GMFlow"}', "a key": "é"} if metadata is None else metadata
    )
    tensors = {f"transformer.{name}": tensor.half() for name, tensor in tensors_of().items()}
    save_file(tensors, path, metadata)
    return path


def data_of(path):
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("policy", ["GMFlow", "DX", "ArcFlow"])
def test_what_is_written_is_read(tmp_path, policy):
    path, tensors = tmp_path / "a.safetensors", tensors_of(policy)
    config = {"type": policy, **({"segment_size": 0.25, "shift": 3.2} if policy == "DX" else {})}
    write_adapter(tensors, path, config, AdapterFacts(base="FLUX.1", steps=2, final_step_size=1.0))
    assert read_adapter_facts(path) == AdapterFacts("FLUX.1", 2, None, 1.0, policy=policy)
    assert json.loads(metadata_of(path)["policy_config"]) == config
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_facts_survive_the_way_through_metadata():
    facts = AdapterFacts("Qwen-Image", 8, 1.15, 1e-05, 0.0, 1.0, "DX")
    assert facts_in(facts.metadata(), "file") == facts
    assert facts_in(None, "file") == facts_in({"gmflow.later": "x"}, "file") == AdapterFacts()


def test_facts_are_added_to_a_published_file_without_touching_its_tensors(tmp_path, monkeypatch):
    path, out = published(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    before, tensors = path.read_bytes(), load_file(path)
    set_adapter_facts(path, AdapterFacts(steps=8, shift=3.2), out)
    assert path.read_bytes() == before
    assert data_of(out) == data_of(path)
    assert metadata_of(out) == {
        **{"policy_config": '{"type": "GMFlow"}', "a key": "é"},
        **{"gmflow.steps": "8", "gmflow.shift": "3.2"},
    }
    assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0
    opened, replace_file = [], os.replace

    def tracked(*arguments):
        opened.append(open(*arguments))  # noqa: SIM115
        return opened[-1]

    def replace_closed(source, target):
        """Refuse files that are still open, as Windows does."""
        assert all(file.closed for file in opened)
        replace_file(source, target)

    monkeypatch.setattr(adapter_metadata, "open", tracked, raising=False)
    monkeypatch.setattr(os, "replace", replace_closed)
    set_adapter_facts(out, AdapterFacts(steps=4, base="FLUX.1"))
    assert len(opened) >= 2
    assert data_of(out) == data_of(path)
    assert read_adapter_facts(out) == AdapterFacts("FLUX.1", 4, 3.2, policy="GMFlow")
    found = load_file(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_command_shows_and_sets_them(tmp_path, capsys):
    path, out = published(tmp_path / "a.safetensors", {}), tmp_path / "new" / "b.safetensors"
    main(["adapter", str(path)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == str(path)
    assert "steps: not stated" in shown
    assert "policy: GMFlow" in shown
    words = "--base FLUX.1 --steps 4 --shift 3.2 --final-step-size 0.5 --guidance 3.5"
    main(["adapter", str(path), *words.split(), "--temperature", "0.3", "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[1:] == FACTS.lines()
    assert read_adapter_facts(out) == FACTS
    main(["adapter", str(out), "--steps", "8"])
    assert "steps: 8" in capsys.readouterr().out
    main(["adapter", str(out), "--shift", "2", "--remove", "temperature", "steps"])
    assert read_adapter_facts(out) == replace(FACTS, steps=None, shift=2.0, temperature=None)
    assert data_of(out) == data_of(path)


def test_the_command_refuses_what_does_not_fit(tmp_path):
    path, link = published(tmp_path / "a.safetensors"), tmp_path / "link.safetensors"
    link.symlink_to(path)
    lora, before = tmp_path / "lora.safetensors", path.read_bytes()
    save_file({"blocks.0.lora_A.weight": normal(2, 2)}, lora)
    for arguments, message in (
        ([path, "--steps", "0"], "steps is 0; it has to be a whole number from 1 to 1000"),
        ([path, "--shift", "nan"], "shift is nan"),
        ([path, "--final-step-size", "2"], r"final_step_size is 2\.0"),
        ([path, "--base", ""], "base is ''"),
        ([path, "--out", tmp_path / "b.safetensors"], "nothing to write"),
        ([path, "--steps", "4", "--remove", "steps"], "both written and removed"),
        ([link, "--steps", "4"], "is a link"),
        ([lora, "--steps", "4"], r"is no GM adapter: none of its 1 tensors \(blocks\.0"),
        ([tmp_path / "none.safetensors"], "there is no file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["adapter", *map(str, arguments)])
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        *("a.safetensors", "link.safetensors", "lora.safetensors")
    ]


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "four", "a whole number from 1 to 1000"),
        ("steps", "4.0", "a whole number"),
        ("steps", "9" * 5000, "a whole number"),
        ("shift", "inf", r"a number from 0\.01 to 100"),
        ("shift", "-3", "a number from"),
        ("final_step_size", "0", "above 0 and at most 1"),
        ("guidance", "", "a number from 0 to 100"),
        ("guidance", "100.5", "a number from 0 to 100"),
        ("temperature", "1.5", "above 0 and at most 1"),
        ("base", "\ud800\x1b[31m", "1 to 100 printable characters"),
        ("policy", "GM", "one of GMFlow, DX, ArcFlow"),
    ],
)
def test_bad_values_are_quoted(key, text, expected):
    with pytest.raises(ValueError, match=rf"a\.sft says gmflow\.{key} = .*{expected}") as error:
        facts_in({f"gmflow.{key}": text}, "a.sft")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_policy_that_contradicts_the_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    published(path, {"policy_config": '{"type": "GMFlow"}', "gmflow.policy": "DX"})
    with pytest.raises(ValueError, match=r"says gmflow\.policy = DX .* are of 'GMFlow'"):
        read_adapter_facts(path)
    set_adapter_facts(path, AdapterFacts(), remove=["policy"])
    assert read_adapter_facts(path).policy == "GMFlow"
    published(path, {"policy_config": '{"type": "Flow3"}'})
    with pytest.raises(ValueError, match="type 'Flow3', none of GMFlow, DX, ArcFlow"):
        read_adapter_facts(path)
    published(path, {"policy_config": "[1]"})
    with pytest.raises(ValueError, match=r"policy_config '?\[1\]'? instead of an object"):
        read_adapter_facts(path)
    tensors, bad = tensors_of(), {LORA.format("C"): normal(2, 2)}
    half = {name: tensor for name, tensor in tensors.items() if name != LORA.format("A")}
    for wrong, policy, facts, message in (
        (tensors, "DX", AdapterFacts(), "policy 'DX' does not fit tensors of a head of GMFlow"),
        (tensors, "GMFlow", AdapterFacts(policy="DX"), r"policy \('GMFlow', 'DX'\) does not fit"),
        (half, "GMFlow", AdapterFacts(), "pairs of .*lora_B"),
        ({**tensors, **bad}, "GMFlow", AdapterFacts(), "lora_C"),
        ({k: v for k, v in tensors.items() if "lora" in k}, "GMFlow", AdapterFacts(), "no head"),
    ):
        with pytest.raises(ValueError, match=message):
            write_adapter(wrong, tmp_path / "b.safetensors", {"type": policy}, facts)
    assert not (tmp_path / "b.safetensors").exists()
