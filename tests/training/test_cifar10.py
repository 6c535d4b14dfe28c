"""Test the command that writes CIFAR-10's pictures, on small files in the layout of its own."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from training.cifar10 import main
from training.data.cifar10 import NAMES, PARTS, RECORD


def write_files(folder, count=3, labels=10, left_out=()):
    """Write files of `count` records; return their pictures (files, n, 32, 32, 3) and labels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (len(PARTS), count, 32, 32, 3), np.uint8)
    numbers = rng.integers(0, labels, (len(PARTS), count), np.uint8)
    (folder / NAMES).write_text(
        "\n".join(["airplane", "cat", *(f"c{i}" for i in range(8))]) + "\n\n"
    )
    for name, own, classes in zip(PARTS, pictures, numbers, strict=True):
        planes = own.transpose(0, 3, 1, 2).reshape(count, -1)
        content = np.concatenate([classes[:, None], planes], 1).tobytes()
        if name not in left_out:
            (folder / name).write_bytes(content)
    return pictures, numbers


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_and_classes_are_those_of_the_files(tmp_path, capsys, packed):
    source = tmp_path / "cifar-10-batches-bin"
    pictures, numbers = write_files(source, labels=2)
    if packed:
        source = tmp_path / "cifar-10-binary.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    out = tmp_path / "out"
    main(["--data", str(source), "--out", str(out)])
    assert "15 pictures" in capsys.readouterr().out
    for part, own, classes in (
        ("train", pictures[:-1].reshape(-1, 32, 32, 3), numbers[:-1].reshape(-1)),
        ("test", pictures[-1], numbers[-1]),
    ):
        for number, (picture, label) in enumerate(zip(own, classes, strict=True)):
            path = out / part / ("airplane", "cat")[label] / f"{number:05d}.png"
            assert (np.asarray(Image.open(io.BytesIO(path.read_bytes()))) == picture).all()
        assert len(list((out / part).rglob("*.png"))) == len(own)


@pytest.mark.parametrize(
    ("settings", "damage", "said"),
    [
        ({"left_out": ["data_batch_4.bin"]}, None, r"has no data_batch_4\.bin"),
        ({"labels": 30}, None, "has the label 2[0-9] of 10 classes"),
        ({}, lambda content: content[:-1], f"bytes, which is no multiple of {RECORD:,}"),
    ],
)
def test_wrong_files_are_named_and_leave_nothing(tmp_path, settings, damage, said):
    write_files(tmp_path / "data", **settings)
    if damage:
        path = tmp_path / "data" / "test_batch.bin"
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit, match=said):
        main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(SystemExit, match=r"cannot be read .*give cifar-10-binary\.tar\.gz"):
        main(["--data", str(tmp_path / "text"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9, -6])
def test_a_damaged_archive_is_refused(tmp_path, place):
    """One bit is wrong, in the pictures or in the checksum at the end."""
    write_files(tmp_path / "files")
    source = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(tmp_path / "files", "cifar-10-batches-bin")
    content = bytearray(source.read_bytes())
    content[place if place < 0 else int(place * len(content))] ^= 4
    source.write_bytes(content)
    with pytest.raises(SystemExit, match=r"cannot be read .*give cifar-10-binary\.tar\.gz"):
        main(["--data", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
