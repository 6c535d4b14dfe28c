"""Test the checkerboard trainer: learning, exact resume after SIGKILL, the report."""

import json
import signal
import time
from pathlib import Path
from shlex import split

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmflow_core import load_checkpoint, read_metadata, save_checkpoint
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from tests import forked
from tests.helpers import Waits
from training.checkerboard import main, parse
from training.evaluation.checkerboard_report import write_report
from training.loop.checkerboard_presets import PRESETS, CheckerboardConfig
from training.loop.checkerboard_trainer import CheckerboardTrainer, draw_batch, loss_of
from training.loop.optimizer import lr_factor

SMALL = split("-k 4 --batch-size 64 --warmup 5 --checkpoint-every 10 --log-every 5 --device cpu")


def train(out: Path, iterations: int, *more: str) -> CheckerboardTrainer:
    trainer = CheckerboardTrainer(
        parse([*SMALL, "--out", str(out), "--iterations", str(iterations), *more])
    )
    trainer.run()
    return trainer


@pytest.mark.parametrize("preset", list(PRESETS))
def test_loss_falls(preset, tmp_path):
    given = ["--preset", preset, *SMALL[2:], "--batch-size", "256", "--out", str(tmp_path)]
    trainer = CheckerboardTrainer(parse([*given, "--lr", "1e-3"]))
    held_out = draw_batch(trainer.config, torch.Generator().manual_seed(123))
    before = loss_of(trainer.model, held_out).item()
    for _ in range(30):
        trainer.iterate()
    assert loss_of(trainer.model, held_out).item() < before - 0.3


def test_resumes_after_sigkill_to_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole", 60)
    command = ["-m", "training.checkerboard", *SMALL, "--out", tmp_path / "killed"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = forked.Process(*command, "--iterations", "100000", environment=threads)
    checkpoint = tmp_path / "killed" / "model.safetensors"
    try:
        deadline = time.time() + 120
        while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = read_metadata(checkpoint)["training"]["step"]
    assert 0 < reached < 60, "the run was killed too late to test anything"
    resumed = train(tmp_path / "killed", 60)
    assert resumed.step == 60
    expected, found = (load_file(t.path) for t in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("where", ["backward", "optimizer"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_of_an_iteration_loses_nothing(where, number, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", 30)
    trainer = CheckerboardTrainer(
        parse([*SMALL, "--out", str(tmp_path / "stopped"), "--iterations", "30"])
    )
    backward = trainer.accelerator.backward

    def interrupt(*_):
        if trainer.step == 13:
            signal.raise_signal(number)

    if where == "backward":
        monkeypatch.setattr(trainer.accelerator, "backward", lambda x: interrupt(backward(x)))
    else:
        trainer.optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 14"):
        trainer.run()
    assert trainer.step == 14
    resumed = train(tmp_path / "stopped", 30)
    expected, found = (load_file(t.path) for t in (whole, resumed))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_loss_curve_of_a_resumed_run_has_no_gap(tmp_path):
    train(tmp_path, 20)
    train(tmp_path, 30)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [5, 10, 15, 20, 25, 30]
    assert read_metadata(tmp_path / "model.safetensors")["training"]["starts"][0]["step"] == 0


def test_resumed_run_repeats_the_losses(tmp_path):
    config = parse([*SMALL, "--out", str(tmp_path), "--iterations", "20"])
    trainer = CheckerboardTrainer(config)
    losses = []
    for step in range(20):
        losses.append(trainer.iterate()["loss"].item())
        if step == 9:
            trainer.save()
    again = CheckerboardTrainer(config)
    assert again.step == 10
    assert [again.iterate()["loss"].item() for _ in range(10)] == losses[10:]


def test_an_iteration_waits_for_no_device(tmp_path):
    trainer = CheckerboardTrainer(parse([*SMALL, "--out", str(tmp_path)]))
    with Waits() as waits:
        trainer.iterate()
    assert not waits.found


def test_each_iteration_has_its_learning_rate_also_after_a_restart(tmp_path):
    more = ["--lr-schedule", "cosine", "--iterations", "12", "--lr", "3e-3"]
    config, found = parse([*SMALL, "--out", str(tmp_path), *more]), []
    for iterations in (7, 5):
        trainer = CheckerboardTrainer(config)
        for _ in range(iterations):
            found += [group["lr"] for group in trainer.optimizer.param_groups]
            trainer.iterate()
        trainer.save()
    assert found == [3e-3 * lr_factor(config, step) for step in range(12)]


def test_another_configuration_is_not_resumed(tmp_path):
    train(tmp_path, 10)
    with pytest.raises(ValueError, match=r"batch_size: 64 there, 32 here.*--restart"):
        CheckerboardTrainer(parse([*SMALL, "--out", str(tmp_path), "--batch-size", "32"]))
    assert (
        CheckerboardTrainer(
            parse([*SMALL, "--out", str(tmp_path), "--batch-size", "32", "--restart"])
        ).step
        == 0
    )


def test_weights_alone_are_not_overwritten(tmp_path):
    save_checkpoint(GMFlowMLP(GMFlowMLPConfig(num_components=4)), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds weights only"):
        CheckerboardTrainer(parse([*SMALL, "--out", str(tmp_path)]))


def test_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
    train(tmp_path, 10)
    trainer = CheckerboardTrainer(parse([*SMALL, "--out", str(tmp_path), "--iterations", "30"]))
    with torch.no_grad():
        trainer.model.net[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="last good checkpoint"):
        trainer.run()
    assert all(
        t.isfinite().all() for t in load_checkpoint(tmp_path / "model.safetensors")[0].parameters()
    )


def test_processes_share_the_batch():
    """Together, any number of processes see the batch that one would see."""
    config = CheckerboardConfig(batch_size=10)
    whole = draw_batch(config, torch.Generator().manual_seed(0))["x"]
    shares = [
        draw_batch(config, torch.Generator().manual_seed(0))["x"][rank::2] for rank in range(2)
    ]
    assert torch.equal(torch.stack(shares, 1).reshape(10, 2), whole)


def test_a_batch_that_is_not_divided_or_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match=r"64 cannot be divided among 3 processes; make it a mul"):
        CheckerboardTrainer(parse([*SMALL, "--out", str(tmp_path)]))
    monkeypatch.setattr(CheckerboardTrainer, "backward", lambda *_: torch.empty(2**50))
    monkeypatch.setattr(Accelerator, "num_processes", 1)
    with pytest.raises(SystemExit, match="memory: give --batch-size a smaller number, or --shard"):
        main([*SMALL, "--out", str(tmp_path)])


def test_learning_rate_and_average():
    config = CheckerboardConfig(warmup=10, iterations=110, lr_schedule="cosine")
    assert lr_factor(config, 0) == pytest.approx(0.001)
    assert lr_factor(config, 10) == 1.0
    assert lr_factor(config, 60) == pytest.approx(0.5)
    assert lr_factor(config, 110) == 0
    assert CheckerboardTrainer.decay(None, 8) == pytest.approx((7 / 8) ** 8)


def test_report_and_facts(tmp_path, capsys):
    main([*SMALL, "--out", str(tmp_path), "--iterations", "10", "--eval-samples", "300"])
    report = json.loads((tmp_path / "report.json").read_text())
    for solver in ("euler", "gm-ode", "gm-sde"):
        assert list(report[solver]) == ["1", "2", "4", "8", "16"]
        assert all(0 < entry["total_variation"] <= 1 for entry in report[solver].values())
    assert report["data"]["off_support"] == 0
    assert (tmp_path / "report.png").stat().st_size > 10_000
    shared = tmp_path / "weights.safetensors"
    assert shared.stat().st_size < (tmp_path / "model.safetensors").stat().st_size / 6
    assert read_metadata(shared)["training"]["report"] == report
    assert write_report(shared, tmp_path / "again", 300) == report
    assert "report.png" in capsys.readouterr().out
