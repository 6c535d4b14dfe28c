"""Train adapters on tiny models inside ComfyUI's process, for `test_train_adapter.py`.

    COMFYUI/.venv/bin/python train_inside.py COMFYUI WORK [CASE ...]

COMFYUI is its folder; WORK holds the bases, and `teachers.json` about them. Prints what it found as
JSON; of all cases if none is named.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from inside import far, ours, run_cases, sample, says
from torch import Tensor
from train_parts import (
    TEACHERS,
    WORK,
    base_of,
    distances,
    flat,
    latent,
    load,
    prompts,
    sampler,
    settings,
    train,
)
from train_refused import damaged, refused

SPOILED = 3.0  # factor of a head that makes the loss grow, and the run end a while later
ITERATIONS = {"flux": 16, "qwen": 8, "sd3": 8}  # of students that the teacher is compared with


def main(comfyui: str, work: str, *names: str) -> None:
    """Run cases and print their results as JSON by name."""
    WORK.append(Path(work).absolute())
    TEACHERS.update(json.loads((WORK[0] / "teachers.json").read_text()))
    cases = {kind: (lambda kind=kind: trained(kind)) for kind in TEACHERS}
    cases |= CASES
    run_cases(comfyui, {name: case for name, case in cases.items() if name in (names or cases)})


def trained(kind: str) -> dict[str, Any]:
    """Train on a kind of base: what the file holds, and how near the student comes."""
    seen: dict[str, Any] = {}
    preview = ours("train_adapter").preview

    def probe(training: Any, calls: Any, shape: Any) -> None:
        """Keep where the student itself goes from the noise of `sample`."""
        import comfy.sample

        noise = comfy.sample.prepare_noise(latent(kind, 1), 5)
        seen["noise"] = noise
        x = ours("train_preview").follow(calls, calls.layout.unfold(noise))
        seen["end"] = calls.layout.fold(x)
        seen["shape"] = list(shape)

    ours("train_adapter").preview = probe
    try:
        count = ITERATIONS.get(kind, 2)
        run = {"iterations": count, "preview_every": count, "ema": False}
        model, tensors, metadata = train(kind, f"{kind}_4step", **run)
    finally:
        ours("train_adapter").preview = preview
    sigmas = ours("gm_sampler").gm_sigmas(4, 3.2, final_step_size=0.5)
    result = sample(model, latent(kind, 1), prompts(kind)[0], sampler(), sigmas=sigmas)
    scaled = base_of(kind).model.process_latent_out(seen["end"])
    lora = sorted({k.rpartition(".lora_")[0] for k in tensors if ".lora_" in k})
    about = {"file": far(result, scaled), "lora": lora, "metadata": metadata}
    about["head"] = sorted(k for k in tensors if ".lora_" not in k)
    return {**about, **(distances(kind, model) if kind in ITERATIONS else {})}


class Probe:
    """A Training that looks at the gradients of the student's prediction, and trains nothing."""

    def __new__(cls, kind: str, checkpointing: bool, model: Any = None) -> Any:
        adapter, run = ours("train_adapter"), settings(rank=4, checkpointing=checkpointing)
        model = model or base_of(kind)
        base = ours("bases").base_of(model)
        with ours("train_network").learning():
            head, places, pairs, policy = adapter.beginning(model, base, run)
            student = ours("train_student").Student(model, base, places, pairs, checkpointing)
        training = ours("train_run").Training(
            student, run, policy, 1, lambda *_: None, lambda *_: None, lambda *_: None, head
        )
        found: dict[str, Any] = {}
        training._loop = lambda calls, shape, device: found.update(look(training, calls, shape))
        with torch.inference_mode(False):
            adapter._sample(training, prompts(kind), None, latent(kind, 1).shape)
        return found


def look(training: Any, calls: Any, shape: torch.Size) -> dict[str, Any]:
    """Compare a gradient with finite differences along a random direction."""
    generator = torch.Generator().manual_seed(3)

    def normal(like: Any) -> Tensor:
        return torch.randn(like if isinstance(like, tuple) else like.shape, generator=generator)

    parameters = training.parameters
    with torch.no_grad():
        for _name, value in parameters.items():
            if not value.any():
                value.copy_(0.05 * normal(value))
    x, sigma, weights = normal(tuple(shape)), torch.tensor([0.7]), []

    def score() -> Tensor:
        found = calls.student(x, sigma)
        parts = found.means, found.log_weights, found.log_std
        if not weights:
            weights.extend(normal(part) for part in parts)
        return sum((a * b).sum() for a, b in zip(weights, parts, strict=True)) / 100

    with torch.no_grad():
        calls.teacher(x, sigma)  # the switch goes back to the student
    score().backward()
    gradient = {k: v.grad for k, v in parameters.items() if v.grad is not None}
    direction = {k: normal(v) for k, v in gradient.items()}
    step = 1e-3

    def moved(by: float) -> float:
        with torch.no_grad():
            for name, value in direction.items():
                parameters[name].add_(by * value)
            return float(score())

    rise = (moved(step) - moved(-2 * step)) / (2 * step)
    expected = float(sum((gradient[k] * direction[k]).sum() for k in gradient))
    size = float(sum(g.square().sum() for g in gradient.values()) ** 0.5)
    return {"error": abs(rise - expected) / size, "gradient": gradient}


def gradients() -> dict[str, Any]:
    """Look at the gradients of every kind, with and without checkpoints."""
    found = {}
    for kind in TEACHERS:
        plain, again = Probe(kind, False), Probe(kind, True)
        pairs = ((plain["gradient"][k], again["gradient"][k]) for k in plain["gradient"])
        found[kind] = {
            "error": plain["error"],
            "same": max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs),
            "names": len(plain["gradient"]),
        }
    return found


def start() -> dict[str, Any]:
    """Compare a student that has learned nothing with its teacher, in one call."""
    found = {}
    for kind in TEACHERS:
        run = {"iterations": 1, "learning_rate": 1e-7, "latent": latent(kind, 1)}
        model, *_ = train(kind, f"{kind}_start", **run)
        sigmas, text, empty = torch.tensor([1.0, 0.0]), prompts(kind)[0], latent(kind)
        teacher = sample(base_of(kind), empty, text, sampler("euler"), sigmas=sigmas)
        found[kind] = far(sample(model, empty, text, sampler("euler"), sigmas=sigmas), teacher)
    return found


def interrupted() -> dict[str, Any]:
    """Interrupt a run, let it go on, and compare with one that was not interrupted."""
    import comfy.model_management

    progress, about = ours("train_adapter").progress, {}
    run = {"iterations": 6, "ema": True, "kind": "sd3", "latent": latent("sd3", 1)}

    def stop_after_three(message: str, former: str) -> str:
        if message.startswith("3 of"):
            comfy.model_management.interrupt_current_processing(True)
        return message

    ours("train_adapter").progress = stop_after_three
    try:
        train(name="stopped", **run)
    except comfy.model_management.InterruptProcessingException:
        about["raised"] = True
    finally:
        ours("train_adapter").progress = progress
    _, half, metadata = load("stopped.safetensors")
    about["steps"] = metadata["ss_steps"]
    about["other"] = says(lambda: train(name="stopped", **run, learning_rate=1e-3, states=2))
    _, resumed, _ = train(name="stopped", **run)
    _, whole, _ = train(name="whole", **run)
    _, last, _ = train(name="last", **{**run, "ema": False})
    about["same"] = all(torch.equal(resumed[k], whole[k]) for k in whole)
    about["average"] = far(flat(whole), flat(last))
    about["moved"] = any(not torch.equal(half[k], whole[k]) for k in half)
    about["exists"] = says(
        lambda: (WORK[0] / "loras" / "whole.training").unlink() or train(name="whole", **run)
    )
    return about


def diverging() -> dict[str, Any]:
    """Spoil what is trained in the middle of runs: the file holds the last good state."""
    run, said = ours("train_run"), []
    notice, step, scale = ours("train_adapter").notice, run.Training._step, run.SCALE
    ours("train_adapter").notice = lambda message, level=0: said.append(message)
    at, factor = [0], [0.0]

    def stepped(training: Any) -> None:
        step(training)
        if training.iteration == at[0]:
            with torch.no_grad():
                for value in training.student.head.parameters():
                    value.mul_(factor[0])

    def spoiled(name: str, when: int, by: float) -> str:
        at[0], factor[0] = when, by
        run = {"iterations": 60, "steps": 1, "latent": latent("sd3", 1)}
        return says(lambda: train("sd3", name, **run))

    run.Training._step = stepped
    try:
        about = {"early": spoiled("early", 1, 50.0), "late": spoiled("late", 13, SPOILED)}
        start = {"iterations": 4, "steps": 1, "latent": latent("sd3", 1)}
        before = train("sd3", "again", **start)[1:]
        spoiled("again", 6, 50.0)
        run.SCALE = math.inf
        about["gradients"] = spoiled("gradients", 0, 1.0)
    finally:
        run.Training._step, run.SCALE = step, scale
        ours("train_adapter").notice = notice
    watch = ours("train_optimizer").LossWatch([])
    about["rising"] = [watch.problem(1.0 + 99 * (i > 20), changing=i < 60) for i in range(60)]
    about["rising"] += [watch.problem(1e6), watch.problem(1.0)]
    for last in (1.2, 1.5):
        watch = ours("train_optimizer").LossWatch(20 * [1.0] + 20 * [last])
        about[f"rise to {last}"] = watch.rise
    about["steps"] = load("late.safetensors")[2]["ss_steps"]
    after = load("again.safetensors")[1:]
    about["kept"] = all(torch.equal(after[0][k], before[0][k]) for k in before[0])
    about["kept steps"] = after[1]["ss_steps"]
    return {**about, "said": said}


def unsaved() -> dict[str, Any]:
    """Let the first of a run's files fail: the run goes on, says so, and writes its last one."""
    adapter, run, said = ours("train_adapter"), ours("train_run"), []
    write, notice = adapter.write_trained, run.notice

    def full_once(*args: Any) -> None:
        adapter.write_trained = write
        raise run.WriteError("no space left")

    adapter.write_trained, run.notice = full_once, said.append
    try:
        _, _, metadata = train("sd3", "unsaved", iterations=4, steps=1, checkpoint_every=2)
    finally:
        adapter.write_trained, run.notice = write, notice
    return {"said": said, "steps": metadata["ss_steps"]}


def kinds_of_runs() -> dict[str, Any]:
    """Train with the settings that the other cases leave as they are."""
    negative, watch = prompts("sd3", 2)[1], ours("train_run").LossWatch
    found, problem, changing = {}, watch.problem, []
    watch.problem = lambda own, loss, **about: changing.append(about) or problem(own, loss, **about)
    for name, changed in {
        "plain": {},
        "dx": {"policy": "dx", "count": 5},
        "one step": {"steps": 1, "count": 1},
        "cfg": {"guidance": "cfg", "scale": 3.0, "negative": negative},
        "probabilistic": {"guidance": "probabilistic", "scale": 0.2, "negative": negative},
        "attention": {"targets": ours("train_lora").ATTENTION},
        "decay": {"decay": 2, "dropout": 0.2, "states": 2},
        "warm": {"warm_start": "sd3_4step.safetensors"},
    }.items():
        run = {"iterations": 2, "latent": latent("sd3", 1), **changed}
        _, tensors, metadata = train("sd3", f"run_{name}", **run)
        found[name] = {
            "values": flat(tensors),
            "finite": all(bool(t.isfinite().all()) for t in tensors.values()),
            "policy": json.loads(metadata["policy_config"]),
            "steps": metadata["gmflow.steps"],
            "tensors": len(tensors),
            "changing": [each["changing"] for each in changing],
        }
        changing.clear()
    watch.problem = problem
    source = flat(load("sd3_4step.safetensors")[1])
    about = {
        name: far(each.pop("values"), source) for name, each in found.items() if name == "warm"
    }
    values = {name: each.pop("values") for name, each in found.items() if "values" in each}
    for name in ("cfg", "probabilistic"):
        about[name] = far(values[name], values["plain"])
    return {**found, "apart": about}


def edit() -> dict[str, Any]:
    """Train with a reference picture in the prompt, whose tokens are behind the image's."""
    texts, run = prompts("qwen"), {"iterations": 4, "latent": latent("qwen", 1)}
    generator = torch.Generator().manual_seed(7)
    texts[0][0][1]["reference_latents"] = [torch.randn(1, 16, 1, 4, 6, generator=generator)]
    model, *_ = train("qwen", "edit", prompts=texts, **run)
    sigmas = torch.tensor([1.0, 0.0])
    both = base_of("qwen"), model
    found = [
        sample(each, latent("qwen"), texts[0], sampler("euler"), sigmas=sigmas) for each in both
    ]
    other = sample(model, latent("qwen"), prompts("qwen")[0], sampler("euler"), sigmas=sigmas)
    return {"far": far(found[1], found[0]), "effect": far(other, found[1])}


def load_gguf() -> Any:
    """Load FLUX.1's GGUF file by ComfyUI-GGUF's loader."""
    import asyncio

    import folder_paths

    import nodes

    asyncio.run(nodes.load_custom_node((WORK[0] / "gguf.txt").read_text()))
    folder_paths.add_model_folder_path("diffusion_models", str(WORK[0]))
    return nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet("flux.gguf")[0]


def quantised() -> dict[str, Any]:
    """Look at gradients through quantised weights, which the LoRA leaves as they are."""
    import comfy.sd

    path, found = str(WORK[0] / "flux.safetensors"), {}
    fp8 = {"dtype": torch.float8_e4m3fn}
    models = {"fp8": comfy.sd.load_diffusion_model(path, model_options=fp8)}
    models["int8"] = ours("int8_files").load_8bit(path, "16 bit")
    if (WORK[0] / "flux.gguf").is_file():
        models["gguf"] = load_gguf()
    for name, model in models.items():
        about = Probe("flux", True, model)
        result, tensors, _ = train("flux", f"flux_{name}", model, iterations=2)
        found[name] = {"names": len(about["gradient"]), "error": about["error"]}
        found[name] |= {"far": distances("flux", result)["student"], "tensors": len(tensors)}
    return found


def node() -> dict[str, Any]:
    """Run the node itself: lists of inputs, a file of prompts, and pictures beside the bar."""
    import comfy.sd
    import comfy.utils
    import folder_paths
    from comfy.cli_args import LatentPreviewMethod, args

    import nodes

    (WORK[0] / "prompts.txt").write_text("a red fox\n\n  a blue bird \n", encoding="utf-8")
    folder_paths.set_input_directory(str(WORK[0]))
    clip = comfy.sd.load_clip([str(WORK[0] / "text.safetensors")], clip_type=comfy.sd.CLIPType.SD3)
    pictures: list[Any] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, most, image, **_: pictures.append(image))
    args.preview_method = LatentPreviewMethod.Latent2RGB
    train_node = nodes.NODE_CLASS_MAPPINGS["GMFlowTrainAdapter"]
    lists = {
        "model": [base_of("sd3")],
        "latent_image": [{"samples": torch.zeros(1, 16, 8, 8)}],
        "positive": prompts("sd3", 2),
        "clip": [clip],
        "prompts_file": ["prompts.txt"],
        "teacher_guidance": ["cfg"],  # away from an empty text
        "warm_start": ["(new)"],
        "gradient_checkpointing": [False],
        "save_name": ["folder/by_node"],
    }
    numbers = {"steps": 2, "K": 2, "teacher_scale": 3.0, "iterations": 2, "preview_every": 1}
    try:
        result = train_node.execute(**lists, **{name: [n] for name, n in numbers.items()})
    finally:
        args.preview_method = LatentPreviewMethod.NoPreviews
        comfy.utils.set_progress_bar_global_hook(None)
    metadata = load(result[1])[2]
    info_node = nodes.NODE_CLASS_MAPPINGS["GMFlowAdapterInfo"]
    info = info_node.execute(adapter_name=result[1], model=base_of("sd3"))[0]
    later = {"save_name": ["later"], "warm_start": [result[1]], "iterations": [1]}
    again = train_node.execute(**{**lists, **later, "K": [2], "steps": [2]})[1]
    given = {name: lists[name] for name in ("save_name", "prompts_file")}
    stamps = [train_node.fingerprint_inputs(**given)]
    (WORK[0] / "prompts.txt").write_text("a green fish\n", encoding="utf-8")
    stamps.append(train_node.fingerprint_inputs(**given))
    (WORK[0] / "loras" / "folder" / "by_node.safetensors").unlink()
    stamps += [train_node.fingerprint_inputs(**given) for _ in range(2)]
    gone = train_node.validate_inputs(warm_start=["gone.safetensors"])
    wrong = says(lambda: train_node.execute(**{**lists, "steps": [9]}))
    two = says(lambda: train_node.execute(**{**lists, "model": 2 * lists["model"]}))
    sizes = [list(picture[1].size) for picture in pictures if picture]
    about = {"name": result[1], "wrong": wrong, "two": two, "sizes": sizes, "metadata": metadata}
    return {**about, "info": info, "again": again, "gone": gone, "stamps": stamps}


CASES = {
    "node": node,
    "gradients": gradients,
    "start": start,
    "interrupted": interrupted,
    "diverging": diverging,
    "unsaved": unsaved,
    "refused": refused,
    "damaged": damaged,
    "runs": kinds_of_runs,
    "quantised": quantised,
    "edit": edit,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
