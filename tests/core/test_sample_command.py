"""`gmflow sample` of images: what it writes and keeps, and which options go together."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmflow_core import pipeline as pipeline_module
from gmflow_core import sample_command
from gmflow_core.cli import main
from gmflow_core.files.checkpoint import SHIPPED, load_checkpoint, save_checkpoint
from gmflow_core.files.errors import WriteError

DIGITS = SHIPPED / "digits_k8.safetensors"


def sample(out, *options, model=DIGITS):
    """Run `gmflow sample` in one step."""
    command = ["sample", str(model), "--steps", "1", "--device", "cpu", "--out", str(out)]
    main([*command, *map(str, options)])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "130"),
        (WriteError("the disk is full"), "the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
    ],
)
def test_a_stopped_run_keeps_its_single_pictures(error, said, tmp_path, monkeypatch, capsys):
    """Pictures are there before the next batch is sampled, and are those of an undisturbed run."""
    monkeypatch.setattr(pipeline_module, "MOST_AT_ONCE", 2)
    sample_images, out, found = pipeline_module.sample_images, tmp_path / "out", []

    def stopping(*args, **settings):
        found.append(len(list(out.glob("*.png"))))
        if len(found) == 3:
            raise error
        return sample_images(*args, **settings)

    monkeypatch.setattr(pipeline_module, "sample_images", stopping)
    with pytest.raises(SystemExit, match=said):
        sample(out, "--labels", 3, 7, "--count", 3)
    assert found == [0, 2, 4]
    assert f"4 of 6 pictures are written in {out}\n" in capsys.readouterr().err
    names = [f"000{label}_seed{seed}.png" for label, seed in ((3, 0), (3, 1), (3, 2), (7, 3))]
    assert sorted(path.name for path in out.iterdir()) == names
    monkeypatch.undo()
    sample(tmp_path / "whole", "--labels", 3, 7, "--count", 3)
    for name in names:
        pair = [Image.open(tmp_path / folder / name).tobytes() for folder in ("out", "whole")]
        assert max(abs(a - b) for a, b in zip(*pair, strict=True)) <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--guidance", 4), "--guidance: the guidance weight 4"), (("--shift", -1), "shift is -1")],
)
def test_a_mistake_before_the_first_picture_is_said_alone(tmp_path, capsys, options, said):
    with pytest.raises(SystemExit, match=said):
        sample(tmp_path / "out", *options)
    assert "written" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", 1, 2, 1], "--seeds 1 is there twice, which makes the same picture"),
        (["--seeds", 7, 2**32 + 7], r"--seeds 7 and 4294967303 are equal modulo 2\*\*32, which"),
        (["--seeds", 1, "--count", 2], "--count does not go with --seeds"),
        (["--seeds", 1, "--seed", 3], "--seed 3 does not go with --seeds"),
        (["--seeds", 1, "--labels", 3, 7, "03"], "--labels names class 3 more than once"),
        (["--outline"], "a model of images, which has no use for --outline"),
        (["--unlabelled", "--labels", 3], "--unlabelled does not go with --labels 3"),
        (["--solver", "euler", "--substeps", 3], "--substeps 3 has no effect with --solver euler"),
        (["--solver", "gm-sde", "--substeps", 3], "--substeps 3 has no effect with --solver gm-sd"),
        (["--solver", "uni-pc", "--order", 2], "--order 2 has no effect with --solver uni-pc"),
        (["--no-spectrum"], "--no-spectrum has no effect with --solver gm-ode"),
    ],
)
def test_options_that_do_not_go_together(options, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        sample(tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_a_label_that_is_named_twice_has_pictures_of_several_seeds(tmp_path):
    sample(tmp_path / "out", "--labels", 3, 3, "--count", 2)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"0003_seed{seed}.png" for seed in range(4)]


def test_gm_sde_draws_with_and_without_the_spectrum(tmp_path):
    options = ["--labels", 3, "--solver", "gm-sde", "--steps", 2]
    found = []
    for name, more in (("with", []), ("without", ["--no-spectrum"])):
        path = tmp_path / f"{name}.safetensors"
        sample(path, *options, *more)
        found.append(load_file(path)["samples"])
    assert (found[0] - found[1]).abs().mean() > 0.01


def test_points_have_no_use_for_options_of_pictures(tmp_path):
    points = SHIPPED / "checkerboard_k64.safetensors"
    with pytest.raises(SystemExit, match="--outline is drawn over a picture, not over --out"):
        sample(tmp_path / "a.safetensors", "--outline", model=points)
    for option in ("--vae", "--source", "--seeds"):
        with pytest.raises(SystemExit, match=f"has no use for {option}"):
            sample(tmp_path / "a.png", option, 1, model=points)


def test_points_of_a_model_with_a_source_are_not_drawn_from_white_noise(tmp_path):
    network, _ = load_checkpoint(SHIPPED / "checkerboard_k64.safetensors")
    path = tmp_path / "toy.safetensors"
    source = {"num_modes": 2, "shape": [2], "coupling": "soft", "conditioning": "hidden"}
    save_checkpoint(network, path, data={"source": source})
    for more in ([], ["--source", "a.safetensors"]):
        with pytest.raises(SystemExit, match="was trained with a mixture source, which this"):
            sample(tmp_path / "a.png", *more, model=path)


def test_a_sheet_has_a_limit_for_all_its_labels_and_a_folder_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_command, "MOST_NUMBERS", 20 * 3 * 8 * 8)
    sample(tmp_path / "a.png", "--labels", 1, 2, "--count", 10)
    with pytest.raises(SystemExit, match="--count is 11; it must be from 1 to 10 for this model"):
        sample(tmp_path / "a.png", "--labels", 1, 2, "--count", 11)
    sample(tmp_path / "b.png", "--labels", 1, 2, 3, 4, 5, 6)  # fewer than 8 of each
    with pytest.raises(SystemExit, match=r"too much .* at most 20 of them, or a folder as --out"):
        sample(tmp_path / "a.png", "--labels", *([1] * 21))
    sample(tmp_path / "a", "--labels", 1, 2, "--count", 11)
    assert len(list((tmp_path / "a").iterdir())) == 22
