"""Measure students of imitation distillation at equal budget, and what they are compared with.

    python -m tests.benchmarks.distill                    # all, many hours on one core
    python -m tests.benchmarks.distill --only k --seeds 0 # or guided, budget, board; goes on later
    python -m tests.benchmarks.distill --only guided --steps 1 2

Each student is trained by training.distill with the shipped model as its teacher, in a folder of
its own below --work, so that a second start goes on where the first one stopped; figures go to
docs/results/distill_digits.csv and distill_board.csv after every student, those of all students
that --work holds. An iteration has 64 samples (points: 1,024). The teacher's own rows need no
ComfyUI; stock samplers at equal calls are in any_flow_digits.csv, from the same noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from shlex import split

import torch
from torch import Tensor, nn

from gmflow_core import Guidance, class_denoiser, flow_sigmas, load_checkpoint
from gmflow_core.files.checkpoint import SHIPPED
from gmflow_core.sampling.solvers import solve
from gmflow_core.toys.checkerboard import draw_checkerboard, total_variation
from gmflow_core.toys.points import sample_points
from training.distill import main as train

from .picture_sets import Digits
from .tables import RESULTS, Row, means_of, write

ITERATIONS = 200
SUBSTEPS = 32
POINTS = 200_000
GUIDANCES = {
    "none": "",
    "probabilistic": "--guidance 0.2",
    "cfg": "--guidance 2 --guidance-kind cfg",
}
KIND = ("model", "steps", "policy", "k", "iterations", "guidance")  # what seeds have in common
WEIGHTS, FIGURES = "weights.safetensors", "figures.json"  # in a student's folder


def settings(part: str) -> list[Row]:
    """Return the students of a part, without their seeds."""

    def student(steps: int, policy: str = "gm", k: int = 8, guidance: str = "none", **more) -> Row:
        kind = {"steps": steps, "policy": policy, "k": k, "guidance": guidance}
        return {**kind, "iterations": ITERATIONS, **more}

    if part == "k":  # kinds and sizes of policies
        policies = (("gm", 8), ("dx", 8), ("gm", 1), ("gm", 4), ("gm", 2))
        return [student(steps, *policy) for steps in (1, 2, 4) for policy in policies]
    if part == "guided":
        kinds = ("probabilistic", "cfg")
        return [student(steps, guidance=kind) for steps in (1, 2, 4) for kind in kinds]
    return [student(steps, iterations=count) for count in (50, 1000, 4000) for steps in (1, 2)]


def trained(work: Path, row: Row, seed: int, teacher: str, batch: int) -> Path:
    """Train the student of a row, unless it is there, and return its folder."""
    words = [teacher, *(f"{name}{value}" for name, value in row.items()), f"seed{seed}"]
    out = work / "_".join(words)
    if not (out / WEIGHTS).is_file():
        iterations = row["iterations"]
        more = f"--steps {row['steps']} --policy {row['policy']} -k {row['k']} --seed {seed}"
        more += f" --warmup 20 --batch-size {batch} --iterations {iterations} --device cpu"
        more += f" --substeps {SUBSTEPS} --picture-every {iterations} --checkpoint-every 100 "
        more += GUIDANCES[row.get("guidance", "none")]
        places = ["--teacher", str(SHIPPED / f"{teacher}.safetensors"), "--out", str(out)]
        train([*places, *split(more)])
    return out


@torch.inference_mode()
def sampled(network: nn.Module, data: Digits, guidance: Guidance | None = None, **how) -> Tensor:
    """Sample the digits' noise; `how` as in `solve`, and `sigmas`."""
    sigmas, parts = (
        how.pop("sigmas"),
        zip(data.noise.split(250), data.labels.split(250), strict=True),
    )
    return torch.cat(
        [
            solve(denoiser=class_denoiser(network, labels, guidance), x=x, sigmas=sigmas, **how)
            for x, labels in parts
        ]
    )


def teacher_rows(data: Digits) -> list[Row]:
    """Return the rows of held-out images and of the teacher itself."""
    network, _ = load_checkpoint(SHIPPED / "digits_k8.safetensors")
    floor = data.floor()["frechet_distance"]
    rows = [{"model": "held-out images", "frechet_distance": floor}]
    guided = {"none": None, "probabilistic": Guidance(0.2), "cfg": Guidance(2.0, "cfg")}
    for kind, guidance in guided.items():
        for solver, calls in (("euler", 32), ("gm-ode", 1), ("gm-ode", 2), ("gm-ode", 4)):
            x = sampled(network, data, guidance, solver=solver, sigmas=flow_sigmas(calls))
            about = {"model": "teacher", "solver": solver, "steps": calls, "guidance": kind}
            rows.append({**about, **data.score(x)})
    return rows


def student_row(network: nn.Module, data: Digits, row: Row, seed: int) -> Row:
    """Return the figures of a student."""
    how = {"solver": "gm-policy", "temperature": 1.0, "substeps": SUBSTEPS}
    x = sampled(network, data, sigmas=flow_sigmas(row["steps"]), **how)
    return {"model": "student", **row, "seed": seed, **data.score(x)}


def digits(work: Path, parts: list[str], seeds: list[int], steps: list[int]) -> None:
    """Measure students of the digits: docs/results/distill_digits.csv."""
    data, known = Digits(work), work / "teacher_rows.json"
    if not known.is_file():  # they take minutes
        known.write_text(json.dumps(teacher_rows(data)))
    first = json.loads(known.read_text())
    shipped, _ = load_checkpoint(SHIPPED / "digits_one_call.safetensors")
    first.append({**student_row(shipped, data, {"steps": 1}, 0), "model": "shipped student"})
    wanted = [
        (row, seed)
        for seed in seeds
        for part in parts
        for row in settings(part)
        if row["steps"] in steps
    ]
    for row, seed in wanted:
        folder = trained(work / "students", row, seed, "digits_k8", 64)
        if not (folder / FIGURES).is_file():
            network, _ = load_checkpoint(folder / WEIGHTS)
            figures = student_row(network, data, row, seed)
            (folder / FIGURES).write_text(json.dumps(figures))
        rows = [*first, *students(work, "digits_k8")]
        write_with_means(rows, "frechet_distance", RESULTS / "distill_digits.csv")


def students(work: Path, teacher: str) -> list[Row]:
    """Return the figures of all students of a teacher that a work folder holds."""
    files = (work / "students").glob(f"{teacher}_*/{FIGURES}")
    return [json.loads(path.read_text()) for path in sorted(files)]


@torch.inference_mode()
def board_rows() -> list[Row]:
    """Return the rows of exact samples of the checkerboard, and of the teacher itself."""
    teacher, _ = load_checkpoint(SHIPPED / "checkerboard_k64.safetensors")
    exact = draw_checkerboard(POINTS, torch.Generator().manual_seed(0))
    rows: list[Row] = [{"model": "exact samples", "total_variation": total_variation(exact)}]
    for solver, calls in (("gm-sde", 1), ("gm-ode", 1), ("euler", 32), ("gm-ode", 32)):
        points = sample_points(teacher, POINTS, solver=solver, steps=calls)
        about = {"model": "teacher", "solver": solver, "steps": calls}
        rows.append({**about, "total_variation": total_variation(points)})
    return rows


@torch.inference_mode()
def board(work: Path, seeds: list[int]) -> None:
    """Measure students of the checkerboard by total variation: docs/results/distill_board.csv."""
    known = work / "board_rows.json"
    if not known.is_file():
        known.write_text(json.dumps(board_rows()))
    rows = json.loads(known.read_text())
    for seed in seeds:
        for policy, k in (("gm", 64), ("dx", 10), ("gm", 8)):
            row = {"steps": 1, "policy": policy, "k": k, "iterations": 2 * ITERATIONS}
            with torch.inference_mode(False), torch.enable_grad():
                folder = trained(work / "students", row, seed, "checkerboard_k64", 1024)
            if not (folder / FIGURES).is_file():
                network, _ = load_checkpoint(folder / WEIGHTS)
                how = {"solver": "gm-policy", "substeps": SUBSTEPS, "temperature": 1.0}
                points = sample_points(network, POINTS, steps=1, **how)
                figures = {"total_variation": total_variation(points)}
                about = {"model": "student", **row, "seed": seed, **figures}
                (folder / FIGURES).write_text(json.dumps(about))
            every = [*rows, *students(work, "checkerboard_k64")]
            write_with_means(every, "total_variation", RESULTS / "distill_board.csv")


def write_with_means(rows: list[Row], figure: str, path: Path) -> None:
    """Write rows, and the means of students over seeds."""
    own = [row for row in rows if row["model"] == "student"]
    write([*rows, *means_of(own, KIND, figure)], path)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("k", "guided", "budget", "board")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4], help="of the digits")
    parser.add_argument("--work", type=Path, default=Path("outputs/distill"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if "board" in arguments.only:
        board(arguments.work, arguments.seeds)
    of_digits = [part for part in arguments.only if part != "board"]
    if of_digits:
        digits(arguments.work, of_digits, arguments.seeds, arguments.steps)


if __name__ == "__main__":
    main()
