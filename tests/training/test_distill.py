"""Test the distillation of students: what they begin as, learning, exact resume, refusals."""

import json
from pathlib import Path
from shlex import split

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gmflow_core import (
    Guidance,
    class_denoiser,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    save_source,
    x0_to_velocity,
)
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.models.ditdh import DiTDH, DiTDHConfig
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.models.mlp import GMFlowMLP, GMFlowMLPConfig
from gmflow_core.models.student import new_student
from gmflow_core.sampling.images import sample_images
from gmflow_core.source.source import GaussianMixtureSource
from tests import forked
from tests.helpers import is_near, normal
from tests.training.image_runs import write_colours
from tests.training.test_imagenet import OLD_TORCH
from training.distill import main, parse
from training.loop.distill_presets import DistillConfig
from training.loop.distill_trainer import DistillTrainer
from training.loop.image_presets import ImageConfig
from training.loop.imitation_objective import teacher_velocity

SHARED = {"channels": 3, "latent_size": 4, "num_classes": 3, "log_std_dim": 8}
SMALL = split("--device cpu --batch-size 16 --warmup 2 --checkpoint-every 50 --log-every 5")


def gmdit(components=2, **changes):
    sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 8}
    return GMDiT(GMDiTConfig(num_components=components, **{**SHARED, **sizes, **changes}))


def ditdh(components=1, **changes):
    sizes = {f"{part}_{name}": n for part in ("trunk", "head") for name, n in SIZES.items()}
    return DiTDH(DiTDHConfig(num_components=components, patch_size=2, **SHARED, **sizes, **changes))


def points(components=4, **changes):
    sizes = {"embed_dim": 16, "hidden_dim": 16, "num_layers": 2}
    return GMFlowMLP(GMFlowMLPConfig(num_components=components, **sizes, **changes))


SIZES = {"layers": 1, "width": 16, "heads": 2}
NETWORKS = {"gmdit": gmdit, "ditdh": ditdh, "points": points}


def with_weights(network, seed=0):
    """Return the network with random weights, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def teacher_file(folder: Path, network=None, **data) -> Path:
    """Write a teacher of coloured pictures of 4 x 4, or another network."""
    path = folder / "teacher.safetensors"
    record = {"labels": ["red", "green", "blue"], "space": "pixels", **data}
    save_checkpoint(with_weights(network or gmdit()), path, data=record)
    return path


def arguments(teacher, out, iterations, *more):
    places = ["--teacher", str(teacher), "--out", str(out), "--iterations", str(iterations)]
    return [*SMALL, *places, "-k", "2", *more]


def new_trainer(teacher, out, iterations, *more):
    return DistillTrainer(parse(arguments(teacher, out, iterations, *more)))


def losses_of(trainer, count):
    return [trainer.iterate()["loss"].item() for _ in range(count)]


def output_of(network):
    of_points = isinstance(network, GMFlowMLP)
    x = normal(2, 2) if of_points else normal(2, 3, 4, 4)
    labels = [] if of_points else [torch.tensor([0, 2])]
    with torch.no_grad():
        return network(x, torch.tensor([0.9, 0.3]), *labels)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("flow_matching", [False, True])
def test_students_begin_as_their_teacher(kind, flow_matching):
    fixed = {"components": 1, "constant_log_std": 0.0} if flow_matching else {}
    teacher = with_weights(NETWORKS[kind](**{"components": 4, **fixed}))
    mean = output_of(teacher).means.mean(1)  # of the components, all alike
    same = output_of(new_student(teacher, teacher.config.num_components))
    assert is_near(same.mean(), output_of(teacher).mean(), 1e-5)
    for count in (1, 2, 8):
        mixture = output_of(new_student(teacher, count))
        assert mixture.means.shape[1] == count
        assert is_near(mixture.means.mean(1), mean, 0.2)
        if flow_matching:
            assert mixture.log_std.exp().flatten().tolist() == pytest.approx([0.05] * 2, rel=1e-4)
    assert not torch.equal(mixture.means[:, 0], mixture.means[:, 1])
    policy = output_of(new_student(teacher, 3, dx=(0.5, 2.0)))
    assert (policy.segment_size, policy.shift, policy.velocities.shape[1]) == (0.5, 2.0, 3)
    assert is_near(policy.velocities, mean.unsqueeze(1).expand_as(policy.velocities), 1e-5)


@pytest.mark.parametrize(
    "how",
    [
        "--steps 1",
        "--steps 2 --policy dx",
        "--steps 2 --guidance 0.3",
        "--steps 2 --final-step-size 0.5 --decay-iterations 30 --time-shift 2",
        "--data",
    ],
)
def test_students_learn(how, tmp_path):
    more = [*split(how), *([str(write_colours(tmp_path / "data"))] if how == "--data" else [])]
    trainer = new_trainer(teacher_file(tmp_path), tmp_path / "out", 60, *more, "--lr", "3e-3")
    losses = losses_of(trainer, 60)
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_students_of_ditdh_points_and_source_modes_learn(tmp_path):
    source = GaussianMixtureSource(
        normal(3, 3, 4, 4), torch.full((3, 1, 1, 1), 0.5), torch.zeros(3).log_softmax(0)
    )
    save_source(source, tmp_path / "source.safetensors")
    record = source.record("soft", True)
    cases = [
        (ditdh(constant_log_std=0.0), {}, []),
        (points(), {"space": None, "labels": None}, []),
        (gmdit(), {"source": record}, ["--source", str(tmp_path / "source.safetensors")]),
    ]
    for number, (network, data, more) in enumerate(cases):
        teacher = teacher_file(tmp_path, network, **data)
        trainer = new_trainer(teacher, tmp_path / f"{number}", 40, *more, "--lr", "3e-3")
        losses = losses_of(trainer, 40)
        assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), number
        assert trainer.draw_picture(trainer.sampling_model()).isfinite().all()


def test_a_run_leaves_pictures_curves_and_a_student_that_knows_its_steps(tmp_path, capsys):
    teacher = teacher_file(tmp_path)
    given = arguments(teacher, tmp_path / "out", 10, "--steps", "2", "--guidance", "0.2")
    main([*given, "--picture-every", "5"])
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    for name in ("loss", "teacher_distance"):
        assert [point.step for point in events.Scalars(name)] == [5, 10]
    assert Image.open(tmp_path / "out" / "samples" / "0000010.png").size == (662, 266)
    path = tmp_path / "out" / "weights.safetensors"
    student, _ = load_checkpoint(path)
    data = read_metadata(path)["data"]
    assert data["labels"] == ["red", "green", "blue"]
    few = data["few_steps"]
    assert (few["steps"], few["policy"], few["guidance"]) == (2, "GMFlow", "probabilistic 0.2")
    assert (
        sample_images(student, torch.tensor([0, 1]), solver="gm-policy", steps=2).isfinite().all()
    )
    assert "of 2 calls" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a student of 2 calls itself"):
        new_trainer(path, tmp_path / "again", 10)


def test_resumes_to_the_same_losses(tmp_path):
    teacher = teacher_file(tmp_path)
    trainer = new_trainer(teacher, tmp_path / "out", 20, "--steps", "2")
    losses_of(trainer, 3)
    trainer.save()
    expected = losses_of(trainer, 3)
    teacher = teacher.rename(tmp_path / "moved.safetensors")
    resumed = new_trainer(teacher, tmp_path / "out", 20, "--steps", "2")
    assert losses_of(resumed, 3) == expected
    other = gmdit()
    save_checkpoint(with_weights(other, 1), teacher, data=read_metadata(teacher)["data"])
    with pytest.raises(ValueError, match="other settings \\(fingerprint"):
        new_trainer(teacher, tmp_path / "out", 20, "--steps", "2")


def test_a_run_that_diverges_ends_with_its_last_good_state(tmp_path):
    more = ["--log-every", "10", "--checkpoint-every", "10", "--warmup", "0"]
    teacher = teacher_file(tmp_path)
    more += ["--picture-every", "10"]
    first = DistillTrainer(parse([*arguments(teacher, tmp_path / "out", 10), *more]))
    first.run()
    trainer = DistillTrainer(parse([*arguments(teacher, tmp_path / "out", 60), *more]))
    assert first.figures.keys() == {"teacher_distance"}
    assert trainer.figures == trainer.facts()["figures"] == first.figures
    trainer.lowest = 1e-3  # as if it had come down to that
    with pytest.raises(FloatingPointError, match=r"grown from 0\.001 .* holds the last checkpoint"):
        trainer.run()
    assert read_metadata(trainer.path)["training"]["step"] == 10


def test_one_large_loss_is_no_divergence(tmp_path, monkeypatch):
    teacher = teacher_file(tmp_path)
    trainer = new_trainer(teacher, tmp_path / "out", 20, "--log-every", "5")
    backward = trainer.backward
    factor = lambda: 1e6 if trainer.step == 12 else 1.0  # noqa: E731
    monkeypatch.setattr(trainer, "backward", lambda: {"loss": factor() * backward()["loss"]})
    trainer.run()
    assert trainer.step == 20


def test_guidance_that_never_acts_is_none(tmp_path):
    teacher = teacher_file(tmp_path)
    for given, few, drops in [
        ("--guidance 0", None, True),
        ("--guidance 1 --guidance-kind cfg", None, True),
        ("--guidance 0.2", "probabilistic 0.2", False),
        (
            "--guidance 3 --guidance-kind cfg --guidance-interval 0 0.7",
            "cfg 3 at sigmas from 0 to 0.7",
            False,
        ),
    ]:
        more = [*split(given), "--class-dropout", "0.9"]
        trainer = new_trainer(teacher, tmp_path / "out", 10, *more)
        assert trainer.data()["few_steps"].get("guidance") == few
        _, labels, _, _ = trainer.draw(range(16), 1)
        assert (labels == 3).any() == drops


def test_a_run_goes_on_from_what_it_began_with(tmp_path):
    teacher, data = teacher_file(tmp_path), str(write_colours(tmp_path / "data"))
    for out, first, then, said in [
        (tmp_path / "noise", [], ["--data", data], "without --data; leave out --data"),
        (tmp_path / "data_out", ["--data", data], [], "with --data; give --data '.*data'"),
    ]:
        new_trainer(teacher, out, 10, *first).save()
        assert new_trainer(teacher, out, 10, *first).step == 0
        with pytest.raises(ValueError, match=said):
            new_trainer(teacher, out, 10, *then)


@pytest.mark.parametrize("name", ["model", "weights"])
def test_a_teacher_is_not_overwritten(name, tmp_path):
    teacher = teacher_file(tmp_path).rename(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="the student would overwrite it"):
        new_trainer(teacher, tmp_path / "elsewhere" / "..", 10, "--restart")


def test_a_students_file_can_be_read_whatever_its_settings(tmp_path):
    for setting, least, most in [
        ("steps", 1, 1000),
        ("time_shift", 1e-3, 1e3),
        ("final_step_size", 1e-3, 1.0),
    ]:
        for value in (least, most):
            config = {"teacher": str(teacher_file(tmp_path)), "out": tmp_path / "out"}
            trainer = DistillTrainer(DistillConfig(device="cpu", **config, **{setting: value}))
            path = tmp_path / "student.safetensors"
            save_checkpoint(trainer.model, path, data=trainer.data())
            assert read_metadata(path)["data"] == trainer.data()
        for value in (least / 2, most * 2):
            with pytest.raises(ValueError, match=f"--{setting.replace('_', '-')} is {value}"):
                DistillConfig(**{setting: value})


TWO_PROCESSES = """
import json, sys
from training.distill import parse
from training.loop.distill_trainer import DistillTrainer
for how in json.loads(sys.argv[1]):
    trainer, losses = DistillTrainer(parse([*sys.argv[2:], *how, "--restart"])), []
    for _ in range(3):
        losses.append(trainer.accelerator.reduce(trainer.iterate()["loss"], "mean").item())
    trainer.save()
    if trainer.accelerator.is_main_process:
        (trainer.config.out / f"losses{len(how)}.json").write_text(json.dumps(losses))
"""
SHARDED = ["--accumulate", "2", "--shard"]


@OLD_TORCH
def test_two_processes_have_the_losses_of_one(tmp_path):
    """In DDP, and in FSDP with two pieces each."""
    teacher = teacher_file(tmp_path)
    expected = losses_of(new_trainer(teacher, tmp_path / "one", 20, "--steps", "2"), 3)
    given = [json.dumps([[], SHARDED]), *arguments(teacher, tmp_path / "two", 20, "--steps", "2")]
    for _, said, status in forked.run_ranks("-c", TWO_PROCESSES, *given):
        assert status == 0, said
    for how in ([], SHARDED):
        found = json.loads((tmp_path / "two" / f"losses{len(how)}.json").read_text())
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["probabilistic", "cfg"])
def test_the_teacher_is_guided_within_its_interval(kind):
    network, x, labels = with_weights(gmdit()), normal(2, 3, 4, 4), torch.tensor([0, 2])
    sigma = torch.tensor([0.9, 0.3])
    guidance = Guidance(0.4 if kind == "probabilistic" else 3.0, kind, interval=(0.0, 0.5))
    velocity = teacher_velocity(network, labels, None, guidance, torch.no_grad)
    with torch.no_grad():
        found = velocity(x, sigma)
        plain = network(x, sigma, labels).mean()
        whole = class_denoiser(network, labels, Guidance(guidance.scale, kind))(x, sigma)
    assert is_near(found[0], plain[0], 1e-5)
    assert is_near(found[1], x0_to_velocity(whole.mean(), x, sigma)[1], 1e-4)
    assert (found - plain)[1].abs().max() > 1e-3


def test_what_does_not_belong_together_is_refused(tmp_path):
    teacher, out = teacher_file(tmp_path), tmp_path / "out"
    shipped = SHIPPED / "digits_modes_k8.safetensors"
    for path, more, said in [
        (teacher, "--source x", r"no .*x"),
        (teacher, "--batch-size 15 --accumulate 2", "--batch-size 15 cannot be divided"),
        (shipped, "", "was trained from the noise of a mixture source; give --source"),
        (tmp_path / "no.safetensors", "", "no checkpoint"),
    ]:
        with pytest.raises((ValueError, OSError), match=said):
            new_trainer(path, out, 10, *split(more))
    with pytest.raises(ValueError, match="leave out --source"):
        new_trainer(teacher, out, 10, "--source", str(SHIPPED / "digits_source.safetensors"))
    with pytest.raises(ValueError, match=r"weight 1\.2 is outside"):
        DistillConfig(guidance=1.2)
    for config in (DistillConfig, ImageConfig):
        with pytest.raises(ValueError, match="--optimizer is adamw8bit; it must be adamw or auto"):
            config(shard=True, optimizer="adamw8bit")
    with pytest.raises(ValueError, match="--steps is 0"):
        DistillConfig(steps=0)
    with pytest.raises(ValueError, match=r"--guidance-interval is .* with a --guidance"):
        DistillConfig(guidance_interval=(0.0, 0.5))
    with pytest.raises(ValueError, match="given together with --reference"):
        DistillConfig(features="x.safetensors")
    data = write_colours(tmp_path / "data")
    with pytest.raises(ValueError, match=r"of shape \(3, 4, 4\), and .* makes some of \(3, 8, 8\)"):
        new_trainer(SHIPPED / "digits_k8.safetensors", out, 10, "--data", str(data))
    with pytest.raises(ValueError, match=r"holds 3 classes, and .* knows 2"):
        new_trainer(teacher_file(tmp_path, gmdit(num_classes=2)), out, 10, "--data", str(data))
    with pytest.raises(ValueError, match=r"holds pixels, and .* makes sd-vae"):
        new_trainer(teacher_file(tmp_path, space="sd-vae"), out, 10, "--data", str(data))
    unlabelled = teacher_file(tmp_path, unlabelled=True, labels=None)
    with pytest.raises(ValueError, match="was trained without labels; omit --guidance"):
        new_trainer(unlabelled, out, 10, "--guidance", "0.2")
