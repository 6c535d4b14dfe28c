"""What training commands refuse before they work: options without effect, unfit inputs."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gmflow_core.source.files import load_source
from tests.training.evaluation_runs import arguments, scoring, two_classes, write_place
from training import cifar10, emoji, fit_source, likelihood, reference
from training.data.preparation import PreparationConfig
from training.evaluate import main
from training.evaluation import sampling
from training.evaluation.config import Config
from training.evaluation.given_samples import FolderSamples
from training.evaluation.real_images import FolderImages
from training.evaluation.reference_file import read_reference


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with training and test data, a model, and trained features."""
    return write_place(tmp_path_factory.mktemp("refused"))


def write_pictures(folder: Path, count: int, ending: str = "png") -> Path:
    """Write pictures of two classes."""
    folder.mkdir(parents=True)
    for number, image in enumerate(two_classes(count)[0].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:02d}.{ending}")
    return folder


@pytest.mark.parametrize("ending", ["gif", "tif", "png"])
def test_pictures_have_the_same_endings_everywhere(ending, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 5, ending)
    assert len(FolderSamples(folder, 9)) == len(FolderImages(folder, 9, 8)) == 5
    assert FolderSamples(folder, 9).get(range(5))[0].shape == (5, 3, 8, 8)


@pytest.mark.parametrize("label", [1.5, 1.0, True, "1", None, 2**70])
def test_labels_that_are_no_whole_numbers_are_refused(label, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 4)
    labels = [[f"{number:02d}.png", label if number == 2 else 1] for number in range(4)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=r"dataset\.json has the label .* of '02\.png'.*whole num"):
        FolderSamples(folder, 9)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vae", "foo"], "--vae has no effect for samples of pixels"),
        (["--inception-weights", "x"], "--inception-weights has no effect with --features .*f.saf"),
        (["--guide-scale", "3"], "--guide-scale has no effect without a --guide"),
        (["--guidance-interval", "0", ".5"], "--guidance-interval has no effect without a --guid"),
        (["--solver", "gm-sde", "euler", "--substeps", "3"], "has no effect with --solver eul.*gm"),
        (["--solver", "euler", "--order", "1"], "--order has no effect with --solver euler"),
        (["--no-spectrum"], "--no-spectrum has no effect with --solver gm-ode"),
    ],
)
def test_options_without_effect_are_refused(more, said, place, tmp_path):
    with pytest.raises(SystemExit, match=f"{said}.*; leave it out"):
        main(arguments(place, tmp_path, *more))


@pytest.mark.parametrize(
    "more",
    ["--steps 4", "--solver gm-sde", "--guidance .3", "--seed 1", "--precision fp32", "--end .1"],
)
def test_given_samples_are_not_sampled(more, place, tmp_path):
    given = scoring(place, tmp_path / "out", write_pictures(tmp_path / "pictures", 6))
    with pytest.raises(SystemExit, match=f"{more.split()[0]} has no effect on --samples"):
        main([*given, *more.split()])
    if more == "--steps 4":
        main([*given, "--preset", "paper"])  # the preset's own settings are no options


def test_other_commands_refuse_options_without_effect(place, tmp_path):
    data, out = ["--data", str(place / "train")], ["--out", str(tmp_path / "out.npz")]
    for command, given, said in (
        (likelihood, [*data, "--points", "9"], "--points has no effect with --data"),
        (likelihood, ["--widths", "2"], "--widths has no effect without --data"),
        (
            reference,
            [*data, *out, "--features", str(place / "f.safetensors"), "--vae", "x"],
            "--vae has no effect on pictures",
        ),
    ):
        with pytest.raises(SystemExit, match=said):
            command.main(given)
    with pytest.raises(ValueError, match="--vae is x; it must be left out with --pixels"):
        PreparationConfig(data=place, out=tmp_path, pixels=True, vae="x")


def test_too_few_images_are_refused_before_anything_is_sampled(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "sample_images", lambda *given, **more: pytest.fail("sampled"))
    for name in ("count", "reference_count"):
        with pytest.raises(ValueError, match="is 3; precision and recall need at least 4"):
            Config(**{name: 3})
    few = write_pictures(tmp_path / "few", 3)
    with pytest.raises(SystemExit, match=r"few has 3 images; precision and recall need at least 4"):
        main(arguments(place, tmp_path / "out", "--reference", str(few)))


def test_inputs_that_are_not_there_are_named(place, tmp_path):
    out = ["--out", str(tmp_path / "out.npz"), "--features", str(place / "f.safetensors")]
    for name, said in (("none", "; give --data an"), ("none.npz", r" \(--data\)")):
        with pytest.raises(SystemExit, match=rf"there is no .*{name}{said}"):
            reference.main(["--data", str(tmp_path / name), *out])
    (tmp_path / "one").mkdir()
    with pytest.raises(SystemExit, match=r"one has 0 images .*; give --data a folder"):
        reference.main(["--data", str(tmp_path / "one"), *out])
    folder = write_pictures(tmp_path / "pictures", 5)
    (folder / "09.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(SystemExit, match=r"09\.png is a link to nothing; mend or remove it"):
        main(scoring(place, tmp_path / "out", folder))
    with pytest.raises(SystemExit, match=r"09\.png cannot be read .*nothing.*mend or remove it"):
        main(arguments(place, tmp_path / "out", "--reference", str(folder)))


@pytest.mark.parametrize(
    ("package", "said"),
    [("no.tgz", "there is no file .*give --package"), (".", "is a folder, not a file")],
)
def test_a_package_that_is_no_file_is_named(package, said, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no file .*none; give cifar-10.* as --data"):
        cifar10.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "pictures")])
    with pytest.raises(SystemExit, match=said):
        emoji.main(["--package", str(tmp_path / package), "--out", str(tmp_path / "emoji")])


@pytest.mark.parametrize("count", [0, -3, float("nan"), "many", [0.5], True])
def test_a_bad_number_of_items_is_named(count, tmp_path):
    content = {"raw_mean": np.zeros(3), "raw_cov": np.eye(3), "num_items": count}
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"bad\.pkl has the num_items .*it must be the number of"):
        read_reference(tmp_path / "bad.pkl")


def test_arrays_are_converted_and_sources_need_not_be(tmp_path):
    arrays = {"means": np.zeros((3, 2), np.float32), "variances": np.ones((3, 2), np.float32)}
    arrays["weights"] = np.full(3, 1 / 3, np.float32)
    np.savez(tmp_path / "a.npz", **arrays)
    save_file(arrays, tmp_path / "a.safetensors")
    save_file({"x": arrays["means"]}, tmp_path / "b.safetensors")
    out = str(tmp_path / "source.safetensors")
    for name in ("a.npz", "a.safetensors"):
        fit_source.main(["convert", str(tmp_path / name), "--out", out])
        assert load_source(out).std.unique().tolist() == [1]
    for path, said in ((out, "is a source already"), (tmp_path / "b.safetensors", "holds no mix")):
        with pytest.raises(SystemExit, match=said):
            fit_source.main(["convert", str(path), "--out", str(tmp_path / "new.safetensors")])
