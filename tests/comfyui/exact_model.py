"""A MODEL of Gaussian data whose network is exact, and how to sample it; for `plain_inside.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MEAN, WIDTH = 0.3, 0.6  # of the data
SHAPE = (2, 4, 6, 8)  # of a latent


class Exact(nn.Module):
    """The exact network of Gaussian data: velocity, epsilon or v, for the time that it is fed.

    Args:
        kind: name of a ModelType.
        sampling: ComfyUI's model sampling, to turn times into sigmas.
    """

    dtype = torch.float32

    def __init__(self, kind: str, sampling: Any):
        super().__init__()
        self.kind, self.sampling, self.keys = kind, sampling, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, time: Tensor, context: Any = None, transformer_options: Any = None, **_
    ) -> Tensor:
        self.keys.append(sorted(transformer_options or {}))
        far_mean = MEAN if context is None else context.mean((1, 2)).reshape(-1, 1, 1, 1)
        if self.kind == "FLOW":
            sigma = time.reshape(-1, 1, 1, 1) / self.sampling.multiplier
            signal, noise = 1 - sigma, sigma
        else:
            sigma = self.sampling.sigma(time).reshape(-1, 1, 1, 1)
            signal, noise = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
        power = (signal * WIDTH) ** 2 + noise**2
        off = (x - signal * far_mean) / power
        x0 = far_mean + signal * WIDTH**2 * off
        epsilon = noise * off
        if self.kind == "FLOW":
            return epsilon - x0
        return epsilon if self.kind == "EPS" else signal * epsilon - noise * x0


class ExactOfParts(Exact):
    """The exact network for latents of several parts, as models of video with sound take them."""

    def forward(self, x: list[Tensor], time: Tensor, *context: Any, **options: Any) -> list[Tensor]:
        return [super(ExactOfParts, self).forward(part, time, *context, **options) for part in x]


def exact_model(kind: str, shift: float = 1.0, exact: type[Exact] = Exact) -> Any:
    """Return a MODEL of the exact network."""
    import comfy.conds
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Config(comfy.supported_models_base.BASE):
        unet_config, unet_extra_config = {}, {}
        sampling_settings = {"shift": shift} if kind == "FLOW" else {}
        memory_usage_factor = 0.25
        manual_cast_dtype = torch.float32
        latent_format = comfy.latent_formats.SD15

    class Model(comfy.model_base.BaseModel):
        def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
            found = {"c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"])}
            if exact is ExactOfParts:
                found["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
            return found

    config = Config(Config.unet_config)
    network = exact(kind, None)
    model = Model(
        config, getattr(comfy.model_base.ModelType, kind), unet_model=lambda **settings: network
    )
    object.__setattr__(network, "sampling", model.model_sampling)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def text(mean: float = MEAN) -> list:
    """Return a conditioning that asks for data of this mean."""
    return [[torch.full((1, 3, 4), mean), {}]]


def limited(conditioning: list, **limits: Any) -> list:
    """Return a conditioning with a mask or a range of the sampling."""
    return [[tokens, {**about, **limits}] for tokens, about in conditioning]


def stock(
    model: Any,
    name: str = "gm_ode",
    scheduler: str = "gm",
    steps: int = 1,
    *,
    cfg: float = 1.0,
    denoise: float = 1.0,
    latent: Tensor | None = None,
    mask: Tensor | None = None,
    positive: list | None = None,
    negative: list | None = None,
    seed: int = 5,
    **settings: Any,
) -> Tensor:
    """Sample as KSampler and KSampler (Advanced) do."""
    import comfy.sample

    latent = torch.zeros(SHAPE) if latent is None else latent
    return comfy.sample.sample(
        model,
        settings.pop("noise", comfy.sample.prepare_noise(latent, seed)),
        steps,
        cfg,
        name,
        scheduler,
        positive or text(),
        negative or text(),
        latent,
        denoise=denoise,
        noise_mask=mask,
        seed=seed,
        disable_pbar=True,
        **settings,
    )
