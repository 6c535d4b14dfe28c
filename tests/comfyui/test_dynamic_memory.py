"""An adapted model under newer ComfyUI's dynamic memory manager for NVIDIA cards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .adapters import write_adapter
from .bases import write_flux
from .scripts import results_of


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
