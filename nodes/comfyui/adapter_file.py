"""Read a GM adapter's file, with advice and notices in the words of ComfyUI's page."""

from __future__ import annotations

from torch import Tensor

from ...gmflow_core.files import adapter_file
from ...gmflow_core.files.adapter_file import named
from ...gmflow_core.files.adapter_metadata import TENSOR_PREFIX as PREFIX
from ...gmflow_core.files.adapter_metadata import AdapterFacts
from ...gmflow_core.files.errors import FileError
from ...gmflow_core.models.adapter_heads import is_head_key
from .notices import notice

ENDINGS = (".safetensors", ".sft")


def read_adapter(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of an adapter's file.

    Raises:
        FileError: it is no whole safetensors file or no adapter, or a tensor is no finite array of
            floats; the message names it.
    """
    if not path.lower().endswith(ENDINGS):
        raise FileError(
            path, "is not a safetensors file", "choose the .safetensors file of a GM adapter"
        )
    return adapter_file.read_tensors(path, check_names)


def check_names(keys: list[str], path: str) -> None:
    """Check that one of a file's tensors belongs to a head.

    Raises:
        FileError: none does.
    """
    if not any(is_head_key(key.removeprefix(PREFIX)) for key in keys):
        raise FileError(
            path,
            f"is no GM adapter: none of its {len(keys)} tensors ({named(keys, 3)}, ...) belongs to "
            "a GM head (proj_out_means and the like)",
            "use Load LoRA for ordinary LoRAs, or choose an adapter such as gmflux_k8_piid_4step "
            "of Lakonik/pi-FLUX.1",
        )


def made_for(metadata: dict[str, str] | None, policy: dict, name: str) -> AdapterFacts:
    """Return what an adapter was made for; a notice says if its number of steps is assumed.

    Raises:
        ValueError: see `adapter_file.made_for`.
    """
    return adapter_file.made_for(metadata, policy, name, notice)
