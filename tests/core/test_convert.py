"""`gmflow convert` and `gmflow inspect` of published models."""

import pytest
import torch

from gmflow_core import load_checkpoint, read_metadata
from gmflow_core.cli import main
from tests.diffusers_folder import same_model


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [("keep", "bfloat16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")],
)
def test_convert_writes_the_same_model_as_one_file(folder, model, tmp_path, capsys, choice, dtype):
    out = tmp_path / "new" / "model.safetensors"
    main(["convert", str(folder), str(out), "--dtype", choice])
    count = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out.startswith(
        f"{out}: GMDiT, parameters: {count:,} in torch.{dtype}, 0.0"
    )
    loaded, _ = load_checkpoint(out, dtype=None)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert read_metadata(out) == read_metadata(folder)
    assert same_model(loaded, model)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_convert_overwrites_only_when_told(folder, tmp_path):
    out = tmp_path / "model.safetensors"
    out.write_text("precious")
    with pytest.raises(SystemExit, match=r"model\.safetensors is there already; .*--force"):
        main(["convert", str(folder), str(out)])
    assert out.read_text() == "precious"
    main(["convert", str(folder), str(out), "--force"])
    main(["convert", str(out), str(out), "--force", "--dtype", "fp32"])
    assert next(load_checkpoint(out, dtype=None)[0].parameters()).dtype == torch.float32


def test_convert_takes_hub_ids_and_refuses_other_names(hub, tmp_path):
    main(["convert", "owner/name", "model.safetensors"])
    assert read_metadata(tmp_path / "model.safetensors")["data"]["space"] == "sd-vae"
    with pytest.raises(SystemExit, match=r"model\.ckpt must end in \.safetensors"):
        main(["convert", "owner/name", "model.ckpt"])


def test_inspect_shows_what_the_samples_are(hub, folder, tmp_path, capsys):
    for source in (str(folder), "owner/name"):
        main(["inspect", source])
        out = capsys.readouterr().out
        assert f"{source}: GMDiT" in out
        data = '10 labels ("tench, Tinca tinca", "class 1", "größer", ...), space "sd-vae"'
        assert f"data: {data}, scaling_factor 0.18215" in out
