"""Test training with a mixture source: noise of modes, tokens, weights, and what does not fit."""

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import split

import pytest
import torch
from safetensors.torch import save_file

from gmflow_core import (
    GaussianMixtureSource,
    load_source,
    read_metadata,
    save_source,
)
from tests.training.image_runs import SMALL, losses_of, write_colours
from training.data.shards import LatentDataset
from training.data.tokens import SETTINGS, WithTokens, digest_of, write_tokens
from training.imagenet import parse
from training.loop.image_trainer import ImageTrainer
from training.loop.mode_weights import ModeWeights


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(data) -> Path:
    """Write a source of three modes, one for each colour."""
    x, labels = LatentDataset(data).__getitems__(range(48))
    means = torch.stack([x[labels == label].mean(0) for label in range(3)])
    save_source(
        GaussianMixtureSource(means, torch.full((3, 1, 1, 1), 0.2), torch.full((3,), 1 / 3).log()),
        data / "source.safetensors",
    )
    return data / "source.safetensors"


def modes_trainer(data: Path, source: Path, out: Path, *more: str) -> ImageTrainer:
    given = ["--preset", "digits_modes", *SMALL, "--data", str(data)]
    given += ["--source", str(source), "--out", str(out)]
    return ImageTrainer(parse([*given, "--iterations", "10", "--picture-every", "5", *more]))


def test_noise_comes_from_the_samples_mode_which_is_its_label(data, source, tmp_path):
    trainer = modes_trainer(data, source, tmp_path)
    x0, labels = trainer.dataset.__getitems__(range(16))
    assert torch.equal(trainer.draw_modes(x0, range(16)), labels)  # colours lie far apart
    independent = modes_trainer(data, source, tmp_path / "independent", "--coupling", "independent")
    shares = torch.cat([independent.draw_modes(torch.cat([x0] * 40), range(640))]).bincount() / 640
    assert (shares - 1 / 3).abs().max() < 0.08
    seen = {}
    trainer.prepared.register_forward_pre_hook(
        lambda _, args: seen.update(labels=args[1], moments=args[5], x0=args[0])
    )
    trainer.iterate()
    assert (seen["moments"][0] - seen["x0"]).square().mean() < 0.05
    assert torch.equal(seen["moments"][0].mean((2, 3)).argmax(1), seen["labels"])
    trainer.run()
    record = {"num_modes": 3, "shape": [3, 4, 4], "coupling": "soft", "conditioning": "mode"}
    assert read_metadata(trainer.path)["data"]["source"] == {
        **record,
        "digest": load_source(source).digest,
    }
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


FLOW_MATCHING = split("-k 1 --constant-log-std 0 --transition-ratio None")
DITDH = split("--network ditdh --patch-size 1 --ddt-layers 1 --ddt-width 32 --ddt-heads 2")


@pytest.mark.parametrize(
    "more",
    [
        [*FLOW_MATCHING, "--mode-weighting"],
        [*FLOW_MATCHING, "--no-mode-conditional", "--class-dropout", "0.2"],
        DITDH,
    ],
)
def test_runs_with_a_source_resume_exactly(more, data, source, tmp_path, monkeypatch):
    monkeypatch.setattr(ModeWeights, "WARMUP", 3)
    whole = modes_trainer(data, source, tmp_path / "whole", *more)
    losses = losses_of(whole, 8)
    stopped = modes_trainer(data, source, tmp_path / "stopped", *more)
    losses_of(stopped, 5)
    stopped.save()
    assert losses_of(modes_trainer(data, source, tmp_path / "stopped", *more), 3) == losses[5:]


def test_focal_weights_grow_with_the_loss_of_a_mode():
    weights, modes = ModeWeights(3), torch.tensor([0, 0, 0, 1, 2])
    assert torch.equal(weights(modes, 0), torch.ones(5))
    weights.update(modes, torch.full((5,), 7.0), lambda sums: sums)
    assert weights(modes, 10**4) == pytest.approx(torch.ones(5))  # however often they come
    for _ in range(20_000):
        weights.update(modes, torch.tensor([1.0, 3.0, 2.0, 1.0, torch.nan]), lambda sums: sums)
    assert weights.losses == pytest.approx(torch.tensor([2.0, 1.0, 7.0]), rel=0.03)
    focal = torch.tensor([4.0, 1.0, 49.0]) / 18
    assert weights(torch.arange(3), 10**4) == pytest.approx(focal.clamp(0.3, 3), rel=0.05)


def test_tokens_choose_the_modes(data, source, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    _, labels = LatentDataset(data).__getitems__(range(48))
    tokens = torch.eye(3)[labels.roll(1)]  # of other colours than their own
    save_file({"tokens": tokens}, folder / "tokens.safetensors", {"format": "gmflow-tokens-1"})
    assigner = GaussianMixtureSource(
        torch.eye(3), torch.full((3, 1), 0.1), torch.full((3,), 1 / 3).log()
    )
    save_source(replace(load_source(source), assigner=assigner), folder / "source.safetensors")
    trainer, seen = modes_trainer(folder, folder / "source.safetensors", tmp_path / "out"), {}
    trainer.prepared.register_forward_pre_hook(
        lambda _, args: seen.update(labels=args[1], x0=args[0])
    )
    trainer.iterate()
    colours = seen["x0"].mean((2, 3)).argmax(1)
    assert torch.equal(seen["labels"], (colours - 1) % 3)


def write_with_tokens(
    data: Path, source: Path, folder: Path, tokens: torch.Tensor, facts: dict, made: dict
) -> Path:
    """Copy the data, with these tokens and a source with an assigner; return the source's path.

    Args:
        facts: how the source was fitted.
        made: how the tokens were made.
    """
    shutil.copytree(data, folder)
    write_tokens(folder / "tokens.safetensors", tokens, made)
    assigner = GaussianMixtureSource(
        torch.eye(3), torch.full((3, 1), 0.1), torch.full((3,), 1 / 3).log()
    )
    path = folder / "source.safetensors"
    save_source(replace(load_source(source), assigner=assigner), path, facts=facts)
    return path


def test_tokens_of_another_encoder_are_refused(data, source, tmp_path):
    facts = {"encoder": "dinov2", "encoder_size": None, "image_size": 256}
    made = dict(zip(SETTINGS, ("facebook/dinov2-with-registers-base", None, 256), strict=True))
    tokens = torch.eye(3)[torch.arange(48) % 3]
    path = write_with_tokens(data, source, tmp_path / "same", tokens, {"config": facts}, made)
    modes_trainer(path.parent, path, tmp_path / "out").iterate()
    other = {**made, "encoder": "facebook/vit-mae-base", "size": None}
    for folder, made_by in (
        ("encoder", {"config": {**facts, "encoder": "mae"}}),
        ("file", {"config": {}, "tokens": other}),
    ):
        path = write_with_tokens(
            data, source, tmp_path / folder, tokens, made_by, {**made, "size": 224}
        )
        with pytest.raises(
            ValueError,
            match=r"tokens of encoder \S+dinov2\S+, size 224, but .* of encoder \S+mae-base",
        ):
            modes_trainer(path.parent, path, tmp_path / f"{folder}_out")


def test_other_tokens_without_a_record_are_refused(data, source, tmp_path):
    """The source knows the digest of those that it was fitted to."""
    tokens = torch.eye(3)[torch.arange(48) % 3]
    facts = {"config": {}, "tokens": {"count": 48, "digest": digest_of([tokens])}}
    path = write_with_tokens(data, source, tmp_path / "same", tokens, facts, {})
    file = path.parent / "tokens.safetensors"
    save_file({"tokens": tokens}, file)
    modes_trainer(path.parent, path, tmp_path / "out").iterate()
    save_file({"tokens": tokens.flip(0)}, file)
    with pytest.raises(ValueError, match="holds other tokens than those that"):
        modes_trainer(path.parent, path, tmp_path / "other")


def mapped(path: Path) -> list[range]:
    """Return the addresses that a file is mapped to in this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [
        range(*(int(end, 16) for end in line[0].split("-")))
        for line in lines
        if line[-1] == str(path)
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux only")
def test_tokens_are_mapped_and_looked_at(data, source, tmp_path):
    tokens = torch.eye(3)[torch.arange(48) % 3]
    path = write_with_tokens(data, source, tmp_path / "data", tokens, {}, {})
    samples = WithTokens(LatentDataset(path.parent))
    for each in (samples, pickle.loads(pickle.dumps(samples))):  # noqa: S301
        assert torch.equal(each.__getitems__([3, 1])[2], tokens[[3, 1]])
        assert any(
            each.tokens.data_ptr() in addresses
            for addresses in mapped(path.parent / "tokens.safetensors")
        )
    tokens[[2, 47], 1] = torch.tensor([torch.nan, torch.inf])
    path = write_with_tokens(data, source, tmp_path / "broken", tokens, {}, {})
    with pytest.raises(ValueError, match=r"rows 2, 47 of .*tokens\.safetensors are not finite"):
        modes_trainer(path.parent, path, tmp_path / "out")


HIDDEN = ["--no-mode-conditional", *FLOW_MATCHING]


@pytest.mark.parametrize(
    ("more", "noted"),
    [
        ([*HIDDEN, "--class-dropout", "0.1"], True),
        ([*HIDDEN, "--class-dropout", "1"], False),
        ([*HIDDEN, "--coupling", "independent"], False),
        ([], False),
    ],
)
def test_classes_beside_hidden_modes_are_noted(more, noted, data, source, tmp_path, capsys):
    trainer = modes_trainer(data, source, tmp_path, *more)
    assert ("note: a sample's noise" in capsys.readouterr().out) == noted
    if trainer.config.class_dropout == 1:
        labels, *_ = trainer.draw(torch.zeros(4096, dtype=torch.long), (3, 4, 4), range(4096))
        assert set(labels.tolist()) == {3}
        assert trainer.draw_picture(trainer.sampling_model()) is not None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no-mode-conditional"], r"--transition-ratio .* must be None with --source, unless"),
        (["--mode-weighting"], r"--mode-weighting .* must be off for a mixture"),
        (["--spectrum-layers", "8"], r"--spectrum-layers .* must be None with --source"),
    ],
)
def test_settings_that_a_source_does_not_go_with(more, message, data, source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        modes_trainer(data, source, tmp_path, *more)
    assert re.search(message, " ".join(capsys.readouterr().err.replace("│", " ").split()))


def test_a_run_goes_on_with_its_own_source_only(data, source, tmp_path):
    modes_trainer(data, source, tmp_path).save()
    again = load_source(source)
    save_source(replace(again, means=again.means + 0.1), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"was trained with a source of 3 modes .* give that one"):
        modes_trainer(data, tmp_path / "other.safetensors", tmp_path)


def test_a_source_of_another_shape_is_refused(data, source, tmp_path):
    other = GaussianMixtureSource(
        torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 1, 1), torch.full((2,), 0.5).log()
    )
    save_source(other, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"samples are \(3, 8, 8\), but the latents are \(3, 4, 4\)"
    ):
        modes_trainer(data, tmp_path / "other.safetensors", tmp_path)
