"""No command replaces or deletes what it was given, or what it did not write."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.evaluation_runs import arguments, run, scoring, two_classes, write_place
from tests.training.source_runs import arguments as fit_arguments
from training import fit_source, likelihood, rae, reference
from training.data.preparation import PreparationConfig, prepare
from training.evaluate import main, parse
from training.evaluation.evaluation import Evaluation
from training.loop.checks import check_no_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with data, a model, trained features, and a finished evaluation in `out`."""
    folder = write_place(tmp_path_factory.mktemp("given"))
    run(folder, folder / "out", "--export", "npz", "png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and their contents, without locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".gmflow")
    }


@pytest.mark.parametrize("given", ["png/tiny_gm-ode_2", "npz/tiny_gm-ode_2.npz", "png"])
def test_a_restart_keeps_the_samples_that_it_scores(given, place, tmp_path):
    out = Path(shutil.copytree(place / "out", tmp_path / "out"))
    before = contents(out)
    with pytest.raises(SystemExit, match=r"would be deleted \(--restart\), and --samples"):
        main(scoring(place, out, out / given, more=["--restart"]))
    assert contents(out) == before


def test_a_restart_deletes_what_an_evaluation_wrote_and_nothing_else(place, tmp_path):
    """Files of a training run, and pictures that somebody put into these folders, stay."""
    out = Path(shutil.copytree(place / "out", tmp_path / "out"))
    mine = ["samples/00001000.png", "sheets/mine.png", "npz/mine.npz", "png/mine/000000.png"]
    mine += ["measures/notes.txt", "model.safetensors"]
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"mine")
    evaluation = Evaluation(parse(arguments(place, out, "--restart")))
    assert not evaluation.results.exists()
    left = contents(out)
    assert {name for name in left if "/" in name or name == "model.safetensors"} == set(mine)
    assert all(left[name] == b"mine" for name in mine)


def test_an_export_replaces_exports_only(place, tmp_path):
    out = Path(shutil.copytree(place / "out", tmp_path / "out"))
    more = ["--export", "png", "--count", "40"]
    export = out / "png" / "tiny_gm-ode_2"
    with pytest.raises(SystemExit, match="would be replaced, and --reference"):
        main(arguments(place, out, *more, "--reference", str(export)))
    (export / "mine.txt").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"holds mine\.txt, which no export wrote"):
        main(arguments(place, out, *more))
    assert len(list(export.glob("*.png"))) == 50
    with pytest.raises(SystemExit, match=r"--out .* is in --samples .*give another --out"):
        main(scoring(place, export / "scores", export))


def test_statistics_replace_none_of_their_inputs(place, tmp_path):
    images = tmp_path / "ok.npz"
    np.savez(images, arr_0=two_classes(20)[0].permute(0, 2, 3, 1).numpy())
    (tmp_path / "link").symlink_to(tmp_path)
    classifier = Path(shutil.copy(place / "f.safetensors", tmp_path / "f.safetensors"))
    before = contents(tmp_path)
    given = ["--data", str(images), "--features", str(classifier), "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"ok\.npz would be replaced, and --data .*another --out"):
        reference.main([*given, "--out", str(tmp_path / "link" / "ok.npz")])
    assert contents(tmp_path) == before
    parts = tmp_path / "new.npz.parts"
    parts.mkdir()
    (parts / "mine.txt").write_bytes(b"mine")
    reference.main([*given, "--out", str(tmp_path / "new.npz")])
    assert [path.name for path in parts.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "restart"),
    [
        ("labels.npy", False),
        ("report.png", False),
        ("labels_0.safetensors", False),
        ("source.safetensors", True),
        ("state.safetensors", True),
    ],
)
def test_a_fit_replaces_no_files_of_others(name, restart, place, tmp_path):
    out = tmp_path / "D"
    out.mkdir()
    np.save(out / "x.npy", np.random.default_rng(0).normal(size=(40, 2)))
    if name.endswith(".safetensors"):
        shutil.copy(place / "tiny.safetensors", out / name)
    elif name.endswith(".png"):
        Image.new("RGB", (4, 4)).save(out / name)
    else:
        np.save(out / name, np.arange(40))
    before = contents(out)
    given = fit_arguments(data=out / "x.npy", out=out, modes=2)
    with pytest.raises(SystemExit, match=f"{name} is there, and no fit of this command wrote it"):
        fit_source.main([*given, *(["--restart"] if restart else [])])
    assert contents(out) == before


def test_a_fit_replaces_its_own_files(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 2)))
    out = tmp_path
    given = fit_arguments(data=out / "x.npy", out=out, modes=2)
    for more in ([], ["--restart"]):
        fit_source.main([*given, *more])
    assert np.load(out / "labels.npy").max() == 1
    source = str(out / "source.safetensors")
    with pytest.raises(SystemExit, match=r"source\.safetensors would be replaced, and --source"):
        fit_source.main(["convert", source, "--out", source])


@pytest.mark.parametrize(
    ("main", "given"),
    [
        (fit_source.main, ["convert", "a.npz"]),
        (rae.main, ["convert", "--source", "a.pt"]),
        (rae.main, ["statistics", "--data", "images"]),
        (reference.main, ["--data", "images"]),
    ],
)
def test_files_replace_those_of_their_own_command_only(main, given, place, tmp_path):
    out = tmp_path / f"out.{'npz' if main is reference.main else 'safetensors'}"
    np.savez(tmp_path / "out.npz", mu=np.zeros(2))
    shutil.copy(place / "tiny.safetensors", tmp_path / "out.safetensors")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=f"{out.name} is there already, and training.* delete it"):
        main([*given, "--out", str(out)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["likelihood.csv", "time_averaged.csv"])
def test_likelihoods_replace_their_own_tables_only(name, place, tmp_path):
    """Their own are those of the same columns."""
    given = ["--preset", "quick", "--points", "2", "--out", str(tmp_path)]
    if name == "time_averaged.csv":
        model, data = str(place / "tiny.safetensors"), str(place / "test")
        given = [*given[4:], "--data", data, "--checkpoint", model, "--count", "4"]
        given += ["--device", "cpu"]
    for _ in range(2):
        likelihood.main(given)
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match=f"{name} is there already, and training.likelihood did"):
        likelihood.main(given)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["results.csv", "calls.png", "sheets/tiny_gm-ode_2.png"])
def test_an_evaluation_replaces_no_files_of_others(name, place, tmp_path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(SystemExit, match=f"{path.name} is there already; no evaluation wrote"):
        main(arguments(place, tmp_path / "out"))
    assert path.read_bytes() == b"mine"


def test_class_names_are_no_index(tmp_path):
    names = tmp_path / "out" / "index.json"
    names.parent.mkdir()
    names.write_text("[]")
    given = {"data": tmp_path / "data", "out": names.parent, "class_names": names}
    with pytest.raises(ValueError, match=r"index\.json would be replaced, and --class-names"):
        prepare(PreparationConfig(**given, restart=True, device="cpu"))


def test_a_new_run_replaces_no_weights_without_their_checkpoint(tmp_path):
    check_no_weights(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="would replace it; give another --out, or --restart"):
        check_no_weights(tmp_path)
