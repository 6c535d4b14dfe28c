"""Evaluation of models with a mixture source."""

from pathlib import Path

import pytest
import torch

from gmflow_core import (
    GaussianMixtureSource,
    save_source,
)
from tests.training.evaluation_runs import (
    arguments,
    run,
    write_model,
    write_place,
)
from training.evaluate import parse
from training.evaluation.evaluation import Evaluation
from training.evaluation.models import image_modes, image_seeds


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with training and test data, a model, and trained features."""
    return write_place(tmp_path_factory.mktemp("evaluate"))


def test_models_of_a_mixture_source(place, tmp_path):
    source = GaussianMixtureSource(
        0.3 * torch.randn(5, 3, 8, 8), torch.full((5, 1, 1, 1), 0.5), torch.full((5,), 0.2).log()
    )
    save_source(source, tmp_path / "source.safetensors")
    about = {
        "space": "pixels",
        "source": {"num_modes": 5, "shape": [3, 8, 8], "coupling": "soft", "conditioning": "mode"},
    }
    model = write_model(tmp_path / "modes.safetensors", data=about, num_classes=5)
    weak = write_model(tmp_path / "weak.safetensors", seed=1, data=about, num_classes=5)
    with pytest.raises(
        ValueError, match=r"modes.safetensors was trained with a mixture source; give --source"
    ):
        run(place, tmp_path / "out", "--checkpoint", str(model))
    with pytest.raises(
        ValueError,
        match=r"tiny.safetensors was trained without a mixture source; leave the source out",
    ):
        run(place, tmp_path / "out", "--source", str(tmp_path / "source.safetensors"))
    more = ["--checkpoint", str(model), "--source", str(tmp_path / "source.safetensors")]
    [row] = run(place, tmp_path / "out", *more)["results"]
    assert row["frechet_distance"] > 0
    assert row["class_accuracy"] is None  # modes are no classes
    [guided] = run(place, tmp_path / "guided", *more, "--guide", str(weak))["results"]
    [idle] = run(place, tmp_path / "idle", *more, "--guide", str(weak), "--guide-scale", "1")[
        "results"
    ]
    assert idle["frechet_distance"] == pytest.approx(row["frechet_distance"], rel=1e-3)
    assert guided["frechet_distance"] != pytest.approx(row["frechet_distance"], rel=1e-3)
    [early] = run(place, tmp_path / "early", *more, "--end", "0.3")["results"]
    assert early["frechet_distance"] != pytest.approx(row["frechet_distance"], rel=1e-3)
    given = arguments(
        place,
        tmp_path / "alone",
        *more,
        "--reference",
        str(place / "train"),
        "--test-data",
        str(place / "test"),
    )
    at = given.index("--data")
    report = Evaluation(
        parse(given[:at] + given[at + 2 :])
    ).run()  # without the data, whose classes it does not know
    assert report["results"][0]["frechet_distance"] == pytest.approx(
        row["frechet_distance"], rel=1e-4
    )
    assert report["floor"]["frechet_distance"] < row["frechet_distance"]
    other = write_model(
        tmp_path / "other.safetensors",
        data={**about, "source": {**about["source"], "conditioning": "hidden"}},
    )
    with pytest.raises(
        ValueError, match="have other labels; a guide is told what the model is told"
    ):
        run(place, tmp_path / "wrong", *more, "--guide", str(other))
    with pytest.raises(
        ValueError, match=r"--unlabelled does not go with .*whose labels are the modes"
    ):
        run(place, tmp_path / "wrong", *more, "--unlabelled")


def test_modes_say_nothing_of_the_noise():
    source = GaussianMixtureSource(
        torch.zeros(8, 2), torch.ones(8, 1), torch.full((8,), 1 / 8).log()
    )
    seeds = image_seeds(0, range(2000))
    modes = image_modes(seeds, source)
    noise = torch.stack(
        [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    among = torch.stack([noise.square()[modes == mode].mean(0) for mode in range(8)])
    assert (among - 1).abs().max() < 0.45  # 250 of each: five standard errors
