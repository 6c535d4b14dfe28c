"""Models under ComfyUI's memory managers: the dynamic one for NVIDIA cards, and the usual one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .adapters import write_adapter
from .bases import write_flux
from .scripts import of, results_of


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all cases of `memory_inside.py`, from one process."""
    folder = tmp_path_factory.mktemp("memory")
    write_flux(folder / "flux.safetensors", dtype=torch.float32)
    write_adapter(folder / "adapter.safetensors")
    return results_of(Path(__file__).with_name("memory_inside.py"), folder)


def test_base_and_adapter_do_not_touch_each_other(tmp_path: Path) -> None:
    """Loaded in turn, both keep their own time grid, and the model keeps its weights.

    Sigma half-way is that of the shifts e^1.15 and 3.2.
    """
    write_flux(tmp_path / "flux.safetensors", dtype=torch.float32)
    write_adapter(tmp_path / "adapter.safetensors")
    found = results_of(Path(__file__).with_name("dynamic_memory.py"), tmp_path)
    if "missing" in found:
        pytest.skip("this ComfyUI has no dynamic memory manager")
    assert len(found["half_way"]) == 6
    for base, adapter in found["half_way"]:
        assert base == pytest.approx(3.1582 / 4.1582, abs=1e-4)
        assert adapter == pytest.approx(3.2 / 4.2, abs=1e-4)


def test_a_gm_model_is_loaded_as_a_whole_or_not_at_all(found: dict[str, Any]) -> None:
    """Its layers are torch's own, which fetch no weights that were left in main memory."""
    about = of(found, "budget")
    assert about.pop("loaded") == 1
    assert about.pop("unloaded")
    assert about.pop("left") == 0
    assert about.pop("freed") == 0
    assert set(map(tuple, about.values())) == {("meta",)}, about


def test_gm_models_ask_for_what_they_need(found: dict[str, Any]) -> None:
    """Bytes for one pixel, which were counted on the CPU, and at most three times as many."""
    needed = {"checkerboard_k64": 1_600, "digits_k8": 2_080, "emoji_k8": 1_080}
    for name, asked in of(found, "estimates").items():
        assert needed[name] < asked < 3 * needed[name], name


def test_training_asks_for_more_memory_than_sampling(found: dict[str, Any]) -> None:
    """The base that it shares asks for its own again afterwards."""
    about = of(found, "training")
    assert about["after"] == about["before"]
    trained = 16 * about["trained"]
    assert about["student"] == [3 * own + trained for own in about["before"]]
