"""`gmflow sample` of images: what it writes and keeps, and which options go together."""

import pytest
import torch
from PIL import Image

from gmflow_core import pipeline as pipeline_module
from gmflow_core.cli import main
from gmflow_core.files.checkpoint import SHIPPED
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


def test_a_mistake_before_the_first_picture_is_said_alone(tmp_path, capsys):
    with pytest.raises(SystemExit, match="guidance scale"):
        sample(tmp_path / "out", "--guidance", 4)
    assert "written" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
