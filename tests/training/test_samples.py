"""What goes into and comes out of an evaluation: students' settings, exports, given samples."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmflow_core import load_checkpoint, sample_images
from gmflow_core.flow.path import flow_sigmas
from tests.training.evaluation_runs import CLASSES, arguments, write_model, write_place
from training.data.shards import to_pixels
from training.evaluate import parse
from training.evaluation.evaluation import Evaluation
from training.evaluation.models import image_labels, image_seeds


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with training and test data, a model, and trained features."""
    return write_place(tmp_path_factory.mktemp("samples"))


FEW = {"steps": 3, "shift": 2.0, "final_step_size": 0.5, "temperature": 0.4, "policy": "GMFlow"}


def test_a_student_is_sampled_as_it_was_made(place, tmp_path):
    """Take its own solver, steps, shift, last step and temperature, unless others are given."""
    record = {"labels": CLASSES, "space": "pixels", "few_steps": FEW}
    path = write_model(tmp_path / "student.safetensors", data=record)
    network, seeds = load_checkpoint(path)[0], image_seeds(0, range(20))
    for more, solver, steps in (([], "gm-policy", 3), (["--steps", "2"], "gm-policy", 2)):
        out = tmp_path / str(steps)
        given = [*arguments(place, out), "--checkpoint", str(path)]
        at = given.index("--steps")
        [row] = Evaluation(parse([*given[:at], *given[at + 2 :], *more])).run()["results"]
        assert (row["solver"], row["steps"], row["substeps"]) == (solver, steps, 128)
        expected = sample_images(
            network,
            image_labels(seeds, 2),
            solver=solver,
            sigmas=flow_sigmas(steps, 2.0, final_step_size=0.5),
            shift=2.0,
            temperature=0.4,
            seeds=seeds,
        )
        [chunk] = out.glob("samples/*/chunk-00000.safetensors")
        difference = load_file(chunk)["images"].int() - to_pixels(expected).int()
        assert difference.abs().max() <= 1
        assert torch.unique(load_file(chunk)["images"]).numel() > 10
