"""What goes into and comes out of an evaluation: students' settings, exports, given samples."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmflow_core import load_checkpoint, sample_images
from gmflow_core.flow.path import flow_sigmas
from tests.training.evaluation_runs import (
    CLASSES,
    arguments,
    run,
    scoring,
    two_classes,
    write_model,
    write_place,
)
from training.common.arrays import NpzRows, Rows, write_npz
from training.data.shards import to_pixels
from training.evaluate import main, parse
from training.evaluation.evaluation import Evaluation
from training.evaluation.given_samples import FolderSamples, NpzSamples
from training.evaluation.models import image_labels, image_seeds
from training.evaluation.report import METRICS, NEWER


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


def test_exported_samples_score_as_the_model_does(place, tmp_path):
    """From an .npz file and from a folder of PNG files, with the labels of both."""
    more = ["--export", "npz", "png", "--discard-samples"]
    [expected] = run(place, tmp_path / "out", *more)["results"]
    npz, folder = (tmp_path / "out" / kind / "tiny_gm-ode_2" for kind in ("npz", "png"))
    npz = npz.with_suffix(".npz")
    with np.load(npz, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert (images.shape, images.dtype, labels.dtype) == ((50, 8, 8, 3), np.uint8, np.int64)
    assert labels.tolist() == image_labels(image_seeds(0, range(50)), 2).tolist()
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files[:2]] == ["000000.png", "000001.png"]
    with Image.open(files[7]) as seventh:
        assert np.array_equal(np.array(seventh), images[7])
    found = Evaluation(parse(scoring(place, tmp_path / "scored", npz, folder))).run()["results"]
    assert [row["name"] for row in found] == ["tiny_gm-ode_2.npz", "tiny_gm-ode_2"]
    for row in found:
        for metric in (*METRICS, *NEWER):
            assert row[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    again = Evaluation(parse(scoring(place, tmp_path / "scored", npz, folder))).run()["results"]
    assert again == found
    npz.unlink()  # is written again, from samples drawn anew
    assert run(place, tmp_path / "out", *more)["results"][0]["key"] == expected["key"]
    with np.load(npz) as file:
        assert np.array_equal(file["arr_0"], images)


def test_fewer_samples_than_count_meet_as_many_real_images(place, tmp_path):
    """More real images would lie nearer to each sample: precision would fall."""
    path = tmp_path / "few.npz"
    np.savez(path, arr_0=two_classes(20, seed=3)[0].permute(0, 2, 3, 1).numpy())
    rows = [
        Evaluation(parse(scoring(place, tmp_path / count, path, more=["--count", count]))).run()
        for count in ("20", "60")
    ]
    few, many = (row["results"][-1] for row in rows)
    assert few["name"] == many["name"] == "few.npz"
    assert all(0 < few[name] == many[name] for name in ("precision", "recall"))


def test_of_a_folder_with_too_many_images_random_ones_are_scored(tmp_path):
    """Sorted by name, the first ones may all be of one class."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number:02d}.png")
    files = FolderSamples(tmp_path, 10).files
    assert files == FolderSamples(tmp_path, 10).files == sorted(files)
    assert len(set(files)) == 10
    assert {file.split("/")[0] for file in files} == {"a", "b"}


def test_of_an_npz_file_with_too_many_images_random_ones_are_scored(tmp_path):
    """Sorted by class, the first ones are all of one; each image keeps its label."""
    images = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    path = tmp_path / "sorted.npz"
    np.savez(path, arr_0=images, arr_1=np.repeat([0, 1], 20))
    samples = NpzSamples(path, 10)
    pixels, labels = (
        torch.cat(parts) for parts in zip(*map(samples.get, (range(4), range(4, 10))), strict=True)
    )
    numbers = pixels[:, 0, 0, 0].tolist()
    assert numbers == sorted(set(numbers))
    assert labels.tolist() == [number // 20 for number in numbers]
    assert set(labels.tolist()) == {0, 1}
    assert samples.key != {**NpzSamples(path, 40).key, "count": 10}
    whole = NpzSamples(path, 40).get(range(40))[0]
    assert whole[:, 0, 0, 0].tolist() == list(range(40))


def test_samples_that_cannot_be_scored_are_named(place, tmp_path):
    images = np.zeros((6, 8, 8, 3), np.uint8)
    broken = {
        "it must be uint8 images": {"arr_0": images.astype(np.float32)},
        r"has arr_0 in uint8 \(8, 8, 3\)": {"arr_0": images[0]},
        "not numbers": {"arr_0": np.array([{}] * 6, dtype=object)},
        "holds 3 images.*at least 4": {"arr_0": images[:3]},
        r"has no pixels": {"arr_0": images[:0]},
        "and no arr_0": {"x": images},
        "8 x 6 pixels.*square": {"arr_0": images[:, :6]},
        "some of 8 x 8; they must be alike": {"arr_0": np.zeros((6, 9, 9, 3), np.uint8)},
        r"arr_1 in float64 \(6,\)": {"arr_0": images, "arr_1": np.zeros(6)},
        "has the label 2, but the features tell 2 classes": {"arr_0": images, "arr_1": [2] * 6},
        "far more than the file": None,
        "Fortran's order": {"arr_0": np.asfortranarray(images)},
    }
    path = tmp_path / "bad.npz"
    for message, arrays in broken.items():
        if arrays is None:
            with (
                zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
                archive.open("arr_0.npy", "w") as member,
            ):
                for _ in range(300):
                    member.write(bytes(2**20))
        else:
            np.savez(path, **arrays)
        with pytest.raises(SystemExit, match=rf"bad\.npz.*{message}"):
            main(scoring(place, tmp_path / "out", path))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    (folder / "dataset.json").write_text('{"labels": [["0.png", 1]]}')
    with pytest.raises(SystemExit, match=r"no label of '1\.png' \(4 images"):
        main(scoring(place, tmp_path / "out", folder))
    (folder / "dataset.json").write_text('{"labels": null}')
    Image.new("RGB", (9, 8)).save(folder / "4.png")
    with pytest.raises(SystemExit, match=r"4\.png has 9 x 8 pixels, and the first .* 8 x 8"):
        main(scoring(place, tmp_path / "out", folder))
    with pytest.raises(SystemExit, match="either at least one --checkpoint, or --samples"):
        main([*arguments(place, tmp_path / "out"), "--samples", str(folder)])


def test_rows_of_large_files_are_read_and_written_in_parts(tmp_path):
    """In order, backwards, and after a jump; the file is the one of numpy.savez."""
    values = np.arange(7 * 4 * 2, dtype=np.uint8).reshape(7, 4, 2)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=values)
        rows = NpzRows(tmp_path / "a.npz", "x")
        for part in (slice(0, 3), slice(5, 9), slice(1, 2)):
            assert np.array_equal(rows[part], values[part])
    with open(tmp_path / "b.npz", "wb") as file:
        write_npz(file, {"x": Rows(values.shape, values.dtype, (values[:3], values[3:]))})
    with np.load(tmp_path / "b.npz") as found:
        assert np.array_equal(found["x"], values)
    with open(tmp_path / "c.npz", "wb") as file, pytest.raises(ValueError, match="3 rows"):
        write_npz(file, {"x": Rows(values.shape, values.dtype, (values[:3],))})
