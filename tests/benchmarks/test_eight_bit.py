"""8-bit benchmarks: the table of what real models need, and weights with outliers."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.eight_bit import with_outliers
from tests.benchmarks.eight_bit_need import compute_need, fit
from tests.comfyui.bases import flux_shapes, random_weights


def test_need_of_the_real_models() -> None:
    """Shapes add up to the published sizes, 8 bit is half of 16, rows are marked as computed."""
    rows = {(row["model"], row["weights"]): row for row in compute_need()}
    kinds = {
        (model, kind) for model in ("FLUX.1", "Qwen-Image") for kind in ("bf16", "fp8", "8-bit")
    }
    assert set(rows) == kinds | {("FLUX.1", "Q4_K"), ("GM-DiT", "16-bit")}
    assert round(rows["FLUX.1", "Q4_K"]["weights_gb"]) == 7  # as the published file
    assert rows["GM-DiT", "16-bit"]["parameters"] == pytest.approx(676e6, rel=1e-3)
    for model, parameters in {"FLUX.1": 11.9e9, "Qwen-Image": 20.43e9}.items():
        assert rows[model, "bf16"]["parameters"] == pytest.approx(parameters, rel=1e-3)
        assert rows[model, "8-bit"]["weights_gb"] < 0.51 * rows[model, "bf16"]["weights_gb"]
    assert {row["how"] for row in rows.values()} == {"computed"}


def test_fit_says_how_much_is_offloaded() -> None:
    gib = 2**30
    assert fit(8 * gib, 7 * gib, 8) == "fits"
    assert fit(10 * gib, 8 * gib, 8) == "25 % offloaded"


def test_outliers_are_where_they_are_asked_for() -> None:
    plain = random_weights(flux_shapes(256, 1, 1), 0, torch.float32)
    for kind in ("none", "weights", "activations", "both"):
        changed = {
            name
            for name, weight in with_outliers(plain, kind).items()
            if not torch.equal(weight, plain[name])
        }
        assert ("img_in.weight" in changed) == (kind in ("activations", "both"))
        assert ("double_blocks.0.img_attn.qkv.weight" in changed) == (kind in ("weights", "both"))
        assert not {name for name in changed if name.startswith(("final_layer", "time_in"))}
