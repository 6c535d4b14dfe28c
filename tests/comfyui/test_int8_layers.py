"""Layers with 8-bit weights in ComfyUI's process: patches, offloading, interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .adapters import write_lora
from .bases import write_flux
from .scripts import run_inside

SCRIPT = Path(__file__).with_name("int8_inside.py")
BECOMES_INT8 = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.18.txt_mlp.2",
    "single_blocks.3.modulation.lin",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.59.img_mod.1",
    "joint_blocks.7.context_block.adaLN_modulation.1",
    "blocks.4.ffn.2",
    "layers.2.feed_forward.w1",
]
STAYS_IN_16_BIT = [
    *("img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer"),
    *("final_layer.linear", "final_layer.adaLN_modulation.1", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0", "label_emb.0.0"),
    *("time_projection.1", "double_stream_modulation_img.lin", "head.head"),
    *("proj_out_means", "proj_out_logweights", "proj_out_logstds.1", "proj_out_logstds.3"),
    "txt_in.individual_token_refiner.blocks.0.mlp.0",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run one process for all tests."""
    folder = tmp_path_factory.mktemp("int8")
    paths = (
        write_flux(folder / "flux.safetensors"),
        write_lora(folder / "lora.safetensors", strength=0.1),
    )
    printed, _ = run_inside(SCRIPT, *paths, json.dumps(BECOMES_INT8 + STAYS_IN_16_BIT))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("own", [False, True], ids=["as here", "own layout"])
@pytest.mark.parametrize("compute", ["16 bit", "int8"])
def test_patches_and_offloading(found: dict[str, Any], own: bool, compute: str) -> None:
    about = found[f"{own} {compute}"]
    assert about["layer"] == ("Linear" if about["native"] else "Int8Linear")
    assert not (own and about["native"])
    assert about["size"] < 0.65  # of so small a model much is outside the blocks
    assert 0 < about["error"] < 0.03
    assert about["move"] > 0.05
    for place in ("with lora", "offloaded", "half offloaded", "unloaded"):
        assert about[f"error {place}"] < 0.35 * about["move"], place
    # an offloaded layer adds the LoRA to the expanded weight, without rounding it once more
    assert about["error offloaded"] <= about["error with lora"] * 1.05
    assert about["functions offloaded"] == 4
    assert about["freed"] > 0
    assert about["restored"]


def test_interrupted_load(found: dict[str, Any]) -> None:
    assert found["interrupt"] == {"interrupted": True, "finite": True}


def test_a_refused_save_leaves_the_base_as_it_was(found: dict[str, Any]) -> None:
    """One layer was patched already when the next one's patch failed."""
    assert found["refused save"] == {"said": "no such patch", "same": True}


def test_which_layers_stay_in_16_bit(found: dict[str, Any]) -> None:
    """Blocks become int8, in several architectures; first and last layers and embeddings do not."""
    assert found["blocks"] == [True] * len(BECOMES_INT8) + [False] * len(STAYS_IN_16_BIT)
