"""GM Train Adapter on tiny random models: gradients, what is learned, files, resuming, messages.

Random weights prove the way, not the quality. The runs are short; those of
tests/benchmarks/train_adapter.py are long enough to say how near a student comes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from .adapters import lora_layers
from .bases import write_flux, write_gguf
from .installation import COMFYUI, GGUF, GGUF_HOW_TO, has_gradients
from .plain_bases import write_plain_base
from .scripts import of, results_of
from .stand_in_files import write_text_encoder
from .train_bases import TEACHERS, write_teacher

MODELS = COMFYUI / "comfy" / "supported_models.py"
CLASSES = {"lumina": "class ZImage(", "krea2": "class Krea2(", "flux2": "class Flux2("}
KNOWN = MODELS.read_text("utf-8") if MODELS.is_file() else ""
KINDS = tuple(kind for kind in TEACHERS if CLASSES.get(kind, "") in KNOWN)  # of this version
LEAST_FACTOR = 1.05  # of Euler's distance over the student's


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script."""
    if not has_gradients():
        pytest.skip("this ComfyUI has no gradients, and the node says so")
    work = tmp_path_factory.mktemp("train")
    for kind in KINDS:
        write_teacher(work, kind)
    write_plain_base(work, "wan").rename(work / "none.safetensors")
    write_flux(work / "schnell.safetensors", depth=1, single=1, guidance=False)
    write_text_encoder(work / "text.safetensors")
    if GGUF.is_dir():
        write_gguf(work / "flux.safetensors", work / "flux.gguf")
        (work / "gguf.txt").write_text(str(GGUF))
    about = {
        kind: dataclasses.asdict(teacher) for kind, teacher in TEACHERS.items() if kind in KINDS
    }
    (work / "teachers.json").write_text(json.dumps(about))
    return results_of(Path(__file__).with_name("train_inside.py"), work)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(found, kind: str) -> None:
    about = of(found, "gradients")[kind]
    assert about["error"] < 0.01
    assert about["same"] < 1e-5  # with checkpoints
    assert about["names"] > 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_student_begins_as_its_teacher(found, kind: str) -> None:
    assert of(found, "start")[kind] < 0.05  # the means are spread by .05


@pytest.mark.parametrize("kind", ["flux", "qwen", "sd3"])
def test_four_calls_come_nearer_than_those_of_euler(found, kind: str) -> None:
    about = of(found, kind)
    assert about["euler"] > LEAST_FACTOR * about["student"]


@pytest.mark.parametrize("kind", KINDS)
def test_gm_adapter_gives_what_was_trained(found, kind: str) -> None:
    assert of(found, kind)["file"] < 1e-3


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_the_file_has_the_published_names(found, kind: str) -> None:
    about = of(found, kind)
    assert set(about["lora"]) == set(lora_layers(kind, 256, 1, 1 if kind == "flux" else 0))
    logstds = [f"proj_out_logstds.{i}.{part}" for i in (1, 3) for part in ("bias", "weight")]
    others = [
        f"{n}.{p}" for n in ("proj_out_means", "proj_out_logweights") for p in ("bias", "weight")
    ]
    assert about["head"] == sorted(
        [*logstds, *others, "norm_out.linear.bias", "norm_out.linear.weight"]
    )


def test_the_file_says_what_it_is(found) -> None:
    metadata = of(found, "flux")["metadata"]
    assert json.loads(metadata["policy_config"]) == {"type": "GMFlow"}
    expected = {"base": "FLUX.1", "steps": "4", "shift": "3.2", "guidance": "3.5"}
    assert {name: metadata[f"gmflow.{name}"] for name in expected} == expected
    assert metadata["modelspec.title"] == "flux_4step"
    assert metadata["ss_steps"] == "16"
    assert len(metadata["gmflow.teacher"]) == len(metadata["gmflow.prompts"]) == 32


def test_an_interrupted_run_is_kept_and_goes_on(found) -> None:
    about = of(found, "interrupted")
    assert about["raised"]
    assert about["steps"] == "3"
    assert about["same"]
    assert about["moved"]
    assert about["average"] > 1e-3  # from what is trained last
    assert "learning_rate 0.0005 (now 0.001)" in about["other"]
    assert "states 1" in about["other"]
    assert "exists already" in about["exists"]


def test_a_run_that_diverges_is_stopped_with_its_last_good_state(found) -> None:
    about = of(found, "diverging")
    assert about["early"].startswith("nothing was trained: the loss has grown")
    assert "10 iterations in a row were not finite" in about["gradients"]
    assert about["late"] == ""
    assert about["steps"] == "10"  # it was spoiled at 13, and stopped later than 20
    assert re.match("not finished, stopped at iteration [2-9].*of iteration 10", about["said"][0])
    assert about["kept"]  # the file of an earlier run that goes on and diverges
    assert about["kept steps"] == "4"
    assert about["rise to 1.2"] is None
    assert about["rise to 1.5"] == [1.0, 1.5]
    assert not any(about["rising"])  # while the teacher's share falls, a loss may rise


def test_a_run_goes_on_where_a_file_cannot_be_written(found) -> None:
    about = of(found, "unsaved")
    assert about["said"] == ["not saved yet: no space left"]
    assert about["steps"] == "4"


@pytest.mark.parametrize("run", ["dx", "one step", "cfg", "probabilistic", "attention", "decay"])
def test_other_settings_run(found, run: str) -> None:
    about, plain = of(found, "runs")[run], of(found, "runs")["cfg"]
    assert about["finite"]
    assert about["steps"] == ("1" if run == "one step" else "4")
    assert about["policy"]["type"] == ("DX" if run == "dx" else "GMFlow")
    assert about["changing"] == 2 * [run == "decay"]
    assert (about["tensors"] > plain["tensors"]) == (run == "attention")


def test_a_run_can_begin_with_an_adapter(found) -> None:
    assert of(found, "runs")["warm"]["finite"]
    assert of(found, "runs")["apart"]["warm"] < 0.5  # 1 for LoRAs that begin as 0


@pytest.mark.parametrize("run", ["cfg", "probabilistic"])
def test_guided_teachers_give_another_adapter(found, run: str) -> None:
    assert of(found, "runs")["apart"][run] > 1e-3


def test_the_node_takes_lists_and_a_file_of_prompts(found) -> None:
    about = of(found, "node")
    assert about["name"] == "folder/by_node.safetensors"
    assert about["metadata"]["gmflow.steps"] == "2"
    assert about["metadata"]["gmflow.teacher_guidance"] == "cfg 3"
    assert "'steps' is 9" in about["wrong"]
    assert "only one model is taken, and there are 2" in about["two"]
    assert "it fits (Stable Diffusion 3)" in about["info"]
    assert "K = 2" in about["info"]
    assert about["again"] == "later.safetensors"  # which begins with one made just now
    assert "gone.safetensors" in about["gone"]
    before, edited, *lost = about["stamps"]
    assert before[0] == edited[0] == 0
    assert before != edited
    assert [stamp[0] for stamp in lost] == [1, 1]  # found missing once
    assert len(about["sizes"]) == 2
    assert all(width >= 3 * height for width, height in about["sizes"])  # four side by side


def test_prompts_may_hold_reference_pictures(found) -> None:
    about = of(found, "edit")
    assert about["far"] < 0.1
    assert about["effect"] > 1e-3


@pytest.mark.parametrize("kind", ["fp8", "int8", "gguf"])
def test_quantised_bases_train(found, kind: str) -> None:
    if kind == "gguf" and not GGUF.is_dir():
        pytest.skip(f"no ComfyUI-GGUF: {GGUF_HOW_TO}")
    about = of(found, "quantised")[kind]
    assert about["names"] > 10
    assert about["tensors"] > 10
    assert about["far"] < 0.2
    assert about["error"] < 0.01


MESSAGES = {
    "adapter": "few-step already",
    "base": "none of FLUX.1, Qwen-Image, FLUX.2",
    "schnell": "no guidance embedding",
    "size": "multiples of 2",
    "name": "save_name is '../outside'",
    "long name": "each part of at most 200 bytes",
    "no folder": "cannot be written",
    "guidances": "not one guidance",
    "negative": "needs a negative conditioning",
    "weight": "below 1",
    "nan": "not finite",
    "no prompts": "no prompts: connect positive",
    "no file": "there is no such file",
    "empty file": "holds 0 prompts",
    "outside": "there is no such file",
    "part": "area",
    "mask": "has mask, which is for a part",
    "strength": "has strength, which is for a part",
    "long prompt": "prompt 2 of prompts_file 'long.txt' has 20,001 characters",
    "windows": "save_name is 'folder/Con.v2'",
    "locked": "refused.safetensors",
    "memory": "too many prompts",
    "warm polynomial": "mode 'polynomial'",
    "warm shift": "shift 1.0 (now 3.2)",
    "warm kind": "set policy to dx",
    "warm ArcFlow": "not trained here",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_cannot_be_done_is_refused_in_words(found, case: str) -> None:
    refused = of(found, "refused")
    assert MESSAGES[case] in refused[case]
    assert refused["files"] == ""
    assert refused["warm published"] == ""
    assert refused["widths"].keys() == set(KINDS)
    assert all("it has 7 features" in text for text in refused["widths"].values())


@pytest.mark.parametrize(
    "case",
    ["about", "iteration", "numbers", "losses", "tensor", "nan", "average", "moment", "index"],
)
def test_damaged_states_are_refused_in_words(found, case: str) -> None:
    damaged = of(found, "damaged")
    assert "damaged.training" in damaged[case]
    assert "delete it to begin anew" in damaged[case]
    assert damaged["whole"] == ""
