"""Train teacher and adapter inside ComfyUI's process, for `train_adapter_digits.py`.

    COMFYUI/.venv/bin/python train_adapter_digits_inside.py COMFYUI WORK

WORK holds `flux_random.safetensors`, `inputs.safetensors`, `teachers.json` and `job.json`. It gets
the teacher, `flux.safetensors`, and `samples.safetensors`. A second start goes on with a teacher
that is not finished (`teacher_state.pt`), and with the adapter. The 16 channels of FLUX.1's latents
hold a digit's three channels five times, and their mean; a sample is the mean of its five copies.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1] / "comfyui"
CLASSES, BATCH, ADAPTER_BATCH, RATE, SHIFT = 10, 64, 16, 1e-3, 3.2
COPIES, SAVE_EVERY = 5, 500
RUN = {"rank": 32, "states": 2, "warmup": 20, "learning_rate": 1e-3, "steps": 4}
ADAPTERS = {"adapter": "published", "attention": "attention too"}  # name: targets
STOCK = ("euler", "uni_pc", "dpmpp_2m", "res_multistep")  # on the teacher, at the adapter's calls
SLOWER = {"learning_rate": 2e-4, "warm_start": "adapter.safetensors"}  # "adapter" goes on so


def main(comfyui: str, folder: str) -> None:
    """Train the teacher unless it is there, then the adapters, and sample all."""
    sys.path.insert(0, str(TESTS))
    import inside
    import train_parts

    work = Path(folder)
    train_parts.WORK.append(work)
    train_parts.TEACHERS.update(json.loads((work / "teachers.json").read_text()))
    inside.start(comfyui)
    from safetensors.torch import load_file, save_file

    job, inputs = (
        json.loads((work / "job.json").read_text()),
        load_file(work / "inputs.safetensors"),
    )
    texts = train_parts.prompts("flux", CLASSES)
    if not (work / "flux.safetensors").is_file():
        with torch.inference_mode(False):
            teacher = trained_teacher(work, inputs, texts, job["teacher_iterations"])
        save_file(teacher, work / "flux.safetensors")
    with torch.inference_mode():
        students = trained_adapters(job, texts) if "adapter_iterations" in job else {}
        found = samples_of_all(students, inputs, texts)
    save_file(found, work / "samples.safetensors")


def trained_adapters(job: dict, texts: list) -> dict[str, Any]:
    """Train an adapter for each choice of targets, and go on from the first; return the MODELs."""
    import train_parts

    more = {"prompts": texts, "latent": train_parts.latent("flux", ADAPTER_BATCH)}
    more |= {"iterations": job["adapter_iterations"], "preview_every": 0}
    students = {
        name: train_parts.train("flux", name, **RUN, **more, targets=targets)[0]
        for name, targets in ADAPTERS.items()
    }
    more["iterations"] = job["slower_iterations"]
    slower = {**RUN, **SLOWER, **more, "targets": "published"}
    return {**students, "slower": train_parts.train("flux", "adapter_slower", **slower)[0]}


def samples_of_all(students: dict[str, Any], inputs: dict, texts: list) -> dict[str, Tensor]:
    """Sample the teacher with stock samplers, then the students: 'model|sampler|sigmas|calls'."""
    import comfy.samplers
    import inside
    import train_parts

    teacher, sigmas, calls = train_parts.base_of("flux"), inside.ours("gm_sampler").gm_sigmas, 4
    few = sigmas(calls, SHIFT, final_step_size=0.5)
    shifts = {f"shift {shift:g}": shift for shift in (SHIFT, 1.0)}
    found = {}
    for name in STOCK:
        stock = comfy.samplers.sampler_object(name)
        choices = {"adapter's": few, **{k: sigmas(calls, shift) for k, shift in shifts.items()}}
        for spacing, values in choices.items():
            key = f"teacher|{name}|{spacing}|{calls}"
            found[key] = sampled(teacher, inputs, texts, stock, values)
    for spacing, shift in shifts.items():
        euler, values = comfy.samplers.sampler_object("euler"), sigmas(32, shift)
        found[f"teacher|euler|{spacing}|32"] = sampled(teacher, inputs, texts, euler, values)
    for name, student in students.items():
        policy = train_parts.sampler()
        key = f"{name}|gm-policy|adapter's|{calls}"
        found[key] = sampled(student, inputs, texts, policy, few)
    return found


def trained_teacher(work: Path, inputs: dict, texts: list, iterations: int) -> dict[str, Tensor]:
    """Train the network on the digits by plain flow matching; return its average weights."""
    import comfy.ops
    import comfy.sd
    import inside
    from comfy.ldm.flux.model import Flux

    path = str(work / "flux_random.safetensors")
    about = comfy.sd.load_diffusion_model(path).model.model_config.unet_config
    network = Flux(**{**about, "dtype": torch.float32}, operations=comfy.ops.disable_weight_init)
    from safetensors.torch import load_file

    names = {key.replace("_norm.scale", "_norm.weight"): key for key in load_file(path)}
    network.load_state_dict({own: load_file(path)[key] for own, key in names.items()})
    network.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    images = inputs["images"].float() / 127.5 - 1
    context = torch.cat([text[0][0] for text in texts])
    pooled = torch.cat([text[0][1]["pooled_output"] for text in texts])
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    average = {name: value.detach().clone() for name, value in network.named_parameters()}
    saved, first = work / "teacher_state.pt", 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average, first = state["average"], state["iteration"]
        generator.set_state(state["generator"])
    for iteration in range(first, iterations):
        if iteration % SAVE_EVERY == 0 and iteration > first:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "generator": generator.get_state()}
            torch.save({**state, "average": average, "iteration": iteration}, saved)
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        labels = inputs["labels"][chosen]
        x0 = encoded(images[chosen])
        noise = torch.randn(x0.shape, generator=generator)
        sigma = (torch.randn(BATCH, generator=generator) + math.log(SHIFT)).sigmoid()
        x = torch.lerp(x0, noise, sigma.reshape(-1, 1, 1, 1))
        given = context[labels], pooled[labels], torch.full((BATCH,), texts[0][0][1]["guidance"])
        with inside.ours("train_network").learning(), inside.ours("train_network").Differentiable():
            velocity = network(x, sigma, *given)
            loss = (velocity - (noise - x0)).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        keep = min(0.999, iteration / (iteration + 10))
        for name, value in network.named_parameters():
            average[name].lerp_(value.detach(), 1 - keep)
        if iteration % 100 == 0:
            print(f"teacher: {iteration}/{iterations}, loss {loss.item():.4f}", flush=True)
    return {names[name]: value for name, value in average.items()}


def sampled(model: Any, inputs: dict, texts: list, sampler: Any, sigmas: Tensor) -> Tensor:
    """Sample every noise with the text of its class; return the digits (n, 3, 8, 8)."""
    import comfy.samplers

    noise, wanted = inputs["noise"], inputs["wanted"]
    result = torch.empty(len(noise), 3, *noise.shape[2:])
    for label, text in enumerate(texts):
        own = (wanted == label).nonzero().flatten()
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(text, text)
        guider.set_cfg(1.0)
        empty = torch.zeros(len(own), *noise.shape[1:])
        x = guider.sample(noise[own], empty, sampler, sigmas, disable_pbar=True, seed=0)
        result[own] = decoded(model.model.process_latent_in(x).float())
    return result


def encoded(images: Tensor) -> Tensor:
    """Return the latents (n, 16, 8, 8) of images (n, 3, 8, 8)."""
    return torch.cat([images] * COPIES + [images.mean(1, keepdim=True)], dim=1)


def decoded(latents: Tensor) -> Tensor:
    """Return the images (n, 3, 8, 8) of latents (n, 16, 8, 8)."""
    return latents[:, :-1].unflatten(1, (COPIES, -1)).mean(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
