"""The GM-DiT trainer: it learns, resumes exactly, sees the same batch in any number of processes, survives bad steps."""

import functools
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmflow_core import (
    GaussianMixtureSource,
    diffuse,
    forward_transition,
    load_checkpoint,
    load_source,
    nll,
    read_metadata,
    save_source,
    spectral_nll,
    transition_nll,
    velocity_to_x0,
)
from gmflow_core.files.checkpoint import load_training_state
from gmflow_core.sampling.images import sample_images
from tests.helpers import Waits
from training.data.batches import Order, draw_noise, pieces_of
from training.data.shards import FORMAT, LatentDataset, write_index, write_shard
from training.data.tokens import SETTINGS, WithTokens, write_tokens
from training.imagenet import main, parse
from training.loop.image_presets import PRESETS
from training.loop.image_trainer import ImageTrainer
from training.loop.mode_weights import ModeWeights

ROOT = Path(__file__).parents[2]
SMALL = [
    "--num-layers",
    "2",
    "--num-heads",
    "2",
    "--head-dim",
    "8",
    "--log-std-dim",
    "8",
    "-k",
    "3",
    "--device",
    "cpu",
]
SMALL += [
    "--batch-size",
    "16",
    "--warmup",
    "3",
    "--checkpoint-every",
    "5",
    "--log-every",
    "5",
    "--precision",
    "fp32",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of 4 x 4 in three classes: plain colours, each with a little noise."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    x = (
        40
        + 150 * torch.eye(3)[labels][:, :, None, None]
        + 30 * torch.rand(48, 3, 4, 4, generator=generator)
    )
    write_shard(folder / "shard-00000.safetensors", x.to(torch.uint8), labels, {})
    index = {
        "format": FORMAT,
        "kind": "pixels",
        "shape": [3, 4, 4],
        "classes": ["red", "green", "blue"],
        "count": 48,
    }
    index |= {"shards": [{"file": "shard-00000.safetensors", "count": 48}], "skipped": []}
    write_index(folder, index)
    return folder


def new_trainer(data: Path, out: Path, iterations: int, *more: str) -> ImageTrainer:
    given = [
        "--preset",
        "digits",
        *SMALL,
        "--data",
        str(data),
        "--out",
        str(out),
        "--iterations",
        str(iterations),
    ]
    return ImageTrainer(parse([*given, *more]))


def losses_of(trainer: ImageTrainer, count: int) -> list[float]:
    return [trainer.iterate()["loss"].item() for _ in range(count)]


@pytest.mark.parametrize("preset", ["digits", "digits_flow_matching"])
def test_loss_falls(preset, data, tmp_path):
    arguments = [
        "--preset",
        preset,
        *SMALL[:8],
        *SMALL[10:],
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--lr",
        "3e-3",
    ]
    trainer = ImageTrainer(parse([*arguments, "--batch-size", "48", "--lr-schedule", "constant"]))
    losses = losses_of(trainer, 40)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert (trainer.model.spectrum_net is None) == (preset == "digits_flow_matching")


def test_resumes_after_sigkill_to_the_same_weights(data, tmp_path):
    whole = new_trainer(data, tmp_path / "whole", 25)
    whole.run()
    arguments = [
        "--preset",
        "digits",
        *SMALL,
        "--data",
        str(data),
        "--out",
        str(tmp_path / "killed"),
        "--iterations",
        "25",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads()},
    )
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
losses = [trainer.accelerator.reduce(trainer.iterate()["loss"], "mean").item() for _ in range(count)]
trainer.save()
if trainer.accelerator.is_main_process:
    (trainer.config.out / "losses.json").write_text(json.dumps([trainer.accelerator.num_processes, losses]))
"""


@pytest.mark.parametrize("how", [[], ["--accumulate", "2", "--shard"]])
def test_two_processes_have_the_losses_of_one(how, data, tmp_path):
    """With gloo: DDP from the start; FSDP in two pieces each, going on from a checkpoint that one process wrote."""
    one = new_trainer(data, tmp_path / "two", 20)
    losses = losses_of(one, 3)
    if how:
        one.save()
        losses = []
    losses += losses_of(one, 3)
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    given = [
        "--preset",
        "digits",
        *SMALL,
        "--data",
        str(data),
        "--out",
        str(tmp_path / "two"),
        "--iterations",
        "20",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, str(len(losses)), *given, *how], cwd=ROOT, env=environment, check=True
    )
    processes, found = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert processes == 2
    assert found == pytest.approx(losses, rel=1e-5)
    again = new_trainer(data, tmp_path / "two", 20)  # and back in one process
    assert again.step == 6
    expected = dict(one.sampling_model().named_parameters())
    assert all(
        torch.allclose(p, expected[name], atol=1e-5)
        for name, p in again.sampling_model().named_parameters()
    )
    assert losses_of(again, 2) == pytest.approx(losses_of(one, 2), rel=1e-4)


def test_every_epoch_shows_every_sample_once_whatever_the_division():
    whole = Order(count=10, batch_size=4, rows=range(4), pieces=1, seed=3, first=0)
    steps = [indices for indices, _ in zip(whole, range(5), strict=False)]
    seen = list(itertools.chain.from_iterable(steps))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    halves = [Order(10, 4, rows, 2, 3, first=1) for rows in (range(2), range(2, 4))]
    pieces = list(zip(*(zip(half, range(8), strict=False) for half in halves), strict=True))
    found = [
        pieces[2 * i][0][0]
        + pieces[2 * i + 1][0][0]
        + pieces[2 * i][1][0]
        + pieces[2 * i + 1][1][0]
        for i in range(4)
    ]
    assert found == steps[1:]
    assert pieces_of(range(4, 10), 3) == [range(4, 6), range(6, 8), range(8, 10)]


def test_noise_belongs_to_the_row():
    whole = draw_noise(0, 7, range(40), (3,), torch.device("cpu"))
    assert torch.equal(draw_noise(0, 7, range(13, 37), (3,), torch.device("cpu")), whole[13:37])
    assert not torch.equal(draw_noise(0, 8, range(40), (3,), torch.device("cpu")), whole)
    assert abs(draw_noise(0, 0, range(4000), (5,), torch.device("cpu")).std().item() - 1) < 0.02


def test_labels_are_dropped_and_sigmas_drawn_as_asked(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10, "--batch-size", "4096")
    labels, sigma, low, high = trainer.draw(
        torch.ones(4096, dtype=torch.long), (3, 4, 4), range(4096)
    )
    assert (labels == 3).double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert set(labels.tolist()) == {1, 3}
    logit = sigma.double().logit()
    assert (logit.mean().item(), logit.std().item()) == (
        pytest.approx(0, abs=0.06),
        pytest.approx(1, abs=0.05),
    )
    assert low.shape == high.shape == (4096, 3, 4, 4)
    assert abs((low * high).mean().item()) < 0.01
    assert abs((low[:, 0, 0, 0] * logit).mean().item()) < 0.06


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


def test_a_run_leaves_pictures_curves_and_a_model_to_share(data, tmp_path, capsys):
    given = [
        "--preset",
        "digits",
        *SMALL,
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--iterations",
        "10",
    ]
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


@pytest.mark.parametrize("ratio", [0.8, None])
def test_the_objective_is_the_weighted_sum_of_the_losses(ratio, data, tmp_path):
    """Written out from the losses, with weights of its own."""
    weights = ["--loss-weight", "3", "--spectral-weight", "0.5", "--transition-ratio", str(ratio)]
    trainer = new_trainer(data, tmp_path, 10, *weights)
    torch.nn.init.normal_(trainer.model.spectrum_net.mlp[-1].weight)
    x0, labels = trainer.dataset.__getitems__(range(16))
    sigma = torch.linspace(0.1, 0.9, 16)
    low, high = (
        torch.randn(x0.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)
    )
    with torch.no_grad():
        losses = trainer.prepared(x0, labels, sigma, low, high)
        if ratio is None:
            x = diffuse(x0, sigma, low)
            velocity = trainer.model(x, sigma, labels)
            flow = nll(velocity, low - x0).mean()
        else:
            x_low = diffuse(x0, 0.2 * sigma, low)
            x = forward_transition(x_low, 0.2 * sigma, sigma, high)
            velocity = trainer.model(x, sigma, labels)
            flow = transition_nll(velocity, x_low, x, 0.2 * sigma, sigma).mean()
        log_power = trainer.model.spectrum_net(velocity_to_x0(velocity.moment_match(), x, sigma))
        spectral = spectral_nll(velocity, (x - x0) / sigma[:, None, None, None], log_power).mean()
    assert losses["nll"].item() == pytest.approx(flow.item(), rel=1e-5)
    assert losses["spectral"].item() == pytest.approx(spectral.item(), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(3 * flow.item() + 0.5 * spectral.item(), rel=1e-5)


def test_the_spectral_loss_trains_the_spectrum_network_alone(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10)
    torch.nn.init.normal_(trainer.model.spectrum_net.mlp[-1].weight)
    x0, labels = trainer.dataset.__getitems__(range(4))
    noise = torch.randn(2, *x0.shape, generator=torch.Generator().manual_seed(0))
    trainer.prepared(x0, labels, torch.full((4,), 0.5), *noise)["spectral"].backward()
    touched = {
        name.split(".")[0]
        for name, p in trainer.model.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert touched == {"spectrum_net"}


def test_an_iteration_waits_for_no_device(data, tmp_path):
    trainer = new_trainer(data, tmp_path, 10, "--warmup", "0")  # with clipping
    trainer.iterate()  # which opens the data
    with Waits() as waits:
        trainer.iterate()
    assert set(waits.found) <= {
        "aten._linalg_eigh"
    }  # of the spectral loss, whose errors torch looks at


def test_a_compiled_network_trains_and_resumes_to_the_same_losses(data, tmp_path, monkeypatch):
    """Traced forwards and backwards, with dropped labels, without a compiler for the code."""
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


def test_biases_do_not_decay_and_the_gradient_is_clipped_after_the_warm_up(
    data, tmp_path, monkeypatch
):
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
    step = trainer.optimizer.step
    total = torch.nn.utils.get_total_norm
    measure = lambda: norms.append(total([p.grad for p in trainer.model.parameters()]).item())  # noqa: E731
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (measure(), step()))
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
    """A tiny VAE, whose decoder doubles each side; bf16 and two reading processes, as on a GPU."""
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
    more = [
        "--vae",
        str(tmp_path / "vae"),
        "--precision",
        "bf16",
        "--workers",
        "2",
        "--picture-every",
        "2",
    ]
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


# A mixture source


@pytest.fixture(scope="module")
def source(data) -> Path:
    """Three modes, one for each colour."""
    x, labels = LatentDataset(data).__getitems__(range(48))
    means = torch.stack([x[labels == label].mean(0) for label in range(3)])
    save_source(
        GaussianMixtureSource(means, torch.full((3, 1, 1, 1), 0.2), torch.full((3,), 1 / 3).log()),
        data / "source.safetensors",
    )
    return data / "source.safetensors"


def modes_trainer(data: Path, source: Path, out: Path, *more: str) -> ImageTrainer:
    given = [
        "--preset",
        "digits_modes",
        *SMALL,
        "--data",
        str(data),
        "--source",
        str(source),
        "--out",
        str(out),
    ]
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


FLOW_MATCHING = ["-k", "1", "--constant-log-std", "0", "--transition-ratio", "None"]
DITDH = [
    "--network",
    "ditdh",
    "--patch-size",
    "1",
    "--ddt-layers",
    "1",
    "--ddt-width",
    "32",
    "--ddt-heads",
    "2",
]


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
    """The data with these tokens, and a source with an assigner that was fitted as `facts` say; the source's path."""
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


def mapped(path: Path) -> list[range]:
    """The addresses where a file is in this process's memory."""
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


HIDDEN = [
    "--no-mode-conditional",
    "-k",
    "1",
    "--constant-log-std",
    "0",
    "--transition-ratio",
    "None",
]


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
        assert trainer.draw_picture() is not None


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
