"""The command that measures the latents of an RAE: stopped and started again, what it needs."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training.source_runs import arguments
from tests.training.test_rae import write_images, write_rae
from training.data import rae_statistics
from training.rae import main


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """For an rae.json that names the very file that is to be written; one image is broken."""
    data = write_images(tmp_path / "images")
    (data / "a" / "1.png").write_bytes(b"no picture")
    folder = write_rae(tmp_path / "rae", statistics="new.safetensors")
    given = ["statistics", *arguments(data=data, vae=folder, batch_size=2, workers=0)]
    main([*given, "--out", str(tmp_path / "whole.safetensors")])
    add, counts = rae_statistics.add_latents, []

    def stopped(moments, latents):
        counts.append(len(latents))
        if len(counts) == 3:
            raise KeyboardInterrupt
        add(moments, latents)

    monkeypatch.setattr(rae_statistics, "KEEP_EVERY", -1.0)
    monkeypatch.setattr(rae_statistics, "add_latents", stopped)
    out = ["--out", str(folder / "new.safetensors")]
    with pytest.raises(SystemExit, match="130"):
        main([*given, *out])
    with pytest.raises(SystemExit, match=r"moments_0\.safetensors is of another fit"):
        main([*given, *out, "--seed", "1"])
    main([*given, *out])
    assert counts == [1, 2, 2, 2, 2, 2]
    found, whole = (
        load_file(p) for p in (folder / "new.safetensors", tmp_path / "whole.safetensors")
    )
    for name, values in whole.items():
        torch.testing.assert_close(found[name], values)
    assert not (folder / "new.safetensors.parts").exists()
