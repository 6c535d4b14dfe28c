"""Rows of the table for training loops, a whole sampler, and start-up work in ComfyUI."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from gmflow_core import Guidance, flow_sigmas, probabilistic_guidance
from gmflow_core.flow.path import velocity_to_x0
from gmflow_core.gaussians.draws import standard_normal
from gmflow_core.gaussians.mixture import GaussianMixture
from gmflow_core.models.gmdit import GMDiT, GMDiTConfig
from gmflow_core.sampling.images import sample_images
from gmflow_core.sampling.solvers import solve
from gmflow_core.toys.checkerboard import draw_checkerboard
from tests.comfyui.installation import COMFYUI
from training.data.shards import FORMAT, write_index, write_shard
from training.loop import checkerboard_presets, image_presets
from training.loop.checkerboard_trainer import CheckerboardTrainer
from training.loop.image_trainer import ImageTrainer

from . import eight_bit, extension_import, naive
from .eight_bit_inside import STRAIGHT
from .measure import Bench, floor, products_of, quartiles, ratios
from .rows import WEIGHT

GB = 1e9


# Training


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], decay: float
) -> Callable:
    """Return one iteration of a plain training loop that also averages the weights."""
    average = [parameter.detach().clone() for parameter in model.parameters()]

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)

    return step


def compare_steps(bench: Bench, case: str, forms: dict[str, Callable | str]) -> dict:
    """Measure iterations of the trainer and of the plain loop."""
    return bench.compare(
        "training",
        case,
        forms,
        work=(0, products_of(forms["naive"])),
        unit=("GB", GB),
        gradient=True,
    )


def cpu_or_auto(bench: Bench) -> str:
    """Return the trainer's `device` setting, and make accelerate forget the process's device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return "cpu" if bench.device == "cpu" else "auto"


def checkerboard_loss(
    model: nn.Module, batch: int, ratio: float, device: str
) -> Callable[[], Tensor]:
    """Return a function that draws a batch of points and computes the transition loss."""

    def loss() -> Tensor:
        x0 = draw_checkerboard(batch).to(device)
        high = torch.rand(batch, device=device).clamp(min=1e-4)
        low = high * (1 - ratio)
        x_low = (1 - low)[:, None] * x0 + low[:, None] * torch.randn_like(x0)
        keep = ((1 - high) / (1 - low))[:, None]
        x_high = keep * x_low + (
            high[:, None] ** 2 - (keep * low[:, None]) ** 2
        ).sqrt() * torch.randn_like(x0)
        return naive.transition_nll(model(x_high, high), x_low, x_high, low, high).mean()

    return loss


def image_loss(
    model: GMDiT, x: Tensor, labels: Tensor, batch: int, ratio: float, device: str
) -> Callable[[], Tensor]:
    """Return a function that draws a batch of `x` and computes transition and spectral loss.

    Args:
        x: images, either uint8 in [0, 255] or float latents, (N, C, H, W).
    """

    def loss() -> Tensor:
        rows = torch.randint(len(x), (batch,))
        x0, classes = x[rows].to(device), labels[rows].to(device)
        x0 = x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0
        classes = torch.where(
            torch.rand(batch, device=device) < 0.1, model.config.num_classes, classes
        )
        high = torch.randn(batch, device=device).sigmoid()
        low = high * (1 - ratio)
        high_, low_ = high[:, None, None, None], low[:, None, None, None]
        x_low = (1 - low_) * x0 + low_ * torch.randn_like(x0)
        keep = (1 - high_) / (1 - low_)
        x_high = keep * x_low + (high_**2 - (keep * low_) ** 2).sqrt() * torch.randn_like(x0)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity = model(x_high, high, classes)
        flow = naive.transition_nll(velocity, x_low, x_high, low, high).mean()
        constant = GaussianMixture(
            velocity.means.detach(), velocity.log_weights.detach(), velocity.log_std.detach()
        )
        log_power = model.spectrum_net(velocity_to_x0(constant.moment_match(), x_high, high))
        return 2 * flow + naive.spectral_nll(constant, (x_high - x0) / high_, log_power).mean()

    return loss


def training_rows(bench: Bench) -> Iterator[dict]:
    """Measure iterations of the trainers beside plain loops.

    Both use the same network, loss, optimizer and weight average.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = dataclasses.replace(
            checkerboard_presets.PRESETS["full"],
            out=folder / "checkerboard",
            device=cpu_or_auto(bench),
        )
        if bench.quick:
            config = dataclasses.replace(config, batch_size=64, num_components=4)
        trainer = CheckerboardTrainer(config)
        model = copy.deepcopy(trainer.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
        plain = checkerboard_loss(model, config.batch_size, config.transition_ratio, bench.device)
        yield compare_steps(
            bench,
            f"checkerboard, K = {config.num_components}, "
            f"an iteration of {config.batch_size} points",
            {"ours": trainer.iterate, "naive": plain_step(model, optimizer, plain, 0.999)},
        )
        yield gmdit_row(bench, folder)


def gmdit_row(bench: Bench, folder: Path) -> dict:
    """Measure iterations of a GM-DiT: the digits' in float32 on a CPU, S in bfloat16 on a GPU."""
    preset, shape, batch = {
        "cpu": ("digits", (3, 8, 8), 64),
        "cuda": ("gmdit_s_k8", (4, 32, 32), 128),
    }[bench.device]
    x, labels = torch.randint(256, (512, *shape), dtype=torch.uint8), torch.randint(10, (512,))
    kind, x = ("pixels", x) if shape[0] == 3 else ("latents", torch.randn(512, *shape))
    write_shard(folder / "shard-00000.safetensors", x, labels, {})
    index = {
        "format": FORMAT,
        "kind": kind,
        "shape": list(shape),
        "classes": list("0123456789"),
        "count": 512,
        "skipped": [],
    }
    write_index(folder, index | {"shards": [{"file": "shard-00000.safetensors", "count": 512}]})
    config = dataclasses.replace(
        image_presets.PRESETS[preset],
        data=folder,
        out=folder / "imagenet",
        batch_size=4 if bench.quick else batch,
        device=cpu_or_auto(bench),
        optimizer="adamw",
        precision="bf16" if bench.device == "cuda" else "fp32",
        gradient_checkpointing=False,
        workers=0,
    )
    if bench.quick:
        config = dataclasses.replace(config, num_layers=2)
    trainer = ImageTrainer(config)
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    loss = image_loss(model, x, labels, config.batch_size, config.transition_ratio, bench.device)
    compiled: Callable | str = "not run: not asked for"
    if bench.compiled:
        compiled = ImageTrainer(dataclasses.replace(config, compile=True)).iterate
    forms = {
        "ours": trainer.iterate,
        "ours, compiled": compiled,
        "naive": plain_step(model, optimizer, loss, 0.999),
    }
    size = f"{config.num_layers} layers of width {model.config.width}"
    return compare_steps(
        bench, f"GM-DiT, {size}, an iteration of {config.batch_size} images", forms
    )


# A whole sampler


def sampler_rows(bench: Bench) -> Iterator[dict]:
    """Measure guided GM-ODE 2 with a GM-DiT, as one batched network call a step or as two."""
    torch.manual_seed(0)
    config = GMDiTConfig(num_layers=12, num_heads=6, head_dim=64, num_classes=10)
    if bench.quick:
        config = dataclasses.replace(config, num_layers=1, latent_size=8)
    network = GMDiT(config).to(bench.device).eval().requires_grad_(False)
    labels = torch.arange(2)

    def two_calls(steps: int) -> Tensor:
        noise = standard_normal(
            (2, 4, config.latent_size, config.latent_size), generators(), like=torch.empty(0)
        )
        classes = labels.to(bench.device)

        def denoise(x: Tensor, sigma: Tensor) -> GaussianMixture:
            cond = naive.velocity_to_x0(network(x, sigma, classes), x, sigma)
            uncond = naive.velocity_to_x0(network(x, sigma, torch.full_like(classes, 10)), x, sigma)
            return probabilistic_guidance(cond, naive.mean_of(uncond), WEIGHT)

        return solve("gm-ode", denoise, noise.to(bench.device), flow_sigmas(steps))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(2)]

    steps = 2
    side = config.latent_size
    size = f"{config.num_layers} layers of width {config.width}, {side} x {side}"
    with torch.inference_mode():
        flops = products_of(lambda: two_calls(steps))
    yield bench.compare(
        "sampler",
        f"GM-DiT, {size}, batch 2, {steps} guided steps of GM-ODE 2",
        {
            "ours": lambda: sample_images(network, labels, steps=steps, guidance=Guidance(WEIGHT)),
            "two calls": lambda: two_calls(steps),
        },
        work=(0, flops),
        unit=("GB", GB),
        reference="two calls",
    )


# In ComfyUI


def measured_elsewhere(
    row: str, case: str, forms: dict[str, dict], reference: str, rates: dict, moved: float
) -> dict:
    """Return a line of the table from figures that child processes measured."""
    for about in forms.values():
        about["median"] = quartiles(about["seconds"])[1]
        about["ratio"] = ratios(forms[reference]["seconds"], about["seconds"])
        about["over_ours"] = ratios(about["seconds"], forms["ours"]["seconds"])
    line = {
        "row": row,
        "case": case,
        "device": "cpu",
        "reference": reference,
        "unit": "GB",
        "forms": forms,
    }
    return line | ({"floor": floor(rates, moved, 0)} if moved else {})


def not_run(row: str, case: str, why: str) -> dict:
    """Return a line of the table that says why a row was not measured."""
    return {
        "row": row,
        "case": case,
        "device": "cpu",
        "forms": {"ours": {"not_run": f"not run: {why}"}},
    }


def in_comfyui(bench: Bench) -> str:
    """Return the reason why rows in ComfyUI cannot run here; empty if they can."""
    if not (COMFYUI / "main.py").is_file():
        return f"no ComfyUI in {COMFYUI}, set COMFYUI_PATH"
    return ""


def eight_bit_rows(bench: Bench) -> Iterator[dict]:
    """Measure loading one bf16 file in FLUX's layout in 8 bit.

    Compared: our 8-bit loader, ComfyUI's loader followed by rounding every weight, and ComfyUI's
    loader alone in bf16 and in fp8.
    """
    from tests.comfyui.bases import write_flux

    if bench.device != "cpu":
        return
    row, case = "8-bit load", "a bf16 file in FLUX.1's layout"
    if problem := in_comfyui(bench):
        yield not_run(row, case, problem)
        return
    variants = {"ours": "8-bit", "naive": STRAIGHT, "bf16": "bf16", "fp8": "fp8"}
    forms: dict[str, dict] = {name: {"seconds": [], "memory": 0.0} for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        path = write_flux(
            Path(folder) / "flux.safetensors",
            hidden=256 if bench.quick else 2048,
            depth=1,
            single=2,
        )
        size = path.stat().st_size
        for repeat in range(1 if bench.quick else 3):
            for name in list(variants)[:: 1 if repeat % 2 == 0 else -1]:
                found = eight_bit.run_child("memory", variant=variants[name], path=str(path))
                forms[name]["seconds"].append(found["seconds"])
                forms[name]["memory"] = max(forms[name]["memory"], found["peak"])
                forms[name]["size"] = found["model_size"] * GB
    yield measured_elsewhere(
        row,
        f"{case}, {size / GB:.2g} GB",
        forms,
        "naive",
        bench.rates,
        size + forms["ours"]["size"],
    )


def import_rows(bench: Bench) -> Iterator[dict]:
    """Measure importing the extension beside ComfyUI's own imports."""
    if bench.device != "cpu":
        return
    row, case = "extension import", "a new process"
    if problem := in_comfyui(bench):
        yield not_run(row, case, problem)
        return
    runs = [extension_import.measure() for _ in range(1 if bench.quick else 3)]
    forms = {
        name: {"seconds": [run[key] for run in runs]}
        for name, key in (("ours", "extension"), ("ComfyUI", "comfyui"))
    }
    yield measured_elsewhere(row, case, forms, "ComfyUI", bench.rates, 0)


ROWS = {
    "training": training_rows,
    "sampler": sampler_rows,
    "8-bit": eight_bit_rows,
    "import": import_rows,
}
