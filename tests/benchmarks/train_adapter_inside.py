"""Train adapters inside ComfyUI's process, for `train_adapter.py`.

    COMFYUI/.venv/bin/python train_adapter_inside.py COMFYUI WORK

WORK holds the bases, `teachers.json` about them, and `job.json`: iterations by base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "comfyui"
BATCH, RUN = 4, {"rank": 16, "states": 2, "warmup": 10, "learning_rate": 1e-3}


def main(comfyui: str, work: str) -> None:
    """Train one adapter for each base, and print what was measured as JSON."""
    sys.path.insert(0, str(TESTS))
    import train_parts
    from inside import run_cases

    folder = Path(work).absolute()
    train_parts.WORK.append(folder)
    train_parts.TEACHERS.update(json.loads((folder / "teachers.json").read_text()))
    job = json.loads((folder / "job.json").read_text())

    def trained(kind: str, iterations: int) -> dict[str, Any]:
        empty = train_parts.latent(kind, BATCH)
        more = {"latent": empty, "prompts": train_parts.prompts(kind, 2)}
        model, *_ = train_parts.train(kind, kind, iterations=iterations, **RUN, **more)
        return {"iterations": iterations, **train_parts.distances(kind, model)}

    cases = {kind: (lambda k=kind, n=count: trained(k, n)) for kind, count in job.items()}
    run_cases(comfyui, cases)


if __name__ == "__main__":
    main(*sys.argv[1:])
