"""What other nodes put around a sampler or on a model, in ComfyUI's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .adapters import write_adapter
from .bases import write_flux
from .scripts import of, results_of

SCRIPT = Path(__file__).with_name("around_samplers.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all cases, from one process."""
    folder = tmp_path_factory.mktemp("around")
    small = {"depth": 1, "single": 1, "dtype": torch.float32}
    write_flux(folder / "flux.safetensors", **small)
    write_adapter(folder / "adapter.safetensors", **small)
    # with its attention for the CPU, TorchCompileModel compiles anew in every step
    return results_of(SCRIPT, folder, options=("--use-pytorch-cross-attention",))


def test_a_sampler_that_another_node_wraps(found: dict[str, Any]) -> None:
    """The wrapper's sigma takes effect as in stock Euler, with its model's attributes or without.

    Outside of a mask nothing changes.
    """
    for name, about in of(found, "wrapped").items():
        assert about["effect"] > 0.05, name
        assert about["euler 2"] < 1e-6, name
        assert about["euler 0"] < 1e-6, name
        for solver in ("gm-ode", "gm-sde", "gm-policy"):
            assert about[solver]["effect"] > 0.02, (name, solver)
            assert about[solver]["hidden"] < 1e-6, (name, solver)
            assert about[solver]["kept"] is None or about[solver]["kept"] < 1e-6, (name, solver)


def test_soft_masks_change_as_much_as_in_stock_samplers(found: dict[str, Any]) -> None:
    """Followers of the mean are the stock ones; more substeps make a soft mask no harder."""
    for name, about in of(found, "soft masks").items():
        for value in (1.0, 0.9):
            for solver, limit in (("euler", 1e-5), ("dpmpp-2m", 1e-5), ("uni-pc", 2e-3)):
                assert about[f"{solver}, {value}"] < limit, (name, solver)
                assert about.get(f"{solver}, changing", 0) < limit, (name, solver)
            assert about[f"kept, {value}"] < 1e-6, name
        assert about["substeps, 0.9"] < 1.5 * about["substeps, 1.0"] + 0.01, name
        assert about["moved, 0.9"] > 0.8 * about["moved, 1.0"], name


def test_gm_and_stock_samplers_in_turn_on_a_compiled_model(found: dict[str, Any]) -> None:
    assert max(of(found, "compiled")["differences"]) < 1e-5


def test_a_sampling_that_is_no_flow_is_refused_at_every_door(found: dict[str, Any]) -> None:
    result = of(found, "not a flow")
    for door, text in result["refused"].items():
        assert "ModelSampling" in text, door
        assert "flow" in text, door
    assert result["fine"] == [True, True]


def test_what_is_valid_is_not_refused(found: dict[str, Any]) -> None:
    """Numbers of NumPy and torch, odd but valid conditionings and latents, rounded sigmas."""
    result = of(found, "valid")
    assert len(result) > 15
    assert {name: text for name, text in result.items() if text} == {}


def test_odd_neighbours_change_nothing_or_are_refused(found: dict[str, Any]) -> None:
    """Samplings made anew, sigmas without a step, conditionings that no base reads."""
    result = of(found, "odd neighbours")
    assert result["channels"][0] == [2, 2]
    assert max(result["far"], default=0.0) < 1e-6
    assert result["fine"] == ""
    assert result["class"] == "ValueError"  # ComfyUI shows the path of any other class
    for name, about in result["refused"].items():
        for what, error in about.items():
            assert what.partition(": ")[2] in error, (name, what, error)


def test_what_is_not_finite_is_said_once(found: dict[str, Any]) -> None:
    """Inputs are refused by name; a result is reported with the likely cause."""
    result = of(found, "not finite")
    refused = {"latent": "the latent that is sampled", "mask": "the noise mask"}
    refused["text"] = "positive conditioning (cross_attn)"
    reported = {"weight": "the model's weight", "scale": "the guidance scale", "lora": "a LoRA"}
    for sampler, cases in result.items():
        for case, about in cases.items():
            if case in refused:
                assert refused[case] in about["error"], (sampler, case)
                assert "not finite" in about["error"]
            elif case in reported:
                assert about["error"] == "", (sampler, case)
                (text,) = about["heard"]
                assert reported[case] in text, (sampler, case)
            else:
                assert about == {"error": "", "heard": []}, sampler


def test_stock_nodes_do_not_save_half_of_a_model(found: dict[str, Any]) -> None:
    result = of(found, "saved")
    assert "without its head" in result["adapted"]
    assert "gmflux_4step" in result["adapted"]
    assert "GM model cannot be saved" in result["board"]
    assert result["base"] == ""
    assert result["files"] == ["base_00001_.safetensors"]
    assert result["same"]


def test_what_links_bring_is_refused_by_the_name_of_its_input(found: dict[str, Any]) -> None:
    """Values that ComfyUI itself never checks, of which some would give black pictures."""
    result = of(found, "linked")
    assert result.pop("good") == ""
    says = {"mask": "noise_mask", "index": "batch_index", "text": "tensor"}
    says |= {"pooled": "pooled_output", "long": "longest has 1,000,000"}
    for name, error in result.items():
        first, _, rest = name.partition(" ")
        at = {"long": "more_labels"}.get(first, "positive" if rest == "nan" else "latent_image")
        at = "latent_image" if first == "mask" else at
        assert f"the input '{at}' is " in error, (name, error)
        assert says.get(first, "samples" if rest == "bit" else "") in error, (name, error)
        assert "not finite" in error or rest != "nan", (name, error)


def test_blended_policies_have_the_mean_that_comfyui_averages(found: dict[str, Any]) -> None:
    """In each of 4 steps; a default conditioning, for what others leave, is not blended."""
    result = of(found, "regions")
    for name in ("masks", "areas"):
        steps, shift = result[name]
        assert steps == 4, name
        assert shift < 1e-4, name
    assert result["default"][0] == 0
    assert result["default guided"][1] == 0


def test_a_changed_positive_prediction_counts_under_guidance(found: dict[str, Any]) -> None:
    """As of FreSca; and layers that a LoRA bypasses tell two clones of a model apart."""
    result = of(found, "changed positive")
    assert result["same"] == [True, True, False, False]
    assert result["euler"] > 0.05
    assert result["gm-ode"] > 0.05


def test_an_area_keeps_its_own_mixture_beside_a_negative_prompt(found: dict[str, Any]) -> None:
    """ComfyUI gives each area to the other list too, where it counts for that one's prompt."""
    result = of(found, "regions")
    assert result["areas, positive"] < 1e-3
    assert result["areas, negative"] < 1e-3


def test_guidance_may_come_before_the_adapter(found: dict[str, Any]) -> None:
    """It is the same as behind it, and its interval is that of the adapter's sampling."""
    result = of(found, "orders")
    assert len(result) == 4
    for name, (order, effect) in result.items():
        assert order < 1e-6, name
        assert effect > 1e-3, name


def test_a_skipped_call_of_one_of_two_prompts_is_no_mixture(found: dict[str, Any]) -> None:
    """As EasyCache skips calls; the other prompt's mixture alone would be another picture's."""
    assert "this model predicts one at every step" in of(found, "skipped")["said"]
