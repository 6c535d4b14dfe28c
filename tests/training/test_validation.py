"""Distances of samples during training: --validate-every, and what is logged to wandb."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmflow_core.sampling.images import sample_images
from tests.training.image_runs import new_trainer, write_colours, write_features
from tests.training.test_distill import new_trainer as new_student
from tests.training.test_distill import teacher_file
from training.data.shards import LatentDataset, to_pixels
from training.evaluation.classifier import ClassifierFeatures
from training.evaluation.metrics import frechet_distance, measure, statistics
from training.evaluation.models import class_shares, image_labels, image_seeds
from training.loop.distill_presets import DistillConfig
from training.loop.image_presets import ImageConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def features(tmp_path_factory, data):
    return write_features(tmp_path_factory.mktemp("features"), data)


def points_of(out, name="frechet_distance"):
    """Return steps and values of a curve."""
    events = EventAccumulator(str(out))
    events.Reload()
    return {point.step: point.value for point in events.Scalars(name)}


def test_a_run_with_validation_has_the_losses_of_one_without(data, features, tmp_path):
    """And the distance is the one that its samples have."""
    more = ["--validate-every", "2", "--validate-count", "20", "--features", str(features)]
    quick = ["--picture-solver", "gm-sde", "--log-every", "1"]
    one = new_trainer(data, tmp_path / "with", 3, *quick, *more)
    other = new_trainer(data, tmp_path / "without", 3, *quick)
    one.run()
    other.run()
    for (name, a), (_, b) in zip(
        one.model.named_parameters(), other.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    found = points_of(tmp_path / "with")
    assert list(found) == [2, 3]
    assert points_of(tmp_path / "with", "loss") == points_of(tmp_path / "without", "loss")
    seeds, extractor = image_seeds(0, range(20)), ClassifierFeatures.load(features)
    model, pictures = one.sampling_model(), LatentDataset(data)
    labels = image_labels(seeds, 3, class_shares(pictures.labels, 3))
    samples = sample_images(model, labels, solver="gm-sde", seeds=seeds)
    real = torch.stack([pictures[i][0] for i in range(len(pictures))])
    here, there = (statistics(measure(to_pixels(x), extractor).features) for x in (samples, real))
    assert found[3] == pytest.approx(frechet_distance(here, there), rel=1e-4)
    assert one.figures == pytest.approx({"frechet_distance": found[3]})
    rare = new_trainer(data, tmp_path / "rare", 1, *quick, *more, "--validate-every", "5")
    rare.run()
    assert list(points_of(tmp_path / "rare")) == [1]


def test_students_are_validated_by_the_same_code(data, features, tmp_path):
    """With each picture, if --features is given alone; never with 0."""
    more = ["--features", str(features), "--reference", str(data), "--picture-every", "1"]
    more += ["--validate-count", "20"]
    teacher = teacher_file(tmp_path)
    student = new_student(teacher, tmp_path / "out", 2, *more)
    student.run()
    assert list(points_of(tmp_path / "out")) == [1, 2]
    assert student.figures.keys() == {"frechet_distance", "teacher_distance"}
    none = new_student(teacher, tmp_path / "none", 4, *more, "--validate-every", "0")
    assert none.validation is None


def test_samples_that_are_not_finite_have_no_distance(data, features, tmp_path):
    trainer = new_trainer(data, tmp_path, 5, "--features", str(features))
    for bad in (0, 700):

        def draw(model, images, bad=bad):
            x = torch.zeros(len(images), 3, 4, 4)
            return (
                x.index_fill(0, torch.tensor([bad - images.start]), torch.nan)
                if (bad in images)
                else x
            )

        assert np.isnan(trainer.validation.figures(None, draw)["frechet_distance"])


def test_what_cannot_be_validated_is_refused(data, features, tmp_path):
    for config, setting in ((DistillConfig, {"validate_every": 5}), (ImageConfig, {})):
        with pytest.raises(ValueError, match="--validate-count is 1"):
            config(validate_count=1, **setting)
    with pytest.raises(ValueError, match="--validate-every is 5; it must be given together with"):
        DistillConfig(validate_every=5)
    for setting in ({"reference": Path("x")}, {"reference_count": 9}, {"validate_count": 50}):
        option = f"--{next(iter(setting)).replace('_', '-')}"
        with pytest.raises(ValueError, match=f"{option} has no effect without --features or --val"):
            ImageConfig(**setting)
    given = {"features": "f.safetensors", "inception_weights": Path("x")}
    with pytest.raises(ValueError, match="--inception-weights has no effect with --features f"):
        ImageConfig(**given)
    with pytest.raises(FileNotFoundError, match=r"no nowhere\.safetensors .*training\.evaluate"):
        new_trainer(data, tmp_path, 5, "--features", "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no reference nowhere"):
        new_trainer(data, tmp_path, 5, "--features", str(features), "--reference", "nowhere")


class Recorder:
    """Stand-in for wandb, which is not installed with the tests: it keeps what it is given."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1

    Image = staticmethod(lambda pixels: SimpleNamespace(pixels=pixels))


def test_wandb_gets_what_tensorboard_gets(data, tmp_path, monkeypatch):
    """In one run, also after a stop; --restart begins another."""
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    every = ["--log-every", "1", "--picture-every", "1", "--picture-solver", "gm-sde"]
    for iterations, more in ((1, []), (2, []), (1, ["--restart"])):
        new_trainer(data, tmp_path, iterations, "--wandb", *every, *more).run()
    first, second, third = (each["id"] for each in wandb.started)
    assert first == second != third
    assert wandb.finished == 3
    assert wandb.started[0]["config"]["batch_size"] == 16
    losses = [(each["iteration"], each["loss"]) for each in wandb.logged if "loss" in each]
    assert [step for step, _ in losses] == [1, 2, 1]
    assert points_of(tmp_path, "loss") == {1: pytest.approx(losses[2][1])}
    pictures = [each["samples"].pixels for each in wandb.logged if "samples" in each]
    assert len(pictures) == 3
    assert pictures[0].dtype == np.uint8
    assert pictures[0].shape[2] == 3
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):  # before all else
        new_trainer(data, tmp_path / "none", 5, "--wandb", "--features", "nowhere.safetensors")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(ValueError, match=r"wandb does not start .*wandb login"):
        new_trainer(data, tmp_path / "none", 5, "--wandb").run()
