"""Test the reader of prepared data: from memory, disk and workers, and of damaged folders."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tests.training.image_folders import run, write_images
from training.data.shards import LatentDataset, read_index, shard_name, to_model, to_pixels


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def test_uint8_mapping():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model(values)), values)
    assert to_model(values)[[0, 255]].tolist() == [-1, 1]
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


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
    for change in ({"format": "gmflow-latents-9"}, {"kind": "tokens"}, {"dtype": "float8"}):
        write(**change)
        with pytest.raises(ValueError, match="update GMFlow"):
            LatentDataset(out)
    (out / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"no readable content .*delete it"):
        LatentDataset(out)
    (out / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="goes on where it stopped"):
        LatentDataset(out)
