"""Which adapters GM Adapter offers, where they come from, and what GM Adapter Info tells."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import hub_server

from .adapter_prompts import ADAPTERS, FILES, graph, near, serve
from .adapters import write_adapter
from .bases import write_flux
from .client import Comfy
from .graphs import latent_of, node
from .server import running
from .stand_in_files import write_text_encoder

USUAL = "diffusion_pytorch_model.safetensors"
DOWNLOAD = " (download)"


@pytest.fixture(scope="module")
def server(comfy: Comfy) -> Iterator[Comfy]:
    yield from serve(comfy)


def offered(server: Comfy) -> list[str]:
    """Return the names that GM Adapter offers."""
    inputs = server.get("/object_info/GMFlowAdapter")["GMFlowAdapter"]["input"]["required"]
    kind, about = inputs["adapter_name"]
    return about["options"] if kind == "COMBO" else kind


def chosen(name: str, base: str = "flux", **inputs: object) -> dict:
    """Return `graph` with another adapter."""
    prompt = graph(base, seed=2)
    prompt["model"]["inputs"].update(adapter_name=name, **inputs)
    return prompt


def info(adapter_name: str, **model: list) -> dict:
    """Return a prompt with GM Adapter Info."""
    return {**graph(), "info": node("GMFlowAdapterInfo", adapter_name=adapter_name, **model)}


def told(server: Comfy, prompt: dict) -> str:
    """Return the text that GM Adapter Info shows."""
    return server.run(prompt).outputs["info"]["text"][0]


def test_adapters_come_first_then_downloads_then_other_loras(server: Comfy) -> None:
    names = offered(server)
    last_adapter = max(names.index(name) for name in ADAPTERS.values())
    downloads = [place for place, name in enumerate(names) if name.endswith(DOWNLOAD)]
    assert last_adapter < downloads[0]
    assert downloads[-1] < names.index("flux_style.safetensors")
    assert f"dxqwen_n10_piid_4step{DOWNLOAD}" in names
    assert f"gmflux_k8_piid_4step{DOWNLOAD}" in names  # workflows name it, though it is there


def test_a_folder_of_the_adapter_s_name_counts(server: Comfy) -> None:
    """Use the layout of the repository: the list finds it, and the folder tells the steps."""
    loras = server.base / "models" / "loras"
    write_adapter(loras / "mine_6steps" / USUAL, seed=9)
    write_adapter(loras / "no_name_at_all.safetensors", seed=9)
    names = offered(server)
    assert names.index("no_name_at_all.safetensors") < names.index("flux_style.safetensors")
    prompt = chosen(f"mine_6steps/{USUAL}")
    assert "FLUX.1, GM policy, K = 8, 6 steps or more" in server.run(prompt).texts["model"]
    expected = latent_of(server, chosen("no_name_at_all.safetensors"))
    for name in (f"mine_6steps/{USUAL}", "mine_6steps.safetensors"):  # or as another install has it
        assert latent_of(server, chosen(name)).equal(expected)


def test_the_loader_is_load_diffusion_model_and_gm_adapter(server: Comfy) -> None:
    prompt = chosen(ADAPTERS["qwen"], "qwen", strength=0.7)
    one = {"model_name": FILES["qwen"], "weight_dtype": "default", "strength": 0.7}
    loader = node("GMFlowAdaptedModel", adapter_name=ADAPTERS["qwen"], **one)
    both = {key: about for key, about in prompt.items() if key != "base"}
    assert near(latent_of(server, {**both, "model": loader}), latent_of(server, prompt))
    loader = node("GMFlowAdaptedModel", adapter_name=ADAPTERS["qwen"], **one)
    loader["inputs"]["model_name"] = "nothing.gguf"
    errors = server.run({**both, "model": loader}, expect_error=True).errors
    assert "there is no diffusion model 'nothing.gguf'" in errors["model"]


def test_the_info_tells_what_the_file_holds(server: Comfy) -> None:
    text = told(server, info(ADAPTERS["flux"], model=["base", 0]))
    for line in (
        "base model: FLUX.1",
        "policy: GM, a mixture of K = 8 Gaussians for each latent pixel",
        "steps: 4 or more",
        "shift: 3.2",
        "guidance: 3.5 only",
        "LoRA: rank 4, 14 layers:",
        "  2 x single_transformer_blocks.*.proj_mlp",
        "connected model: it fits (FLUX.1)",
    ):
        assert line in text.splitlines(), text
    assert "it does not fit: " in told(server, info(ADAPTERS["qwen"], model=["base", 0]))
    adapted = told(server, info("(on the connected model)", model=["model", 0]))
    assert adapted.splitlines()[:2] == [
        f"adapter: {ADAPTERS['flux']}, on this model",
        "base model: FLUX.1",
    ]
    assert set(adapted.splitlines()[2:]) <= set(text.splitlines())
    dx = told(server, info("dxflux_n10_piid_4step.safetensors"))
    assert "policy: DX, 10 times (no mixture: for gm-policy and stock samplers)" in dx
    assert "not downloaded yet" in told(server, info(f"dxqwen_n10_piid_4step{DOWNLOAD}"))


def test_settings_without_effect_say_so(server: Comfy) -> None:
    path = server.base / "models" / "loras" / ADAPTERS["flux"]
    texts = server.run(chosen("flux_style.safetensors", hub_id_or_path=f"'{path}'")).texts
    assert "no effect: adapter_name (flux_style.safetensors)" in texts["model"]
    assert "strength 0" in server.run(chosen(ADAPTERS["flux"], strength=0.0)).texts["model"]
    errors = server.run(chosen("x", hub_id_or_path="no such thing"), expect_error=True).errors
    assert "hub_id_or_path: 'no such thing' is no file or folder here" in errors["model"]


@pytest.fixture(scope="module")
def downloading(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Comfy, list[str], Path]]:
    """A server whose hub is a folder here, the files that it fetched, and that folder."""
    base, remote = tmp_path_factory.mktemp("download"), tmp_path_factory.mktemp("hub")
    write_flux(base / "models" / "diffusion_models" / FILES["flux"])
    for name in ("clip_l", "t5xxl"):
        write_text_encoder(base / "models" / "text_encoders" / f"{name}.safetensors")
    folder = remote / "Lakonik" / "pi-FLUX.1" / "gmflux_k8_piid_8step"
    write_adapter(folder / USUAL, seed=5)
    with pytest.MonkeyPatch.context() as patch, hub_server(remote) as hub:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(base / "hub_cache"))
        with running(base) as server:
            yield server, hub.fetched, folder


def test_a_published_adapter_is_downloaded_on_first_use(
    downloading: tuple[Comfy, list[str], Path],
) -> None:
    """Choose one from the list of a new installation, run: it is fetched once, with progress.

    GM Adapter Info then tells what is in it, and GM Adapter does not run again.
    """
    server, fetched, folder = downloading
    name = f"gmflux_k8_piid_8step{DOWNLOAD}"
    assert offered(server)[1] == name
    about = {"info": node("GMFlowAdapterInfo", adapter_name=name)}
    assert "not downloaded yet" in told(server, about)
    result = server.run(chosen(name))
    assert "downloading Lakonik/pi-FLUX.1:gmflux_k8_piid_8step" in result.texts["model"]
    assert "8 steps or more" in result.texts["model"]
    size = (folder / USUAL).stat().st_size
    assert (size, size) in [step[1:] for step in result.progress if step.node == "model"]
    assert fetched == [f"gmflux_k8_piid_8step/{USUAL}"]
    again = server.run({**chosen(name), **about})
    assert "model" not in again.executed
    assert "steps: 8 or more" in again.outputs["info"]["text"][0]
    latent = latent_of(server, chosen(name))
    by_address = "https://huggingface.co/Lakonik/pi-FLUX.1/tree/main/gmflux_k8_piid_8step"
    assert latent_of(server, chosen(name, hub_id_or_path=by_address)).equal(latent)
    assert len(fetched) == 1
    here = server.base / "models" / "loras" / "gmflux_k8_piid_8step"
    shutil.copytree(folder, here)  # the user's own file is preferred from now on
    write_adapter(here / USUAL, seed=6)
    assert not near(latent_of(server, chosen(name)), latent)
    errors = server.run(chosen(f"gmqwen_k8_piid_4step{DOWNLOAD}"), expect_error=True).errors
    assert "could not be downloaded from the Hugging Face hub" in errors["model"]
