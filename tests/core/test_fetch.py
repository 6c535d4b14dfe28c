"""`gmflow fetch` from a stand-in for the hub: resumed, checked, and errors that say what to do."""

import hashlib
import json
import os

import pytest

from gmflow_core.cli import main
from gmflow_core.files.errors import WriteError
from gmflow_core.files.fetching import RemoteFile, check_room, part_of
from gmflow_core.files.published import ENCODERS, IMAGENET, all_parts, parts_of
from tests import forked
from tests.hub_server import hub_server

MODEL = IMAGENET.split("/")[1]
TRANSFORMER = "transformer/diffusion_pytorch_model.bf16.safetensors"
ADAPTER = "gmflux_k8_piid_4step/diffusion_pytorch_model.safetensors"
MIB = 2**20  # the client writes 10 MiB at a time
SCRIPT = """
import json, sys
from gmflow_core.cli import main
from gmflow_core.files.hub_file import HubFile
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as error:
        print(error)
    print("--", flush=True)
print(HubFile("Lakonik/pi-FLUX.1", "gmflux_k8_piid_4step").cached())
"""


@pytest.fixture
def remote(tmp_path):
    """The folder of a hub with a model and an adapter, of random bytes."""
    folder = tmp_path / "hub"
    for repository, path, size in (
        (IMAGENET, TRANSFORMER, 14 * MIB),
        (IMAGENET, "vae/diffusion_pytorch_model.bf16.safetensors", 5000),
        (IMAGENET, "spectrum_net/diffusion_pytorch_model.safetensors", 100),
        (IMAGENET, "transformer/config.json", 20),
        (IMAGENET, "model_index.json", 50),
        (IMAGENET, "README.md", 10),
        (IMAGENET, "transformer/diffusion_pytorch_model.fp16.safetensors", 10),
        ("Lakonik/pi-FLUX.1", ADAPTER, 1000),
        ("Lakonik/pi-Qwen-Image", ADAPTER.replace("flux", "qwen"), 1000),
        ("Lakonik/pi-FLUX.2", "other.safetensors", 1000),
    ):
        place = folder / repository / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.urandom(size))
    return folder


def start(hub, home, *commands):
    """Start `gmflow` with commands, one after the other."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    given = "-c", SCRIPT, json.dumps(commands)
    return forked.Process(*given, imports=forked.LIBRARY, environment=environment)


def test_a_killed_fetch_goes_on_and_what_arrives_is_checked(remote, tmp_path):
    out, comfyui, home = tmp_path / "out", tmp_path / "ComfyUI", tmp_path / "home"
    (comfyui / "models").mkdir(parents=True)
    fetch, adapter = ["fetch", "gmflow", "--to", str(out)], ["fetch", "pi-flow", "--only"]
    with hub_server(remote) as hub:
        hub.stop_at[TRANSFORMER] = 12 * MIB
        process = start(hub, home, fetch)
        try:
            assert hub.stopped.wait(300)
            parts = out / MODEL / "transformer"
            while not any(path.stat().st_size for path in parts.glob(".*.part")):
                assert process.poll() is None
        finally:
            process.kill()
            process.communicate()
            hub.stopped.clear()
        hub.damaged.add(ADAPTER)
        hub.gated.add("Lakonik/pi-Qwen-Image")
        changed = out / MODEL / "model_index.json"
        process = start(
            hub,
            home,
            fetch,
            [*adapter, "gmflux_k8_piid_4step", "--comfyui", str(comfyui)],
            [*adapter, "gmqwen_k8_piid_4step", "--to", str(out)],
            [*adapter, "gmflux2_k8_piid_4step", "--to", str(out)],
            [*adapter, "arcflow-flux-2steps", "--to", str(out)],
        )
        said, shown = process.communicate()
        fetched, damaged, gated, missing, unknown = said.split("--\n")[:5]
        counts = [fetched.count(f"{how}, size and digest right") for how in ("there", "fetched")]
        assert counts == [3, 2], said + shown
        each = zip(hub.fetched, hub.starts, strict=True)
        starts = [at for name, at in each if name == TRANSFORMER]
        assert starts[0] == 0 < starts[1]
        for path in (out / MODEL).rglob("*.*"):
            if path.is_file() and not path.name.startswith("."):
                name = path.relative_to(out / MODEL)
                assert path.read_bytes() == (remote / IMAGENET / name).read_bytes()
        assert not list(out.rglob("*.part"))
        assert not (out / MODEL / "README.md").exists()
        assert "was damaged on its way: it has the SHA-256" in damaged
        assert "accept them on https://huggingface.co/Lakonik/pi-Qwen-Image" in gated
        assert "has no file gmflux2_k8_piid_4step/*.safetensors on the hub" in missing
        assert "the hub has no such repository, or it is private" in unknown
        assert all(len(text.splitlines()) == 1 for text in (damaged, gated, missing, unknown))

        hub.damaged.clear()
        changed.write_text("mine")
        (remote / IMAGENET / "vae" / "diffusion_pytorch_model.bf16.safetensors").unlink()
        count = len(hub.fetched)
        flux = [*adapter, "gmflux_k8_piid_4step"]
        there = [*flux, "--comfyui", str(comfyui)]
        process = start(hub, home, fetch, [*fetch, "--force"], there, flux)
        said, shown = process.communicate()
        other, forced, placed, cached, found = said.split("--\n")
        assert "is there already and is another file" in other
        assert (forced.count(": there,"), forced.count(": fetched,")) == (3, 1), said + shown
        assert f"the hub does not have {IMAGENET}/vae/*.safetensors; it was published" in forced
        assert (comfyui / "models" / "loras" / ADAPTER).read_bytes() == (
            remote / "Lakonik/pi-FLUX.1" / ADAPTER
        ).read_bytes()
        assert "fetched" in placed
        assert str(home) in cached
        assert found == cached  # without asking the hub
        assert hub.fetched[count:] == ["model_index.json", ADAPTER, ADAPTER]


def test_lists_ask_nobody_and_name_all_files(capsys):
    main(["fetch", "mm-fm", "--encoder", "siglip2-b", "--list"])
    told = capsys.readouterr().out
    for part in parts_of("mm-fm", "siglip2-b"):
        assert all(file in told for file in part.files)
    assert "checkpoints/siglip2-b/mode-gmm-25k.pt" in told
    assert "autoguidance" not in told  # its guides are DINOv2's
    main(["fetch", "gmflow", "--list", "--only", "comfyui-vae"])
    assert IMAGENET not in capsys.readouterr().out
    for encoder in ENCODERS:
        assert len({part.name for part in all_parts("mm-fm", encoder)}) >= 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pi-flow", "--only", "x"], "pi-flow has no part 'x'; its parts: gmflux_k8_piid_4step,"),
        (["gmflow", "--encoder", "mae-b"], "--encoder is for mm-fm"),
        (["gmflow", "--comfyui", "PLACE"], r"holds no models/; give the folder of ComfyUI"),
    ],
)
def test_what_cannot_be_fetched_is_said_first(arguments, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        main(["fetch", *(text.replace("PLACE", str(tmp_path)) for text in arguments)])
    (tmp_path / "models").mkdir()
    with pytest.raises(SystemExit, match="ComfyUI cannot use decoder as they are"):
        main(["fetch", "mm-fm", "--only", "decoder", "--comfyui", str(tmp_path)])


def test_room_is_checked_for_what_is_missing(tmp_path):
    digest = hashlib.sha256(b"").hexdigest()
    file = RemoteFile("owner/name", "a", "main", 10**18, digest)
    path = tmp_path / "new" / "a"
    with pytest.raises(WriteError, match=r"1000000000\.0 GB are still to be fetched"):
        check_room([(file, path)])
    path.parent.mkdir()
    with open(part_of(file, path), "wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(WriteError, match=r"999999000\.0 GB are still to be fetched"):
        check_room([(file, path)])
