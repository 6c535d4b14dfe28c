"""The log-likelihood of checkerboard models: the command, and the figures in docs/results."""

import csv
import math
import re
from pathlib import Path

import pytest

from training import likelihood
from training.experiments.likelihood import COLUMNS, EXACT

ROOT = Path(__file__).parents[2]
TINY = ["--preset", "quick", "--points", "6"]


def lines_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    return lines


def test_the_command_scores_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    likelihood.main([*TINY, "--out", str(tmp_path)])
    lines = lines_of(tmp_path / "likelihood.csv")
    cases = [
        (line["denoiser"], line["points"], line["divergence"], line["steps"]) for line in lines
    ]
    data = [("data", "exact", "2"), ("data", "exact", "4"), ("data", "one direction", "4")]
    expected = [(name, *case) for name in ("exact", "model") for case in data]
    assert cases == [*expected, ("model", "empty squares", "exact", "4")]
    assert {line["count"] for line in lines} == {"6"}
    assert float(lines[1]["mean"]) == pytest.approx(EXACT, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--points", "1"], "--points is 1; it must be at least 2"),
        (["--steps", "0"], r"--steps is \(0,\); it must be at least 1 each"),
        (["--checkpoint", "gmflow_core/shipped/digits_k8.safetensors"], "holds a GMDiT, not"),
        (["--checkpoint", "no_such_file.safetensors"], "no_such_file"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        likelihood.main([*TINY, *arguments, "--out", str(tmp_path)])
    assert ended.value.code
    output = capsys.readouterr()
    message = f"{ended.value.code} {output.out} {output.err}"
    assert re.search(said, " ".join(message.split()))
    assert not (tmp_path / "likelihood.csv").exists()


def test_the_figures_of_the_page_are_those_of_a_converged_exact_model_and_an_inexact_one():
    lines = lines_of(ROOT / "docs/results/likelihood.csv")
    exact, model = (
        [
            (float(line["mean"]), float(line["standard_error"]))
            for line in lines
            if (line["denoiser"], line["points"], line["divergence"]) == (name, "data", "exact")
        ][-1]
        for name in ("exact", "model")
    )
    assert exact[0] == pytest.approx(-math.log(32), abs=0.005)
    assert model[0] < EXACT + 4.5 * model[1]  # by Gibbs' inequality
