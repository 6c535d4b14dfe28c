"""Ordinary flow models, and models of epsilon and v: one Gaussian, in the real ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .scripts import of, results_of

SCRIPT = Path(__file__).with_name("plain_inside.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all cases, from one process."""
    return results_of(SCRIPT, tmp_path_factory.mktemp("plain"))


def test_one_step_with_the_right_spread_ends_where_the_exact_flow_does(found: dict) -> None:
    """The data are Gaussian; epsilon and v are sampled on the straight path as velocities are."""
    for kind, about in of(found, "closed form").items():
        assert about["gm-ode"] < 2e-3, kind
        assert about["euler"] > 0.5, kind


def test_stock_names_give_the_latents_of_our_own_nodes(found: dict) -> None:
    same = of(found, "same latents")
    assert len(same) == 8
    assert all(same.values()), same


def test_stock_names_behave_as_any_sampler(found: dict) -> None:
    """Two stages come near to one; masks keep; denoise starts from the latent; batches agree."""
    for kind, about in of(found, "as any sampler").items():
        assert about["two stages"] < 0.03, kind
        assert about["outside the mask"] < 1e-6, kind
        assert about["inside the mask"] > 0.5, kind
        assert about["part"] < 0.8, kind
        assert about["alone"] < 1e-6, kind


def test_guidance_shifts_the_mean_by_its_weight_in_standard_deviations(found: dict) -> None:
    for kind, about in of(found, "guided").items():
        assert about["shift"] < 1e-5, kind
        assert about["towards"], kind
        assert about["gm-ode"] > 0.05, kind
        assert not about["keys"], kind


def test_guidance_in_a_part_of_the_sampling(found: dict) -> None:
    """The network is asked for the negative in that part only, on any path."""
    for kind, about in of(found, "interval").items():
        batches = {name: each["batches"] for name, each in about.items()}
        assert batches["all"] == [2, 2, 2, 2], kind
        assert sorted(batches["first"], reverse=True) == batches["first"], kind
        assert sorted(batches["last"]) == batches["last"], kind
        assert batches["first"][::3] == [2, 1], kind
        assert batches["last"][::3] == [1, 2], kind
        first, *others = (each["means"][0] for each in about.values())
        assert others[0] == first, kind
        assert first < others[1] - 0.05, kind


def test_weight_0_saves_the_negative_prediction(found: dict) -> None:
    """By every door, unless a node after guidance reads it, as Self-Attention Guidance does."""
    about = of(found, "weight 0")
    assert about.pop("read") == [2, 2]
    assert about == {"guider": [1, 1], "stock": [1, 1], "node": [1, 1]}


def test_weight_0_keeps_a_negative_that_attention_guidance_asks_for(found: dict) -> None:
    about = of(found, "weight 0 with attention guidance")
    assert about["sizes"] == [2, 2, 1, 1]  # the last without a negative
    *unused, missing = about["said"]
    assert unused == ["", "", "negative", "", "negative", ""]  # has no effect
    assert missing.startswith("no negative conditioning, and a node on the model needs one")


def test_another_nodes_function_for_predictions_is_called_or_refused(found: dict) -> None:
    """As that of SkipLayerGuidanceDiTSimple; it sees that nothing is guided in the second step."""
    about = of(found, "other function")
    assert about["effect"] > 1e-4
    assert about["order"] < 1e-6
    assert about["told"] == [True, False] * 2
    assert about["cached"] == ""
    for name, error in zip(("model", "guide"), about["auto"], strict=True):
        assert error.startswith(f"Halving on the {name} does not go with GM Autoguidance: ")


def test_a_latent_of_several_parts(found: dict) -> None:
    """As of a video with its sound, which ComfyUI's own samplers pack into one."""
    about = of(found, "several parts")
    if not about:
        pytest.skip("this ComfyUI knows no latents of several parts")
    assert max(about["far"]) < 1e-6
    assert "a LATENT of several parts" in about["node"]


def test_the_usual_spread_and_no_temperature(found: dict) -> None:
    about = of(found, "usual spread")
    assert about["zero"]
    assert about["same as none"]
    assert about["other"] > 0.02
    assert about["no temperature"] < 1e-6


def test_where_no_prompt_counts_nothing_is_left_and_nothing_guided(found: dict) -> None:
    """ComfyUI predicts 0 there, as for a conditioning mask of zeros: no sign of a picture."""
    for kind, about in of(found, "uncovered").items():
        for name in ("masked", "never", "nothing to sample"):
            assert max(about[name]) < 1e-5, (kind, name)
        assert about["right"] < 1e-5, kind
        assert about["left"] > 0.2, kind
        for name in ("negative masked", "negative never", "by euler"):
            assert about[name] < 1e-5, (kind, name)
        assert min(about["negative late"]) > 1e-3, kind
        guided, free = about["negative left"]
        assert guided > 0.05, kind
        assert free < 1e-5, kind


def test_what_is_said_of_spreads_and_schedules_is_true(found: dict) -> None:
    about = of(found, "told")
    ran = {name: [text for text in said if "steps, shift" in text] for name, said in about.items()}
    unused = {name for name, said in about.items() if any("no effect" in text for text in said)}
    assert unused == {"euler", "our euler", "off"}
    assert about["euler"] == [
        "no effect: GM Spread, as this sampler follows the mean alone; choose gm_ode, gm_sde or "
        "gm_policy, or a weight of GM Probabilistic Guidance"
    ]
    assert ran["gm_ode"] == [
        "gm-ode: 2 steps, shift 1, order 2, 8 substeps, one Gaussian (K = 1) of spread 0.8"
    ]
    assert "spread" not in ran["our euler"][0]
    assert "shift 1, the last 0.668 of the way" in ran["ddim"][0]
    assert "shift 1, last step 4 times as long as the others" in ran["cut"][0]
    assert "shift 1, the last 0.6 of the way, order" in ran["second stage"][0]


def test_other_samplings_and_schedules_are_refused_by_name(found: dict) -> None:
    messages = of(found, "refused")
    rising = messages.pop("rising")
    assert "step 1 does not fall" in rising
    assert messages
    for name, message in messages.items():
        assert message.startswith("wrong sampling: "), name
        assert name in message, name


def test_names_are_listed_once_and_taken_out_again(found: dict) -> None:
    """A name that another extension has taken stays with it."""
    about = of(found, "lists")
    assert about["listed"]
    assert about["once"]
    assert about["works"], "after a reload of k-diffusion's module"
    assert about["left"] == []
    assert about["kept"]
    assert about["back"]
