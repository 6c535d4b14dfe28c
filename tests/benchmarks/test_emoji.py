"""Measuring models of the emoji: a tiny set and tiny networks through each part."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.benchmarks import emoji, stock
from tests.benchmarks.picture_sets import PictureSet
from tests.benchmarks.tables import means_of
from tests.comfyui.installation import COMFYUI, HOW_TO, is_installed
from tests.training.evaluation_runs import two_classes, write_model, write_prepared
from training.evaluation.models import Space

inside_comfyui = pytest.mark.skipif(not is_installed(), reason=f"no ComfyUI in {COMFYUI}: {HOW_TO}")


class Tiny(PictureSet):
    """Noise with a bright half, of 8 x 8 pixels."""

    name, feature_iterations = "emoji", 40

    def prepare(self, part: str, folder: Path) -> None:
        """Write the pictures of a part."""
        write_prepared(folder, *two_classes(*{"train": (60, 0), "test": (24, 1)}[part]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a set, its models (flow matching of two names, K = 8 of two seeds), and the folder."""
    work = tmp_path_factory.mktemp("emoji")
    data = Tiny(work)
    plain = {"num_components": 1, "constant_log_std": 0.0}
    for seed, name, more in (
        (0, "large_fm", plain),
        (0, "fm", plain),
        (0, "k8", {"spectrum_layers": (4,)}),
        (1, "k8", {"spectrum_layers": (4,)}),
    ):
        path = work / f"emoji_{name}_seed{seed}" / "weights.safetensors"
        path.parent.mkdir()
        write_model(path, seed, **more)
    return data, emoji.trained_models(work, Space.of_data(data.prepared("train"))), work


def test_parts_without_comfyui(place, tmp_path, monkeypatch):
    data, models, work = place
    names = [(each.name, each.seed) for each in models]
    assert names == [("fm", 0), ("k8", 0), ("k8", 1), ("large_fm", 0)]
    monkeypatch.setattr(emoji, "STEPS", (1, 2))
    monkeypatch.setattr(emoji, "SOLVERS", ("euler", "gm-ode"))
    monkeypatch.setattr(emoji, "ROUNDS", 2)
    monkeypatch.setattr(emoji, "SHIPPED", "k8")
    with pytest.raises(SystemExit, match="run --only steps first"):
        emoji.neighbours(data, models, work, tmp_path)
    emoji.steps(data, models, work, tmp_path)
    floor, *rows = table(tmp_path / "emoji_steps.csv")
    assert floor["model"] == "held-out pictures"
    assert float(floor["class_accuracy"]) > 0.9  # by their own labels
    white = [row for row in rows if row["solver"] == emoji.WHITE]
    assert len(white) == (2 + 1) * 2  # the models with a spectrum, and their means
    assert len(rows) - len(white) == (4 + 3) * 2 * 2  # each model, and the means of each kind
    pair, [mean] = (
        [r for r in rows if kind(r) == ("k8", "gm-ode", "2") and (r["seed"] == "mean") == is_mean]
        for is_mean in (False, True)
    )
    values = [float(row["frechet_distance"]) for row in pair]
    assert float(mean["frechet_distance"]) == pytest.approx(sum(values) / 2)
    assert [float(mean["low"]), float(mean["high"])] == sorted(values)
    emoji.likelihood(data, models, work, tmp_path)
    first, second, _, large, *_ = table(tmp_path / "emoji_likelihood.csv")
    assert float(first["difference"]) == float(large["difference"]) == 0  # of each size
    difference = float(second["nll"]) - float(first["nll"])
    assert float(second["difference"]) == pytest.approx(difference)
    assert (second["fewer"], second["difference_to_fewer"]) == ("fm", second["difference"])
    emoji.neighbours(data, models, work, tmp_path)
    rows = table(tmp_path / "emoji_neighbours.csv")
    held_out = [row for row in rows if row["pictures"] == "held-out pictures"]
    assert len(rows) == 2 * (2 + len(emoji.SPOILED))
    assert all(float(row["share_below_1"]) <= 1 / 24 for row in held_out)
    moved = [row for row in rows if row["pictures"] == "copies, half the resolution"]
    assert float(moved[0]["median"]) < float(held_out[0]["median"])  # it is their own original
    assert Image.open(work / "emoji_neighbours.png").size[1] == 3 * (6 * (48 + 2) + 2)
    with monkeypatch.context() as later:  # a second start keeps the figures
        later.setattr(emoji, "Evaluation", None)
        emoji.steps(data, models, work, tmp_path)


@inside_comfyui
def test_parts_inside_comfyui(place, tmp_path, monkeypatch):
    data, models, work = place
    found = [{"sampler": name, "scheduler": "simple", "calls": 3} for name in ("euler", "heun")]
    searches = []
    monkeypatch.setattr(emoji, "screened", lambda *_, **calls: searches.append(calls) or found)
    monkeypatch.setattr(emoji, "STOCK_CALLS", (3,))
    with pytest.raises(SystemExit, match="emoji_large_k8_seed0"):
        emoji.guidance(data, models[:3], work, tmp_path)
    models = [*(dataclasses.replace(each, name="large_k8") for each in models[1:3]), models[0]]
    ours = [row for row in emoji.ours(data.count, (0.5,)) if row["calls"] == 2]
    monkeypatch.setattr(emoji, "ours", lambda *_: ours)
    monkeypatch.setattr(
        emoji, "GUIDED", {"": (1.0, 3.0), "APG, eta 0": (2.0,), "probabilistic": (0.3,)}
    )
    emoji.stock(data, models, work, tmp_path)
    _, *rows = table(tmp_path / "emoji_stock.csv")
    assert {row["sampler"] for row in rows if row["model"] == "fm"} == {"uni_pc"}
    assert searches == [{"calls": (3,)}]  # on the first seed
    assert {row["seeds"] for row in rows if row["model"] == "large_k8"} == {"", "2"}
    rows = [row for row in rows if row["model"] == "large_k8"]
    steps = {(row["sampler"], row["calls"]): row["steps"] for row in rows if row["seed"] == "0"}
    assert (steps["uni_pc", "3"], steps["euler", "3"], steps["heun", "3"]) == ("3", "3", "2")
    assert {row["mixture"] for row in rows if row["sampler"] == "gm_sde"} == {"", "True"}
    emoji.guidance(data, models, work, tmp_path)
    _, *rows = table(tmp_path / "emoji_guidance.csv")
    own = [row for row in rows if row["sampler"] == "gm_ode" and row["seed"] == "0"]
    assert len({row["frechet_distance"] for row in own}) == 4  # each kind has an effect


def test_the_best_of_few_samples_are_found(monkeypatch):
    monkeypatch.setattr(stock, "stock_names", lambda: ["euler", "heun", "long"])
    monkeypatch.setattr(stock, "BEST", 2)
    steps = {"euler": 0, "heun": 1, "long": 9}  # of the latter, no number fits into the calls

    def compare(settings):
        return [
            {
                **row,
                "figure": 10 * row["calls"] - steps[row["sampler"]] - len(row["scheduler"]),
                "calls": row["calls"] + (row["sampler"] == "long"),
            }
            for row in settings
        ]

    assert stock.screened(compare, 5, "figure", calls=(2, 4)) == [
        {"sampler": name, "scheduler": "sgm_uniform", "calls": calls}
        for calls in (2, 4)
        for name in ("heun", "euler")
    ]


def test_a_picture_among_the_training_pictures_is_nearest_to_itself(place):
    data, _, _ = place
    real = emoji.pixels(data.train[0])
    distances, places = emoji.nearest(real[5:9], real)
    assert places.tolist() == [5, 6, 7, 8]
    assert distances.max() < 1e-3
    shifted = (data.train[0][:1].int() + 51).clamp(max=255).to(torch.uint8)
    one = emoji.pixels(shifted) - real[:1]
    assert one.norm() <= 0.2 + 1e-6  # root mean square of the values in [0, 1]


def test_means_have_the_lowest_and_the_highest_of_the_seeds():
    rows = [
        {"model": "a", "seed": seed, "figure": figure, "other": other}
        for seed, figure, other in ((0, 3.0, 1.0), (1, 5.0, None))
    ]
    assert means_of([*rows, {"model": "b", "figure": 1.0}], ("model",), "figure", "other") == [
        {"model": "a", "seed": "mean", "seeds": 2, "figure": 4.0, "low": 3.0, "high": 5.0},
        {"model": "b", "seed": "mean", "seeds": 1, "figure": 1.0, "low": 1.0, "high": 1.0},
    ]


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def kind(row: dict[str, str]) -> tuple[str, str, str]:
    """Return model, solver and steps of a row."""
    return row["model"], row["solver"], row["steps"]
