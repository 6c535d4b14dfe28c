"""Command line of `gmflow` on the shipped models."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmflow_core import (
    GaussianMixtureSource,
    demo_command,
    load_checkpoint,
    read_metadata,
    sample_images,
    save_checkpoint,
    save_source,
)
from gmflow_core.cli import main
from gmflow_core.demo_command import POINTS_MODEL
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.toys.checkerboard import draw_checkerboard, on_board, total_variation
from gmflow_core.toys.density_picture import density_picture
from gmflow_core.toys.points import sample_points

ROOT = Path(__file__).parents[2]
DIGITS = SHIPPED / "digits_one_call.safetensors"


@pytest.mark.parametrize("solver", ["gm-ode", "gm-sde"])
def test_shipped_model_samples_the_checkerboard(solver):
    """In four steps nearly all points lie on the board, as far from it as exact samples do."""
    network, _ = load_checkpoint(POINTS_MODEL)
    points = sample_points(network, 20_000, solver=solver, steps=4)
    floor = total_variation(draw_checkerboard(20_000, torch.Generator().manual_seed(1)))
    assert on_board(points, slack=0.05).float().mean() > 0.95
    assert total_variation(points) < floor + 0.05


def test_shipped_model_says_where_it_comes_from():
    facts = read_metadata(POINTS_MODEL)["training"]
    assert facts["command"].startswith("python -m training.checkerboard")
    assert set(facts["report"]) >= {"u_nll", "gm-ode", "gm-sde", "euler"}


def test_sigterm_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="130"):
        main(
            [
                "demo",
                "--checkerboard",
                "--count",
                "100",
                "--out",
                str(tmp_path / "a.png"),
                "--device",
                "cpu",
            ]
        )
    assert not list(tmp_path.iterdir())


def test_where_no_file_can_be_written_nothing_is_sampled(tmp_path):
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    for name, said in (("a", "is a folder"), ("b", "is a pipe"), ("x" * 300, "too long")):
        with pytest.raises(SystemExit, match=f"{said}"):
            main(["sample", "no such model", "--out", str(tmp_path / f"{name}.png")])


@pytest.mark.parametrize("options", [[], ["--checkerboard", "--count", "400"]])
def test_demo(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_command, "STEPS", (1, 2))
    out = tmp_path / "new" / "demo.png"
    main(["demo", *options, "--out", str(out), "--device", "cpu"])
    assert str(out) in capsys.readouterr().out
    assert min(Image.open(out).size) > 600


def test_sample_writes_points_and_pictures(tmp_path):
    def sample(name, *more):
        main(
            [
                "sample",
                str(POINTS_MODEL),
                "--steps",
                "2",
                "--count",
                "500",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / name),
                *more,
            ]
        )
        return tmp_path / name

    first = load_file(sample("a.safetensors", "--solver", "gm-sde", "--seed", "3"))["points"]
    assert first.shape == (500, 2)
    assert first.isfinite().all()
    assert torch.equal(
        first, load_file(sample("b.safetensors", "--solver", "gm-sde", "--seed", "3"))["points"]
    )
    assert not torch.equal(
        first, load_file(sample("c.safetensors", "--solver", "gm-sde", "--seed", "4"))["points"]
    )
    assert Image.open(sample("d.png", "--solver", "euler", "--outline")).size == (512, 512)


def test_inspect(capsys):
    main(["inspect", str(POINTS_MODEL)])
    out = capsys.readouterr().out
    assert "GMFlowMLP" in out
    assert "1,412,289" in out
    assert '"num_components": 64' in out
    assert "python -m training.checkerboard" in out


@pytest.mark.parametrize("module", ["gmflow_core", "gmflow_core.cli"])
def test_modules_run_as_the_command(module):
    command = [sys.executable, "-m", module]
    bare = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "the following arguments are required: COMMAND" in bare.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["inspect", "nowhere.safetensors"], "there is no checkpoint nowhere.safetensors"),
        (["sample", str(POINTS_MODEL), "--steps", "0"], "steps is 0"),
        (["sample", str(POINTS_MODEL), "--out", "points.npy"], "must end in .png"),
        (["sample", str(POINTS_MODEL), "--count", "-1"], "count is -1"),
        (["sample", str(POINTS_MODEL), "--device", "abacus"], "--device abacus cannot be used"),
        (["sample", str(POINTS_MODEL), "--seed", "-1"], "--seed -1 must be"),
        (["sample", str(DIGITS), "--seeds", "1", "-1"], "--seeds -1 must be"),
        (["sample", str(DIGITS), "--seed", str(2**63 - 1)], "too large for 80 images"),
        (["sample", str(DIGITS), "--steps", "0"], "--steps is 0; it has to be"),
        (["demo", "--out", "demo.txt"], "must end in .png"),
        (["demo", "--count", "0"], "--count 0 goes with --checkerboard only"),
        (["demo", "--seed", str(2**63 - 1)], "too large for 24 images"),
    ],
)
def test_errors_are_one_line(arguments, complaint):
    with pytest.raises(SystemExit, match=complaint):
        main(arguments)


def test_density_picture_puts_points_where_they_are():
    """Draw y upwards, leave out points outside the frame; bins need not divide the size."""
    picture = density_picture(
        torch.tensor([[3.0, -3.0], [99.0, 0.0]]), size=100, bins=30, extent=4.0
    )
    assert picture.shape == (100, 100, 3)
    bright = (picture != picture[0, 0]).any(-1).nonzero().float().mean(0)
    assert bright[0] > 80
    assert bright[1] > 80
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        density_picture(torch.zeros(0, 2))


def test_sample_draws_the_classes_asked_for(tmp_path):
    """Sample the shipped digits: a row of three for each label."""
    checkpoint, common = (
        str(SHIPPED / "digits_k8.safetensors"),
        ["--steps", "4", "--count", "3", "--device", "cpu"],
    )
    main(
        [
            "sample",
            checkpoint,
            *common,
            "--labels",
            "3",
            "7",
            "--guidance",
            "0.1",
            "--out",
            str(tmp_path / "digits.png"),
        ]
    )
    assert Image.open(tmp_path / "digits.png").size == (2 + 3 * 66, 2 + 2 * 66)
    main(
        [
            "sample",
            checkpoint,
            *common,
            "--solver",
            "gm-sde",
            "--out",
            str(tmp_path / "digits.safetensors"),
        ]
    )
    found = load_file(tmp_path / "digits.safetensors")
    assert found["labels"].tolist() == [label for label in range(10) for _ in range(3)]
    assert found["samples"].shape == (30, 3, 8, 8)
    assert found["samples"].abs().mean() < 1.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits_k8.safetensors", "--labels", "cat"], "no class 'cat'"),
        (
            ["digits_k8.safetensors", "--guidance", "4"],
            "--guidance: the guidance weight 4.0 is outside",
        ),
        (["checkerboard_k64.safetensors", "--labels", "3"], "without classes"),
    ],
)
def test_labels_and_guidance_that_do_not_fit_are_quoted(arguments, message, tmp_path):
    checkpoint, *rest = arguments
    with pytest.raises(SystemExit, match=message):
        main(["sample", str(SHIPPED / checkpoint), *rest, "--out", str(tmp_path / "a.png")])


def test_sample_without_a_label(tmp_path):
    sizes = {
        "num_components": 2,
        "channels": 3,
        "latent_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "head_dim": 8,
    }
    network, about = (
        GMDiT(GMDiTConfig(num_classes=4, **sizes)),
        {"space": "pixels", "labels": list("abcd")},
    )
    for name, data, options in (
        ("labelled", about, ["--unlabelled"]),
        ("unlabelled", {**about, "unlabelled": True}, []),
    ):
        save_checkpoint(network, tmp_path / f"{name}.safetensors", data=data)
        command = [
            "sample",
            str(tmp_path / f"{name}.safetensors"),
            "--steps",
            "1",
            "--device",
            "cpu",
            "--count",
            "2",
        ]
        command += ["--out", str(tmp_path / "x.safetensors")]
        main([*command, *options])
        assert load_file(tmp_path / "x.safetensors")["labels"].tolist() == [4, 4]
        with pytest.raises(SystemExit, match="--unlabelled does not go with --labels a"):
            main([*command, "--unlabelled", "--labels", "a"])
    with pytest.raises(SystemExit, match="was trained without classes; give it no labels"):
        main([*command, "--labels", "b"])


def test_sample_from_a_mixture_source(tmp_path):
    source = GaussianMixtureSource(
        torch.randn(4, 3, 8, 8), torch.full((4, 1, 1, 1), 0.5), torch.full((4,), 0.25).log()
    )
    save_source(source, tmp_path / "source.safetensors")
    about = {"num_modes": 4, "shape": [3, 8, 8], "coupling": "soft", "conditioning": "mode"}
    network = GMDiT(
        GMDiTConfig(
            num_components=2,
            channels=3,
            latent_size=8,
            num_classes=4,
            num_layers=1,
            num_heads=1,
            head_dim=8,
        )
    )
    data = {"space": "pixels", "labels": [f"mode {m}" for m in range(4)], "source": about}
    save_checkpoint(network, tmp_path / "model.safetensors", data=data)
    command = [
        "sample",
        str(tmp_path / "model.safetensors"),
        "--steps",
        "1",
        "--device",
        "cpu",
        "--count",
        "2",
    ]
    command += ["--labels", "1", "mode 3", "--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(SystemExit, match="with a mixture source; give it as --source"):
        main(command)
    main([*command, "--source", str(tmp_path / "source.safetensors")])
    found = load_file(tmp_path / "x.safetensors")
    assert found["labels"].tolist() == [1, 1, 3, 3]
    expected = sample_images(
        network.eval(), None, steps=1, source=source, modes=found["labels"], seeds=range(4)
    )
    assert torch.allclose(found["samples"], expected, atol=1e-5)


@pytest.mark.parametrize("option", ["--steps", "--substeps"])
def test_numbers_of_steps_beyond_any_use_are_refused(option, tmp_path):
    with pytest.raises(SystemExit, match=f"{option} is 9223372036854775807; it has to be a whole"):
        main(
            ["sample", str(POINTS_MODEL), option, str(2**63 - 1), "--out", str(tmp_path / "a.png")]
        )


def test_memory_is_blamed_for_what_it_caused_alone(monkeypatch, tmp_path):
    """A mistake in the code keeps its traceback, whatever words are in its message."""
    arguments = ["demo", "--checkerboard", "--out", str(tmp_path / "a.png"), "--device", "cpu"]
    for error, kind, said in (
        (RuntimeError("DefaultCPUAllocator: can't allocate"), SystemExit, "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), SystemExit, "too little memory"),
        (RuntimeError("unsupported memory format"), RuntimeError, "memory format"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(demo_command, "load_checkpoint", fail)
        with pytest.raises(kind, match=said):
            main(arguments)
