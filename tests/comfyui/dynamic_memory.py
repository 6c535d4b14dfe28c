"""Load a base model and its adapted clone in turn under ComfyUI's newer memory manager.

    COMFYUI/.venv/bin/python dynamic_memory.py COMFYUI WORK

That manager is for NVIDIA cards. Its handling of weights, backups and patches runs here on a CPU;
its reservation of GPU memory is replaced by stubs. Prints the time grids it saw as JSON.
`test_dynamic_memory.py` starts it.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from inside import ours, start


def main(comfyui: str, work: str) -> None:
    start(comfyui)
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils

    patcher_module, work = comfy.model_patcher, Path(work)
    if not hasattr(patcher_module, "ModelPatcherDynamic"):
        print(json.dumps({"missing": True}))
        return
    with_adapter = ours("adapter").with_adapter

    class HostBuffer:
        size = 0

        def __init__(self, *sizes): ...

        def truncate(self, *sizes, **options): ...

    class Dynamic(patcher_module.ModelPatcherDynamic):
        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)

        def _vbar_get(self, create=False):
            return None

    patcher_module.comfy_aimdo = types.SimpleNamespace(
        host_buffer=types.SimpleNamespace(HostBuffer=HostBuffer),
        model_vbar=types.SimpleNamespace(vbar_unpin=lambda v: None),
    )
    comfy.model_management.pinned_hostbuf_size = lambda *args: 0
    device = torch.device("cpu:0")
    loaded = comfy.sd.load_diffusion_model(str(work / "flux.safetensors"))
    base = Dynamic(loaded.model, device, device)
    tensors, metadata = comfy.utils.load_torch_file(
        str(work / "adapter.safetensors"), return_metadata=True
    )
    adapted = with_adapter(base, tensors, metadata, name="gmflux_4step")

    def half(model) -> float:
        return float(model.get_model_object("model_sampling").sigmas[4999])

    names, seen = sorted(base.model.state_dict()), [[half(base), half(adapted)]]
    for model, other in ((base, adapted), (adapted, base), (base, adapted), (adapted, base)):
        other.detach(unpatch_all=False)
        model.partially_load(device)
        seen.append([half(base), half(adapted)])
        if sorted(name for name in base.model.state_dict() if "model_sampling" not in name) != [
            name for name in names if "model_sampling" not in name
        ]:
            raise RuntimeError("the weights that ComfyUI sees have changed")
    adapted.detach()
    seen.append([half(base), half(adapted)])
    print(json.dumps({"half_way": seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
