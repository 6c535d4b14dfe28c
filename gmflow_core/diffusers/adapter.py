"""GM adapters on pipelines of diffusers: a LoRA, a head and a schedule that come off again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.adapter_file import (
    check_size,
    lora_pairs,
    made_for,
    policy_of,
    read_tensors,
    split_tensors,
)
from ..files.adapter_metadata import AdapterFacts
from ..flow.policy import PolicyVelocity
from ..models.adapter_heads import Head, HeadLayout, build_head
from ..models.state_dict import check_shapes
from .scheduler import GMFlowScheduler, Offer


@dataclass(frozen=True)
class Base:
    """A transformer of diffusers that adapters exist for.

    Args:
        name: of the base model.
        layout: of its tokens.
        guidance: distilled guidance that published adapters for it were made with, if any.
    """

    name: str
    layout: HeadLayout
    guidance: float | None = None


BASES = {  # by the transformer's class
    "FluxTransformer2DModel": Base("FLUX.1", HeadLayout(channels=16), 3.5),
    "QwenImageTransformer2DModel": Base("Qwen-Image", HeadLayout(channels=16)),
    "Flux2Transformer2DModel": Base(
        "FLUX.2", HeadLayout(channels=32, folded=2, modulation_bias=False), 4.0
    ),
}
LAST_LAYERS = ("norm_out", "proj_out")  # of all of these: the head replaces the first
DOWN, UP = "gmflow_lora_down", "gmflow_lora_up"  # buffers of the layers that a LoRA changes


class HeadForward:
    """Forward of a transformer's last norm, computed by an adapter's head.

    It returns mean velocity tokens, and offers the whole prediction to the pipeline's scheduler if
    that is a `GMFlowScheduler`. The head's weights are not among the transformer's, so that what
    diffusers does with those (offloading, saving) works as before.

    Args:
        head: the head.
        scheduler: returns the pipeline's scheduler.
    """

    def __init__(self, head: Head, scheduler: Callable[[], Any]):
        self.head, self.scheduler = head, scheduler

    def __call__(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, N, C p^2) for tokens (B, N, D) and their embedding (B, D)."""
        prediction = self.head(tokens, embedding)
        mean = self.head.layout.to_tokens(prediction.mean()).to(tokens.dtype)
        self.hand_over(prediction, mean)
        return mean

    @torch.compiler.disable
    def hand_over(self, prediction: PolicyVelocity, mean: Tensor) -> None:
        """Offer a prediction to the scheduler."""
        scheduler = self.scheduler()
        if isinstance(scheduler, GMFlowScheduler) and scheduler.config.policy is not None:
            scheduler.offer(Offer(self.head, prediction, mean))


def _pass_on(tokens: Tensor) -> Tensor:
    """Return the tokens: the forward of the layer behind the head."""
    return tokens


@dataclass(eq=False)
class GMAdapter:
    """A GM adapter on a pipeline, from `load_gm_adapter`.

    Args:
        base: name of the base model.
        facts: what it was made for; `steps`, `shift` and `final_step_size` are always known.
    """

    base: str
    facts: AdapterFacts
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def steps(self) -> int:
        """Return the fewest steps that it was made for, for num_inference_steps."""
        return self.facts.steps

    @property
    def guidance(self) -> float | None:
        """Return the distilled guidance that it was made for, for guidance_scale, if any."""
        return self.facts.guidance

    def unload(self) -> None:
        """Take the adapter off the pipeline, which then computes what it did before, bit for bit.

        Raises:
            ValueError: something has replaced the transformer's last layers since.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


def load_gm_adapter(
    pipeline: Any, file: str | Path, *, strength: float = 1.0, **settings: Any
) -> GMAdapter:
    """Put a GM adapter on a pipeline of FLUX.1, Qwen-Image or FLUX.2.

    The head takes the place of the transformer's last layers. The LoRA runs beside the layers it
    changes, whose weights stay as they are (quantised ones too). The scheduler becomes a
    `GMFlowScheduler` with the adapter's schedule. Call the pipeline with num_inference_steps =
    adapter.steps and, if it is not None, guidance_scale = adapter.guidance.

    Args:
        pipeline: of diffusers, with `transformer` and `scheduler`.
        file: the adapter's safetensors file, of a GM, DX or ArcFlow policy. What its metadata
            (`gmflow.*`, `policy_config`) do not say is taken from the names of file and folder.
        strength: of the LoRA.
        settings: of the `GMFlowScheduler`, in the place of the adapter's; `solver` is "gm-policy"
            else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no adapter, does not fit the pipeline, or the pipeline
            has an adapter already; or a setting is out of range.
    """
    path = Path(file)
    transformer, base = _transformer_of(pipeline)
    tensors, metadata = read_tensors(path)
    name = f"{path.absolute().parent.name}/{path.name}"
    head_tensors, lora = split_tensors(tensors)
    policy = policy_of(metadata, head_tensors, name)
    facts = made_for(metadata, policy, name, lambda text: warnings.warn(text, stacklevel=2))
    _check_base(facts, base, name)
    try:
        head = build_head(head_tensors, policy, base.layout, transformer.inner_dim)
    except ValueError as error:
        raise ValueError(f"{name} does not fit this {base.name} pipeline: {error}") from error
    check_size(policy, head, name)
    layers = _lora_layers(transformer, lora, name, base)
    scheduler = _scheduler_for(pipeline, facts, settings)
    adapter = GMAdapter(base.name, _with_guidance(facts, base, transformer, name))
    for layer, down, up in layers:
        adapter._undo.append(_add_lora(layer, down, up, strength))
    forward = HeadForward(head, lambda: pipeline.scheduler)
    for layer, replacement in zip(LAST_LAYERS, (forward, _pass_on), strict=True):
        adapter._undo.append(_replace_forward(getattr(transformer, layer), replacement))
    adapter._undo.append(_replace_scheduler(pipeline, scheduler))
    return adapter


def _transformer_of(pipeline: Any) -> tuple[nn.Module, Base]:
    """Return a pipeline's transformer, as it is below torch.compile, and its entry in BASES.

    Raises:
        ValueError: it has none that adapters exist for, or it has an adapter already.
    """
    transformer = getattr(pipeline, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    names = [each.__name__ for each in type(transformer).__mro__]
    base = next((BASES[name] for name in names if name in BASES), None)
    if base is None:
        raise ValueError(
            f"a {type(pipeline).__name__} with the transformer {names[0]} takes no GM adapter; "
            f"give a pipeline with one of {', '.join(BASES)}"
        )
    if isinstance(vars(transformer.norm_out).get("forward"), HeadForward):
        raise ValueError(
            "the pipeline has a GM adapter already, and can have only one; call its unload() first"
        )
    return transformer, base


def _check_base(facts: AdapterFacts, base: Base, name: str) -> None:
    """Check that an adapter is for this base model, if its file names one that is known here.

    Raises:
        ValueError: it is for another one.
    """
    known = {each.name.lower(): each for each in BASES.values()}
    stated = known.get((facts.base or "").lower(), base)
    if stated is not base:
        raise ValueError(
            f"{name} is for {stated.name} (gmflow.base in its metadata), and this pipeline is "
            f"{base.name}; choose an adapter for {base.name}"
        )


def _with_guidance(
    facts: AdapterFacts, base: Base, transformer: nn.Module, name: str
) -> AdapterFacts:
    """Return the facts with the guidance that the transformer takes, None if it takes none."""
    if base.guidance is None:
        return replace(facts, guidance=None)
    if not transformer.config.guidance_embeds:
        warnings.warn(
            f"{name} is made for the version of {base.name} with a guidance embedding (dev), and "
            "this transformer has none, so expect poor images",
            stacklevel=3,
        )
        return replace(facts, guidance=None)
    return replace(facts, guidance=base.guidance if facts.guidance is None else facts.guidance)


def _scheduler_for(pipeline: Any, facts: AdapterFacts, settings: dict) -> GMFlowScheduler:
    """Return the scheduler with an adapter's schedule, and the settings that the caller gave.

    Raises:
        TypeError: a setting is unknown.
        ValueError: a setting is out of range.
    """
    unknown = settings.keys() - inspect.signature(GMFlowScheduler).parameters
    if unknown:
        raise TypeError(f"GMFlowScheduler has no settings {', '.join(sorted(unknown))}")
    schedule = {
        "shift": facts.shift,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "solver": "gm-policy",
        "substeps": None,  # those of another solver would mean something else
        "stochasticity": 0.0,
        "final_step_size": facts.final_step_size,
        "temperature": facts.temperature,
        **settings,
    }
    config = dict(pipeline.scheduler.config)
    return GMFlowScheduler.from_config(config, **schedule, policy=facts.policy)


def _lora_layers(
    transformer: nn.Module, lora: dict[str, Tensor], name: str, base: Base
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Return each layer that a LoRA changes, with its matrices A (rank, in) and B (out, rank).

    A layer that PEFT has wrapped is the one inside, so that ours survives when PEFT takes its
    wrapper off.

    Raises:
        ValueError: the pairs do not fit the transformer.
    """
    pairs, modules = lora_pairs(lora, name), dict(transformer.named_modules())
    found = {
        key: getattr(modules[key], "base_layer", modules[key]) for key in pairs.keys() & modules
    }
    expected = {
        key: (layer.out_features, layer.in_features)
        for key, layer in found.items()
        if hasattr(layer, "in_features")
    }
    products = {key: (up.shape[0], down.shape[1]) for key, (down, up) in pairs.items()}
    advice = "the file is damaged, or made for another base model"
    check_shapes(expected, products, f"this {base.name} transformer", source=name, advice=advice)
    return [(found[key], *pair) for key, pair in pairs.items()]


def _add_lora(layer: nn.Module, down: Tensor, up: Tensor, strength: float) -> Callable[[], None]:
    """Add up(down(x)) * strength to a layer's output; return a function that removes it.

    The matrices are buffers of the layer, so that they go where it goes, and are not saved.
    """
    device = layer.weight.device
    device = None if device.type == "meta" else device
    layer.register_buffer(DOWN, down.to(device), persistent=False)
    layer.register_buffer(UP, (up.float() * strength).to(device, up.dtype), persistent=False)

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        low = F.linear(x, getattr(layer, DOWN).to(x))
        return output + F.linear(low, getattr(layer, UP).to(x)).to(output.dtype)

    hook = layer.register_forward_hook(add)

    def undo() -> None:
        hook.remove()
        delattr(layer, DOWN)
        delattr(layer, UP)

    return undo


def _replace_forward(layer: nn.Module, forward: Callable) -> Callable[[], None]:
    """Replace the forward of a module; return a function that puts the former one back."""
    former = vars(layer).get("forward")  # a hook of accelerate; None for the class's own
    layer.forward = forward

    def undo() -> None:
        if vars(layer).get("forward") is not forward:
            raise ValueError(
                "something has replaced the last layers behind the adapter, such as an offload "
                "that was turned on later; undo that first (pipeline.remove_all_hooks())"
            )
        del layer.forward
        if former is not None:
            layer.forward = former

    return undo


def _replace_scheduler(pipeline: Any, scheduler: GMFlowScheduler) -> Callable[[], None]:
    """Replace a pipeline's scheduler; return a function that puts the former one back.

    A scheduler that the user has set since then stays, unless it waits for an adapter.
    """
    former = pipeline.scheduler
    pipeline.scheduler = scheduler

    def undo() -> None:
        present = pipeline.scheduler
        if isinstance(present, GMFlowScheduler) and present.config.policy is not None:
            pipeline.scheduler = former

    return undo
