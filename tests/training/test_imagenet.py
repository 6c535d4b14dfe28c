"""Test the trainer of images: learning, exact resume, several processes, bad steps."""

import functools
import json
import signal
import time
from pathlib import Path
from shlex import split

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmflow_core import (
    load_checkpoint,
    read_metadata,
)
from gmflow_core.files.checkpoint import load_training_state
from gmflow_core.sampling.images import sample_images
from tests import forked
from tests.helpers import Waits
from tests.training.image_runs import (
    SMALL,
    arguments,
    losses_of,
    new_trainer,
    write_colours,
    write_features,
)
from training.data.shards import FORMAT, write_index, write_shard
from training.imagenet import main, parse
from training.loop.image_presets import PRESETS
from training.loop.image_trainer import ImageTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("preset", ["digits", "digits_flow_matching"])
def test_loss_falls(preset, data, tmp_path):
    given = ["--preset", preset, *SMALL[:8], *SMALL[10:], "--data", str(data)]
    given += ["--out", str(tmp_path), "--lr", "3e-3", "--batch-size", "48"]
    trainer = ImageTrainer(parse([*given, "--lr-schedule", "constant"]))
    losses = losses_of(trainer, 40)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert (trainer.model.spectrum_net is None) == (preset == "digits_flow_matching")


def test_resumes_after_sigkill_to_the_same_weights(data, tmp_path):
    whole = new_trainer(data, tmp_path / "whole", 25)
    whole.run()
    given = arguments(data, tmp_path / "killed", 25)
    process = forked.Process("-c", SLOW_STEPS, *given, environment={"OMP_NUM_THREADS": threads()})
    checkpoint = tmp_path / "killed" / "model.safetensors"
    try:
        deadline = time.time() + 120
        while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = new_trainer(data, tmp_path / "killed", 25)
    assert 0 < resumed.step < 25, "the run was killed too late to test anything"
    resumed.run()
    expected, found = (load_file(t.path) for t in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


SLOW_STEPS = """
import time
from training.imagenet import main
from training.loop.image_trainer import ImageTrainer
iterate = ImageTrainer.iterate
ImageTrainer.iterate = lambda self: (time.sleep(0.1), iterate(self))[1]
main()
"""


def threads() -> str:
    return str(torch.get_num_threads())


TWO_PROCESSES = """
import json, sys
from training.imagenet import parse
from training.loop.image_trainer import ImageTrainer
arguments, count = sys.argv[2:], int(sys.argv[1])
trainer = ImageTrainer(parse(arguments))
accelerator, losses = trainer.accelerator, []
for _ in range(count):
    losses.append(accelerator.reduce(trainer.iterate()["loss"], "mean").item())
trainer.save()
figures = trainer.validation.figures(trainer.looked_at(), trainer.draw_samples)
if accelerator.is_main_process:
    found = json.dumps([accelerator.num_processes, losses, figures])
    (trainer.config.out / "losses.json").write_text(found)
"""


OLD_TORCH = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="FSDP on CPUs needs torch 2.7: the streams of 2.6 record no events",
)


@pytest.mark.parametrize(
    "how", [[], pytest.param(["--accumulate", "2", "--shard"], marks=OLD_TORCH)]
)
def test_two_processes_have_the_losses_of_one(how, data, tmp_path):
    """Train with gloo: DDP from the start; FSDP, two pieces each, from one process's checkpoint.

    They measure the distance of their samples together.
    """
    check = ["--validate-count", "25", "--features", str(write_features(tmp_path, data))]
    one = new_trainer(data, tmp_path / "two", 20, *check)
    losses = losses_of(one, 3)
    if how:
        one.save()
        losses = []
    losses += losses_of(one, 3)
    given = [len(losses), *arguments(data, tmp_path / "two", 20, *check), *how]
    for _, said, status in forked.run_ranks("-c", TWO_PROCESSES, *given):
        assert status == 0, said
    processes, found, figures = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert processes == 2
    alone = one.validation.figures(one.looked_at(), one.draw_samples)
    assert figures == pytest.approx(alone, rel=1e-3)
    assert found == pytest.approx(losses, rel=1e-5)
    again = new_trainer(data, tmp_path / "two", 20)  # and back in one process
    assert again.step == 6
    expected = dict(one.sampling_model().named_parameters())
    assert all(
        torch.allclose(p, expected[name], atol=1e-5)
        for name, p in again.sampling_model().named_parameters()
    )
    assert losses_of(again, 2) == pytest.approx(losses_of(one, 2), rel=1e-4)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(data, tmp_path, monkeypatch):
    trainer = new_trainer(data, tmp_path, 12)
    losses_of(trainer, 2)
    weights, average = (
        [p.clone() for p in trainer.model.parameters()],
        [a.clone() for a in trainer.average],
    )
    draw = trainer.draw
    monkeypatch.setattr(
        trainer, "draw", lambda *a: (*draw(*a)[:2], *(t * float("nan") for t in draw(*a)[2:]))
    )
    trainer.iterate()
    trainer.count_skipped()
    assert (trainer.step, trainer.skipped.total) == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    towards = [a.lerp(w, 1 - trainer.decay(3)) for a, w in zip(average, weights, strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(towards, trainer.average, strict=True))
    monkeypatch.undo()
    trainer.run()
    assert (trainer.step, trainer.skipped.total) == (12, 1)
    assert read_metadata(trainer.path)["training"]["skipped_steps"] == 1
    assert new_trainer(data, tmp_path, 20).skipped.total == 1


def test_a_run_without_finite_gradients_ends_with_its_last_good_state(data, tmp_path, monkeypatch):
    trainer = new_trainer(data, tmp_path, 40)
    draw = trainer.draw

    def nan(*a):
        poison = float("nan") if trainer.step >= 7 else 1
        return (*draw(*a)[:2], *(t * poison for t in draw(*a)[2:]))

    monkeypatch.setattr(trainer, "draw", nan)
    with pytest.raises(
        FloatingPointError, match=r"10 steps in a row.*model\.safetensors still holds the last good"
    ):
        trainer.run()
    network, _ = load_checkpoint(trainer.path)
    facts = read_metadata(trainer.path)[
        "training"
    ]  # skipped steps leave the weights as they were, so it went on being saved
    assert (facts["step"], facts["skipped_steps"]) == (15, 8)
    assert all(p.isfinite().all() for p in network.parameters())
    saved = load_training_state(trainer.path)
    assert all(
        torch.equal(p, saved[f"model.{name}"]) for name, p in trainer.model.named_parameters()
    )


def test_a_short_run_that_learned_nothing_leaves_no_model(data, tmp_path, monkeypatch):
    trainer = new_trainer(data, tmp_path, 4)
    draw = trainer.draw
    infinite = lambda *a: (*draw(*a)[:2], *(t / 0 for t in draw(*a)[2:]))  # noqa: E731
    monkeypatch.setattr(trainer, "draw", infinite)
    with pytest.raises(FloatingPointError, match=r"4 steps in a row.*nothing is saved yet"):
        trainer.run()
    assert not trainer.path.exists()


def test_a_run_leaves_pictures_curves_and_a_model_to_share(data, tmp_path, capsys):
    given = arguments(data, tmp_path, 10)
    main([*given, "--picture-every", "5", "--picture-solver", "gm-sde"])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("loss", "nll", "spectral", "learning_rate", "skipped_steps"):
        assert [point.step for point in events.Scalars(name)] == [5, 10]
    assert len(events.Images("samples")) == 2
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "0000005.png",
        "0000010.png",
    ]
    network, config = load_checkpoint(tmp_path / "weights.safetensors")
    assert (config.num_classes, config.channels, config.latent_size, config.num_components) == (
        3,
        3,
        4,
        3,
    )
    metadata = read_metadata(tmp_path / "weights.safetensors")
    assert metadata["data"] == {"labels": ["red", "green", "blue"], "space": "pixels"}
    assert metadata["training"]["step"] == 10
    assert sample_images(network, torch.tensor([0, 3]), steps=2).isfinite().all()
    assert "weights.safetensors" in capsys.readouterr().out


def test_what_does_not_belong_together_is_refused(data, tmp_path):
    new_trainer(data, tmp_path / "run", 10).save()
    with pytest.raises(ValueError, match=r"another shape \(num_components: 3 there, 4 here\)"):
        new_trainer(data, tmp_path / "run", 10, "-k", "4")
    with pytest.raises(ValueError, match=r"lr: 0\.001 there, 0\.01 here.*--restart"):
        new_trainer(data, tmp_path / "run", 10, "--lr", "0.01")
    with pytest.raises(
        ValueError, match="--batch-size 15 cannot be divided among 1 processes with 2 pieces"
    ):
        new_trainer(data, tmp_path / "other", 10, "--batch-size", "15", "--accumulate", "2")
    with pytest.raises(FileNotFoundError, match=r"training\.prepare"):
        new_trainer(tmp_path / "nothing", tmp_path / "other", 10)


def test_the_command_ends_in_a_line_when_memory_runs_out_or_it_is_stopped(
    data, tmp_path, monkeypatch, capsys
):
    iterate = ImageTrainer.iterate

    def too_large(self):
        raise torch.OutOfMemoryError("out of memory")

    def stopped(self):
        if self.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return iterate(self)

    monkeypatch.setattr(ImageTrainer, "iterate", too_large)
    with pytest.raises(SystemExit, match=r"error: out of memory; .*give --accumulate a larger"):
        main(arguments(data, tmp_path, 10))
    monkeypatch.setattr(ImageTrainer, "iterate", stopped)
    with pytest.raises(SystemExit, match="130"):
        main(arguments(data, tmp_path, 10))
    assert "stopped at iteration 7; run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "weights.safetensors").exists()
    assert new_trainer(data, tmp_path, 10).step == 7


def test_eight_bit_adamw_resumes_exactly(data, tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = new_trainer(
        data, tmp_path, 20, "--optimizer", "adamw8bit", "--head-dim", "40"
    )  # large enough for 8-bit state
    losses_of(trainer, 3)
    trainer.save()
    assert any(t.dtype == torch.uint8 for k, t in load_file(trainer.path).items() if "state1" in k)
    expected = losses_of(trainer, 3)
    assert (
        losses_of(
            new_trainer(data, tmp_path, 20, "--optimizer", "adamw8bit", "--head-dim", "40"), 3
        )
        == expected
    )


def test_the_papers_preset():
    config = PRESETS["gmdit_xl_k8"]
    assert (config.num_layers, config.num_heads * config.head_dim, config.num_components) == (
        28,
        1152,
        8,
    )
    assert (config.batch_size, config.iterations, config.lr, config.weight_decay) == (
        4096,
        200_000,
        2e-4,
        0.05,
    )
    assert (config.transition_ratio, config.class_dropout, config.clip, config.warmup) == (
        0.5,
        0.1,
        10.0,
        1000,
    )
    decay = ImageTrainer.decay(type("T", (), {"config": config}), 200_000)
    assert decay == pytest.approx(0.5 ** (4096 / 30e6))
    assert ImageTrainer.decay(type("T", (), {"config": config}), 1000) == pytest.approx(
        0.5 ** (1 / 50)
    )


def test_an_iteration_waits_for_no_device(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10, "--warmup", "0")  # with clipping
    trainer.iterate()  # which opens the data
    with Waits() as waits:
        trainer.iterate()
    assert set(waits.found) <= {
        "aten._linalg_eigh"
    }  # of the spectral loss, whose errors torch looks at


def test_a_compiled_network_trains_and_resumes_to_the_same_losses(data, tmp_path, monkeypatch):
    """Trace forward and backward passes, with dropped labels, without compiling the code."""
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    eager = losses_of(new_trainer(data, tmp_path / "eager", 10), 5)
    trainer = new_trainer(data, tmp_path / "compiled", 10, "--compile")
    losses = losses_of(trainer, 3)
    trainer.save()
    losses += losses_of(trainer, 2)
    assert losses == pytest.approx(eager, rel=1e-4)
    assert (
        losses_of(
            new_trainer(data, tmp_path / "compiled", 10, "--compile", "--gradient-checkpointing"), 2
        )
        == losses[3:]
    )


def test_biases_do_not_decay_and_the_gradient_is_clipped_after_the_warm_up(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10, "--clip", "0.01", "--weight-decay", "0.3")
    decay = {
        id(p): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.95)}
    for name, parameter in trainer.model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") else 0.3), name
    norms = []

    def measure(*_):
        gradients = [p.grad for p in trainer.model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer.optimizer.register_step_pre_hook(measure)
    losses_of(trainer, 5)  # the warm-up has 3
    assert min(norms[:3]) > 0.1
    assert norms[3:] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_average_follows_the_weights_with_its_decay(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 100)
    trainer.step = 60  # where a twentieth of the images seen is more than one batch
    average = [p.detach().clone() for p in trainer.model.parameters()]
    for step in (61, 62):
        losses_of(trainer, 1)
        decay = 0.5 ** (1 / (0.05 * step))
        average = [
            decay * a + (1 - decay) * p.detach()
            for a, p in zip(average, trainer.model.parameters(), strict=True)
        ]
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(average, trainer.average, strict=True)
    )
    assert torch.equal(next(trainer.sampling_model().parameters()), trainer.average[0])


def test_a_model_of_latents_shows_them_through_its_vae(tmp_path):
    """Train with a tiny VAE that doubles each side, in bf16 with two reading processes."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    write_shard(
        tmp_path / "shard-00000.safetensors", torch.randn(8, 4, 4, 4), torch.arange(8) % 2, {}
    )
    index = {
        "format": FORMAT,
        "kind": "latents",
        "shape": [4, 4, 4],
        "classes": ["a", "b"],
        "count": 8,
        "skipped": [],
    }
    write_index(
        tmp_path,
        {
            **index,
            "shards": [{"file": "shard-00000.safetensors", "count": 8}],
            "scaling_factor": 0.18215,
        },
    )
    more = split("--precision bf16 --workers 2 --picture-every 2")
    more += ["--vae", str(tmp_path / "vae")]
    trainer = new_trainer(tmp_path, tmp_path / "out", 2, *more)
    trainer.run()
    assert Image.open(tmp_path / "out" / "samples" / "0000002.png").size == (2 + 2 * 66, 2 + 4 * 66)
    assert read_metadata(trainer.path)["data"] == {
        "labels": ["a", "b"],
        "space": "sd-vae",
        "scaling_factor": 0.18215,
    }
    with pytest.raises((ValueError, OSError), match="nowhere"):
        new_trainer(tmp_path, tmp_path / "other", 2, "--vae", str(tmp_path / "nowhere"))


def test_what_accelerate_would_do_behind_the_trainers_back_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"4 gradient accumulation steps.*--accumulate"):
        new_trainer(data, tmp_path, 10)
