"""Preparation of images: the crop, what chance depends on, restarts, bad data, the VAE, the reader; and the coloured digits."""

import colorsys
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from training.data import digits
from training.data.image_folder import ImageCrops, centre_crop, list_images, read_rgb
from training.data.preparation import PreparationConfig, prepare
from training.data.shards import LatentDataset, read_index, shard_name, to_model, to_pixels
from training.digits import main as digits_main
from training.encoders.load import load_vae
from training.evaluation.saturation import image_saturation, saturation_cdf, saturation_distance
from training.prepare import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path):
    """Two classes of random pictures of several sizes and formats: 7 and 6."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for folder, count in (("cat", 7), ("dog", 6)):
        for number in range(count):
            size = (8, 8, 3) if number % 2 else (17, 20 + number, 3)
            path = (
                root
                / folder
                / ("deeper" if number == 3 else "")
                / f"{number}.{('png', 'bmp', 'webp')[number % 3]}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
        (root / folder / "notes.txt").write_text("not an image")
    return root


def run(data, out, **options):
    settings = {
        "size": 8,
        "pixels": True,
        "shard_size": 5,
        "workers": 0,
        "device": "cpu",
        **options,
    }
    return prepare(PreparationConfig(data=data, out=out, **settings))


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture
def tiny_vae(tmp_path):
    """A random AutoencoderKL in a folder laid out as the published pipeline is."""
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers does not import: {error}")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    network = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        **blocks,
    )
    network.save_pretrained(tmp_path / "pipeline" / "vae", variant="bf16")
    return tmp_path / "pipeline"


def test_crop_by_hand():
    """8x4 to 2: halved once by averages to 4x2, then the middle columns, which are the averages of columns 2-3 and 4-5."""
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
        ("RGBA", (9, 8, 7, 0), (9, 8, 7)),
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


def test_uint8_mapping():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model(values)), values)
    assert to_model(values)[[0, 255]].tolist() == [-1, 1]
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


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
    options = [
        "--size",
        "8",
        "--pixels",
        "--shard-size",
        "5",
        "--batch-size",
        "3",
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m training.prepare"
    command = [sys.executable, *launcher.split()]
    done = subprocess.run(
        [*command, "--data", str(images), "--out", str(tmp_path / "two"), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9.png") == 1  # told once
    assert len(shards(tmp_path / "one")) == 3
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert read_index(tmp_path / "one") == read_index(tmp_path / "two")


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
    options = [
        "--size",
        "8",
        "--pixels",
        "--shard-size",
        "5",
        "--batch-size",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
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
    with pytest.raises(OSError, match=r"eel/0.png cannot be read"):
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


def test_reading_from_disk_and_from_workers(images, tmp_path):
    run(images, tmp_path)
    memory, disk = LatentDataset(tmp_path), LatentDataset(tmp_path, in_memory=False)
    order = [12, 0, 5, 4, 4, 9]
    for found, expected in zip(disk.__getitems__(order), memory.__getitems__(order), strict=True):
        assert torch.equal(found, expected)
    loader = DataLoader(
        disk, batch_size=4, num_workers=2, collate_fn=lambda batch: batch
    )  # after this process opened files
    x, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(x, memory.__getitems__(range(13))[0])
    assert torch.equal(labels, memory.labels)
    assert torch.equal(memory[-1][0], x[12])
    with pytest.raises(IndexError, match="sample 13 of 13"):
        memory[13]


def test_parts_of_a_data_set_are_no_classes(images, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for part in ("train", "test"):
        (whole / part).symlink_to(images)
    with pytest.raises(ValueError, match=r"test and train, which are parts .*give --data .*test"):
        list_images(whole)


def test_reader_errors(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        FileNotFoundError, match=r"python -m training.prepare --data IMAGES --out .*out"
    ):
        LatentDataset(out)
    run(images, out)
    index, shard = read_index(out), out / shard_name(1)
    whole = shard.read_bytes()

    def write(**changes):
        (out / "index.json").write_text(json.dumps({**index, **changes}))

    shard.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=r"shard-00001.safetensors is truncated .*rewrites only that shard"
    ):
        LatentDataset(out)
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"shard-00001.safetensors is missing; run the same prepare command"
    ):
        LatentDataset(out)
    shard.write_bytes((out / shard_name(2)).read_bytes())
    with pytest.raises(ValueError, match=r"holds 3 samples .*says 5 "):
        LatentDataset(out)
    save_file({"y": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=r"holds \['y'\] instead of x and labels"):
        LatentDataset(out)
    shard.write_bytes(whole)
    write(classes=["cat"])
    with pytest.raises(ValueError, match=r"labels from 0 to 1, but index.json lists 1 classes"):
        LatentDataset(out)
    write(count=14)
    with pytest.raises(ValueError, match="says 14 samples, but its shards add up to 13"):
        LatentDataset(out)
    write(format="gmflow-latents-9")
    with pytest.raises(ValueError, match="update GMFlow"):
        LatentDataset(out)
    (out / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        LatentDataset(out)
    (out / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="goes on where it stopped"):
        LatentDataset(out)


def test_digits_folder(tmp_path, capsys):
    pytest.importorskip("sklearn")
    digits_main(["--out", str(tmp_path / "digits"), "--copies", "2"])
    assert "2876 pictures" in capsys.readouterr().out
    sources = {}
    for part in ("train", "test"):
        index = prepare(
            PreparationConfig(
                data=tmp_path / "digits" / part,
                out=tmp_path / part,
                size=8,
                pixels=True,
                flip=False,
                workers=0,
            )
        )
        assert index["classes"] == [str(n) for n in range(10)]
        sources[part] = {
            path.name.split("_")[0] for path in (tmp_path / "digits" / part).rglob("*.png")
        }
    assert not sources["train"] & sources["test"]
    assert len(sources["train"] | sources["test"]) == 1797
    shares = [LatentDataset(tmp_path / part).labels.bincount() for part in ("train", "test")]
    assert ((shares[1] / (shares[0] + shares[1]) - 0.2).abs() < 0.005).all()
    pictures = to_pixels(LatentDataset(tmp_path / "train").__getitems__(range(2876))[0])
    measured = image_saturation(pictures)
    assert saturation_distance(measured) < 0.06  # 0.035 is usual for as many exact draws
    assert saturation_distance(measured * 1.3) > 0.25
    assert saturation_distance(torch.ones(10)) == pytest.approx(1)
    with pytest.raises(SystemExit, match="exists already; delete it"):
        digits_main(["--out", str(tmp_path / "digits")])


@pytest.mark.parametrize("size", [8, 16])
def test_saturation_is_measured_as_drawn(size):
    rng = np.random.default_rng(0)
    for saturation in (0.1, 0.35, 0.9):
        hue = rng.random()
        rgb = digits.colour(hue, saturation)
        assert rgb == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, 1), abs=1e-12)
        picture = digits.draw_digit(rng.integers(0, 17, (8, 8)), rgb, size)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        assert pixels.shape == (1, 3, size, size)
        assert image_saturation(pixels).item() == pytest.approx(saturation, abs=0.01)
        assert image_saturation(pixels / 255).item() == pytest.approx(
            image_saturation(pixels).item(), abs=1e-6
        )
    assert image_saturation(torch.zeros(2, 3, 4, 4)).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\)"):
        image_saturation(torch.zeros(3, 8, 8))


def test_known_distribution_of_saturation():
    rng = np.random.default_rng(0)
    draws = torch.tensor([digits.draw_saturation(rng) for _ in range(20_000)])
    assert saturation_cdf(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist() == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )
    assert (draws.sort().values.float() > 0.1).all()
    assert (
        saturation_cdf(draws.sort().values) - torch.linspace(0, 1, 20_000)
    ).abs().max() < 0.015  # Kolmogorov-Smirnov
    assert saturation_distance(draws) < 0.02
    with pytest.raises(ValueError, match="all finite"):
        saturation_distance(torch.tensor([0.5, float("nan")]))
