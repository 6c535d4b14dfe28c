"""Test the coloured digits and the measures of their saturation."""

import colorsys

import numpy as np
import pytest
import torch

from training.data import digits
from training.data.preparation import PreparationConfig, prepare
from training.data.shards import LatentDataset, to_pixels
from training.digits import main as digits_main
from training.evaluation.saturation import image_saturation, saturation_cdf, saturation_distance


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
    with pytest.raises(ValueError, match="not finite"):
        saturation_distance(torch.tensor([0.5, float("nan")]))
