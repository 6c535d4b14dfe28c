"""Test the preparation of images: crops, flips, latents, restarts, bad data."""

import io
import json
import signal
from shlex import split

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import forked
from tests.clusters import same_source
from tests.training.image_folders import run, shards, write_images, write_tiny_vae
from tests.training.source_runs import config
from tests.training.test_rae import write_rae
from training.data.image_folder import ImageCrops, list_images
from training.data.pictures import centre_crop, read_rgb
from training.data.preparation import PreparationConfig
from training.data.shards import LatentDataset, read_index, shard_name, to_model, to_pixels
from training.encoders.load import load_vae
from training.evaluation.real_images import PreparedImages
from training.imagenet import parse
from training.loop.image_trainer import ImageTrainer
from training.prepare import main
from training.source import fitting
from training.source.fitting import fit


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def tiny_vae(tmp_path):
    return write_tiny_vae(tmp_path / "pipeline")


def test_crop_by_hand():
    """Crop 8x4 to 2: halve by averages to 4x2, then take the columns of 2-3 and 4-5."""
    values = np.arange(32, dtype=np.uint8).reshape(4, 8) * 4
    cropped = np.array(centre_crop(Image.fromarray(values), 2))
    assert cropped.tolist() == [
        [(8 + 12 + 40 + 44) // 4, (16 + 20 + 48 + 52) // 4],
        [26 + 64, 34 + 64],
    ]
    wide = np.arange(15, dtype=np.uint8).reshape(3, 5)  # nothing to scale: columns 1 to 3
    assert np.array(centre_crop(Image.fromarray(wide), 3)).tolist() == wide[:, 1:4].tolist()
    assert centre_crop(Image.new("RGB", (3, 50), (7, 8, 9)), 8).getcolors() == [
        (64, (7, 8, 9))
    ]  # enlarged


@pytest.mark.parametrize(
    ("mode", "value", "seen"),
    [
        ("L", 90, (90,) * 3),
        ("I;16", 90 * 257, (90,) * 3),
        ("1", 1, (255,) * 3),
        ("RGBA", (9, 8, 7, 0), (255, 255, 255)),
    ],
)
def test_any_kind_of_pixel_becomes_rgb(mode, value, seen):
    file = io.BytesIO()
    Image.new(mode, (2, 2), value).save(file, "png")
    assert read_rgb(file.getvalue()).getcolors() == [(4, seen)]


def test_pixels_as_they_are(images, tmp_path):
    index = run(images, tmp_path / "out", flip=False)
    assert (index["count"], index["classes"], index["shape"], index["skipped"]) == (
        13,
        ["cat", "dog"],
        [3, 8, 8],
        [],
    )
    data = LatentDataset(tmp_path / "out")
    assert (len(data), data.shape, data.kind, data.classes) == (
        13,
        (3, 8, 8),
        "pixels",
        ["cat", "dog"],
    )
    files = list_images(images).files
    assert files == sorted(files)
    assert "cat/deeper/3.png" in files
    position = files.index("dog/5.webp" if "dog/5.webp" in files else "dog/3.png")
    x, label = data[position]
    expected = np.array(Image.open(images / files[position]).convert("RGB"))
    assert np.array_equal(to_pixels(x[None])[0].permute(1, 2, 0).numpy(), expected)
    assert label == 1


def test_flip_is_chance_of_the_image_alone(images, tmp_path):
    run(images, tmp_path / "whole", batch_size=32, shard_size=100)
    run(images, tmp_path / "parts", batch_size=2, workers=1)
    run(images, tmp_path / "straight", flip=False)
    run(images, tmp_path / "other", seed=1)
    whole, parts, straight, other = (
        LatentDataset(tmp_path / name).__getitems__(range(13))[0]
        for name in ("whole", "parts", "straight", "other")
    )
    assert torch.equal(whole, parts)
    same = (whole == straight).flatten(1).all(1)
    mirrored = (whole == straight.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 2 < mirrored.sum() < 11
    assert not torch.equal(whole, other)


def test_two_processes_write_the_same_bytes(images, tmp_path):
    (images / "dog" / "9.png").write_bytes(b"no image")
    run(images, tmp_path / "one")
    options = split("--size 8 --pixels --shard-size 5 --batch-size 3 --workers 1 --device cpu")
    given = ["--data", images, "--out", tmp_path / "two", *options]
    ends = forked.run_ranks("-m", "training.prepare", *given)
    assert [status for *_, status in ends] == [0, 0], ends
    assert "".join(out for out, *_ in ends).count("9.png") == 1  # told once
    assert len(shards(tmp_path / "one")) == 3
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert read_index(tmp_path / "one") == read_index(tmp_path / "two")


def test_two_processes_refuse_the_folder_of_another_plan_together(images, tmp_path):
    out = tmp_path / "out"
    run(images, out)
    options = split("--size 16 --pixels --workers 1 --device cpu")
    ends = forked.run_ranks("-m", "training.prepare", "--data", images, "--out", out, *options)
    for _, said, status in ends:
        assert status == 1, ends
        assert "size" in said, ends


@pytest.mark.parametrize("flip", [True, False])
def test_restart_rewrites_only_what_is_not_whole(images, tmp_path, flip):
    out = tmp_path / "out"
    index = run(images, out, flip=flip)
    before, kept = shards(out), (out / shard_name(1)).stat().st_mtime_ns
    (out / shard_name(0)).unlink()
    (out / shard_name(2)).write_bytes(before[shard_name(2)][:-7])
    (out / "index.json").unlink()
    (out / ".shard-00000.safetensors.x.tmp").write_bytes(b"killed while it wrote")
    assert run(images, out, flip=flip, batch_size=2) == index
    assert shards(out) == before
    assert (out / shard_name(1)).stat().st_mtime_ns == kept
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_whole_shards(number, images, tmp_path, monkeypatch):
    run(images, tmp_path / "whole")
    read = ImageCrops.__getitem__

    def interrupted(self, index):
        if index == 7:  # in the second shard
            signal.raise_signal(number)
        return read(self, index)

    monkeypatch.setattr(ImageCrops, "__getitem__", interrupted)
    options = split("--size 8 --pixels --shard-size 5 --batch-size 1 --workers 0 --device cpu")
    with pytest.raises(SystemExit, match="130"):
        main(["--data", str(images), "--out", str(tmp_path / "out"), *options])
    assert list(shards(tmp_path / "out")) == [shard_name(0)]
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.undo()
    run(images, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_bad_images_are_left_out_by_name(images, tmp_path, capsys):
    whole = (images / "cat" / "0.png").read_bytes()
    (images / "cat" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (images / "dog" / "empty.jpg").write_bytes(b"")
    (images / "dog" / "text.jpeg").write_text("hello")
    index = run(images, tmp_path / "out", workers=1)
    reasons = {entry["file"]: entry["reason"] for entry in index["skipped"]}
    assert reasons.keys() == {"cat/truncated.png", "dog/empty.jpg", "dog/text.jpeg"}
    assert reasons["dog/empty.jpg"] == "the file is empty"
    assert index["count"] == len(LatentDataset(tmp_path / "out")) == 13
    assert LatentDataset(tmp_path / "out").labels.bincount().tolist() == [7, 6]
    told = capsys.readouterr().out
    assert all(str(images / name) in told for name in reasons)
    assert run(images, tmp_path / "out") == index  # nothing to do, still reported
    assert "text.jpeg" in capsys.readouterr().out


def test_class_names(images, tmp_path):
    file = tmp_path / "names.json"
    for names in (
        ["Katze", "Hund"],
        {"dog": "Hund", "cat": "Katze", "eel": "Aal"},
        {"0": "Katze", "1": "Hund"},
    ):
        file.write_text(json.dumps(names))
        assert run(images, tmp_path / "out", class_names=file)["classes"] == ["Katze", "Hund"]
    for names, message in (
        (["Katze"], "names 1 classes, but .* 2 class folders"),
        ({"dog": "Hund"}, "not 'cat'"),
        (3, "list"),
    ):
        file.write_text(json.dumps(names))
        with pytest.raises(ValueError, match=message):
            run(images, tmp_path / "out", class_names=file)
    with pytest.raises(FileNotFoundError, match="--class-names"):
        run(images, tmp_path / "out", class_names=tmp_path / "none.json")


def test_other_settings_are_refused(images, tmp_path):
    out = tmp_path / "out"
    run(images, out)
    with pytest.raises(ValueError, match=r"size: 8 there, 4 here.*--restart"):
        run(images, out, size=4)
    (images / "cat" / "new.png").write_bytes((images / "cat" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"images: 13 there, 14 here, not the same list"):
        run(images, out)
    assert run(images, out, restart=True, shard_size=100)["count"] == 14
    assert len(shards(out)) == 1
    (out / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards but no plan.json"):
        run(images, out)


def test_errors_name_the_folder_and_the_fix(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        run(tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match=r"cat/deeper.* has no class folders"):
        run(images / "cat" / "deeper", out)
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in them"):
        run(tmp_path / "bare", out)
    with pytest.raises(ValueError, match="is inside --data"):
        run(images, images / "out")
    (images / "eel").mkdir()
    with pytest.raises(ValueError, match=r"1 of the 3 class folders .*eel; put images there"):
        run(images, out)
    (images / "eel" / "0.png").write_bytes(b"mud")
    with pytest.raises(ValueError, match=r"none of the images in .*eel can be read .*--restart"):
        run(images, out)
    assert not (out / "index.json").exists()
    (images / "eel" / "0.png").unlink()
    (images / "eel" / "0.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"none of the images in .*eel .*\(the first: a link to n"):
        run(images, tmp_path / "out2")
    with pytest.raises(SystemExit, match=r"error: there is no folder .*nowhere"):
        main(["--data", str(tmp_path / "nowhere"), "--out", str(out)])
    for wrong in ({"size": 0}, {"shard_size": 0}, {"workers": -1}, {"seed": -1}, {"device": "gpu"}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            PreparationConfig(data=images, out=out, **wrong)


def test_latents_are_posterior_samples(images, tiny_vae, tmp_path):
    index = run(images, tmp_path / "out", pixels=False, vae=str(tiny_vae), batch_size=4)
    assert (index["kind"], index["shape"], index["vae"]) == ("latents", [4, 4, 4], str(tiny_vae))
    assert index["scaling_factor"] == 0.18215
    vae, data = load_vae(tiny_vae), LatentDataset(tmp_path / "out")
    crops = ImageCrops(list_images(images), 8, True, 0, (4, 4, 4))
    items = [crops[i] for i in range(13)]
    pictures, noise = (
        to_model(torch.stack([i.pixels for i in items])),
        torch.stack([i.noise for i in items]),
    )
    posterior = vae.network.encode(pictures).latent_dist
    expected = (posterior.mean + posterior.std * noise) * 0.18215
    found = data.__getitems__(range(13))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.1
    assert vae.decode(found).shape == (13, 3, 8, 8)
    run(images, tmp_path / "parts", pixels=False, vae=str(tiny_vae), batch_size=13, shard_size=100)
    torch.testing.assert_close(
        LatentDataset(tmp_path / "parts").__getitems__(range(13))[0], found, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="give a multiple of 2"):
        run(images, tmp_path / "odd", pixels=False, vae=str(tiny_vae), size=7)


def test_float16_shards_of_rae_latents_load_and_train(images, tmp_path, monkeypatch):
    rae, x = write_rae(tmp_path), {}
    for picture in ("draw_report", "draw_weights"):
        monkeypatch.setattr(fitting, picture, lambda *_: None)
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        index = run(images, out, pixels=False, vae=str(rae), dtype=dtype)
        assert (index["dtype"], index["space"], index["shape"]) == (dtype, "rae", [8, 4, 4])
        data = LatentDataset(out)
        assert {load_file(path)["x"].dtype for path in out.glob("shard-*")} == {data.dtype}
        x[dtype] = data.__getitems__(range(13))[0]
        on_disk = LatentDataset(out, in_memory=False).__getitems__(range(13))[0]
        assert torch.equal(on_disk, x[dtype])
        assert run(images, out, pixels=False, vae=str(rae), dtype=dtype) == index  # goes on
    assert x["float16"].dtype == torch.float32
    assert torch.equal(x["float16"], x["float32"].half().float())
    assert not torch.equal(x["float16"], x["float32"])
    vae, rows = load_vae(rae), range(13)  # as training.evaluate reads them, decoded
    folders = [PreparedImages(tmp_path / each, 13, vae, torch.device("cpu"), 4) for each in x]
    real = [folder.get(rows)[0].int() for folder in folders]
    assert (real[0] - real[1]).abs().max() <= 2
    sources = [
        fit(config(tmp_path / each, tmp_path / "fits" / each, modes=2, flip=False)) for each in x
    ]
    same_source(*sources, 5e-3)
    losses = {}
    for dtype in x:
        given = f"--preset ditdh_s --data {tmp_path / dtype} --out {tmp_path / 'run'}-{dtype}"
        sizes = "--num-layers 1 --num-heads 1 --ddt-layers 1 --ddt-width 16 --ddt-heads 1"
        rest = "--batch-size 8 --iterations 9 --warmup 0 --optimizer adamw --device cpu --workers 0"
        trainer = ImageTrainer(parse(split(f"{given} {sizes} {rest}")))
        losses[dtype] = [trainer.iterate()["loss"].item() for _ in range(3)]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-2)


def test_another_type_is_refused_in_a_folder_that_is_begun(images, tiny_vae, tmp_path):
    latents = {"pixels": False, "vae": str(tiny_vae)}
    run(images, tmp_path / "out", **latents)
    # as in older versions, so that their folders go on
    assert "dtype" not in json.loads((tmp_path / "out" / "plan.json").read_text())
    with pytest.raises(ValueError, match=r"\(dtype: float32 there, float16 here\)"):
        run(images, tmp_path / "out", dtype="float16", **latents)
    run(images, tmp_path / "half", dtype="float16", **latents)
    with pytest.raises(ValueError, match=r"\(dtype: float16 there, float32 here\)"):
        run(images, tmp_path / "half", **latents)
    with pytest.raises(ValueError, match="--dtype is float16; it must be left out with --pixels"):
        PreparationConfig(data=images, out=tmp_path, pixels=True, dtype="float16")


def test_latents_that_float16_cannot_hold_are_refused(images, tiny_vae, tmp_path):
    config = tiny_vae / "vae" / "config.json"
    config.write_text(
        config.read_text().replace('"scaling_factor": 0.18215', '"scaling_factor": 1e7')
    )
    with pytest.raises(FloatingPointError, match=r"latents up to .*; give --dtype float32"):
        run(images, tmp_path / "out", pixels=False, vae=str(tiny_vae), dtype="float16")


def test_damaged_vaes(tiny_vae, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor vae/config.json"):
        load_vae(tmp_path)
    weights = next((tiny_vae / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors.pop("quant_conv.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing, first quant_conv.weight"):
        load_vae(tiny_vae)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole AutoencoderKL"):
        load_vae(tiny_vae)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="copy the weights there"):
        load_vae(tiny_vae)


def test_parts_of_a_data_set_are_no_classes(images, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for part in ("train", "test"):
        (whole / part).symlink_to(images)
    with pytest.raises(ValueError, match=r"test and train, which are parts .*give --data .*test"):
        list_images(whole)
