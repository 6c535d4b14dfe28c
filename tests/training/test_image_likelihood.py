"""The time-averaged negative log-likelihood of image models: training.likelihood --data."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gmflow_core import GaussianMixture, load_checkpoint, save_checkpoint
from gmflow_core.files.checkpoint import SHIPPED
from tests.training.evaluation_runs import write_model, write_prepared
from training import likelihood
from training.data.shards import LatentDataset
from training.experiments import image_likelihood
from training.experiments.image_likelihood import bits_of_images, mean_and_error
from training.experiments.likelihood import Config


class Exact(torch.nn.Module):
    """The exact model of data N(0, STD^2): u given x_t is one Gaussian."""

    spectrum_net, std = None, 0.5
    config = SimpleNamespace(num_classes=1)

    def __init__(self):
        super().__init__()
        self.of_a_device = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, labels):
        signal, noise = 1 - sigma, sigma
        total = signal**2 * self.std**2 + noise**2  # variance of x_t
        mean = ((noise - signal * self.std**2) / total)[:, None, None, None] * x
        log_std = (self.std / total.sqrt()).log().reshape(-1, 1, 1, 1, 1)
        return GaussianMixture(mean[:, None], torch.zeros_like(x[:, None, :1]), log_std)


def test_the_measure_of_an_exact_model_is_its_entropy(tmp_path):
    """-log2 N(x_0; posterior) has the mean 0.5 log2(2 pi e var), averaged over the times."""
    x0 = 0.5 * torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    folder = write_prepared(tmp_path, x0, torch.zeros(2000).long(), ["one"], "latents")
    config = Config(data=folder, count=2500, batch_size=500)
    bits, spectral = bits_of_images(Exact(), False, LatentDataset(folder), config)
    found = mean_and_error("nll", bits, 2000)
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    variance = 0.25 * t**2 / ((1 - t) ** 2 * 0.25 + t**2)
    expected = (0.5 * (2 * math.pi * math.e * variance).log2()).mean().item()
    assert spectral is None
    assert len(bits) == 2500
    assert 0 < found["nll_error"] < 0.02
    assert found["nll"] == pytest.approx(expected, abs=4 * found["nll_error"])
    again = Config(data=folder, count=2500, batch_size=70)
    same, _ = bits_of_images(Exact(), False, LatentDataset(folder), again)
    assert torch.allclose(same, bits, atol=1e-5)  # whatever the batches
    wide, _ = bits_of_images(Exact(), False, LatentDataset(folder), config, width=2.0)
    # log2(2) more for the normalisation, and 3/4 less of the mean square, which is 1 / (2 ln 2)
    more = 1 - 0.75 * 0.5 / math.log(2)
    assert (wide - bits).mean().item() == pytest.approx(more, abs=0.01)


def test_the_command_compares_models(tmp_path):
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    data = write_prepared(tmp_path / "data", images, torch.arange(30) % 2)
    models = [
        write_model(tmp_path / name, spectrum_layers=layers)
        for name, layers in (("a.safetensors", (8,)), ("b.safetensors", None))
    ]
    given = ["--checkpoint", *models, "--data", data, "--count", "40", "--out", tmp_path]
    likelihood.main([*map(str, given), "--device", "cpu", "--widths", "1", "2"])
    with (tmp_path / "time_averaged.csv").open(newline="") as file:
        first, wider, second, _ = csv.DictReader(file)
    assert (wider["checkpoint"], wider["width"], first["width"]) == ("a", "2.0", "1.0")
    assert wider["nll"] != first["nll"]
    assert (first["checkpoint"], second["checkpoint"]) == ("a", "b")
    assert (first["count"], first["images"]) == ("40", "30")
    assert float(first["difference"]) == 0 != float(second["difference"])
    assert second["spectral_nll"] == ""
    assert float(first["spectral_nll"]) != float(first["nll"])
    difference = float(second["nll"]) - float(first["nll"])
    assert float(second["difference"]) == pytest.approx(difference)
    assert float(second["difference_error"]) > 0


@pytest.mark.parametrize("repeats", [1, 3, 2.5])
def test_repeats_of_images_do_not_shrink_the_error(repeats):
    """Of values that depend on the image alone; and of those that do not, it is the usual one."""
    images = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = images.repeat(4)[: int(repeats * 400)]
    found = mean_and_error("nll", values, 400)
    usual = images.std().item() / math.sqrt(400)
    assert found["nll_error"] == pytest.approx(usual, rel=1e-9 if repeats != 2.5 else 0.05)
    assert found["nll"] == pytest.approx(values.mean().item())
    drawn = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    error = mean_and_error("nll", drawn.double(), 400)["nll_error"]
    assert error == pytest.approx(1 / math.sqrt(len(values)), rel=0.15)


def test_a_stopped_command_goes_on(tmp_path, monkeypatch):
    """Models that are measured are in the table; a model that makes NaN is refused by name."""
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    data = write_prepared(tmp_path / "data", images, torch.arange(30) % 2)
    good, bad = (write_model(tmp_path / f"{name}.safetensors") for name in ("good", "bad"))
    network, _ = load_checkpoint(bad)
    next(network.parameters()).data.fill_(1e30)
    save_checkpoint(network, bad)
    given = ["--data", data, "--count", "40", "--batch-size", "20", "--device", "cpu"]
    given = [*map(str, given), "--out", str(tmp_path / "out"), "--checkpoint"]
    monkeypatch.setattr(image_likelihood, "PART", 20)
    measured, measure = [], image_likelihood.bits_of_images
    spy = lambda *args: measured.append((args[4], args[6].start)) or measure(*args)  # noqa: E731
    monkeypatch.setattr(image_likelihood, "bits_of_images", spy)
    with pytest.raises(SystemExit, match=r"bad\.safetensors: .* likelihoods are not finite"):
        likelihood.main([*given, str(good), str(bad)])
    table = tmp_path / "out" / "time_averaged.csv"
    before = table.read_text()
    assert len(before.splitlines()) == 2
    (tmp_path / "out" / "draws" / "good_1" / "chunk-00001.safetensors").unlink()
    likelihood.main([*given, str(good)])
    assert measured == [("good", 0), ("good", 20), ("bad", 0), ("good", 20)]
    assert table.read_text() == before
    likelihood.main([*given, str(good), "--seed", "1"])
    assert measured[4:] == [("good", 0), ("good", 20)]
    assert table.read_text() != before
    with pytest.raises(SystemExit, match="give --checkpoint with --data"):
        likelihood.main(given[:-1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digits_one_call", "is a student of 1 calls"),
        ("digits_modes_k8", "was trained with a mixture source"),
    ],
)
def test_models_without_such_a_density_are_refused(name, said, tmp_path):
    classes = [str(digit) for digit in range(10 if name == "digits_one_call" else 64)]
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    data: Path = write_prepared(tmp_path, images, torch.arange(2), classes)
    given = ["--checkpoint", SHIPPED / f"{name}.safetensors", "--data", data, "--out", tmp_path]
    with pytest.raises(SystemExit, match=said):
        likelihood.main(list(map(str, given)))
