"""Nodes whose outputs have the right type for an input, and the wrong content."""

from __future__ import annotations

import math
import random
from typing import Any

from tests.comfyui.adapter_prompts import ADAPTERS, FILES
from tests.comfyui.graphs import node

Prompt = dict[str, Any]
NAN = float("nan")


def _latents() -> list[Prompt]:
    empty = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    plain = [
        empty,
        node("EmptyLatentImage", width=16, height=2048, batch_size=1),
        node("EmptyLatentImage", width=64, height=64, batch_size=64),
        node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        node("EmptyFlux2LatentImage", width=64, height=64, batch_size=1),
        node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
        node("EmptyLatentAudio", seconds=1.0, batch_size=1),
        node("EmptyLatentHunyuan3Dv2", resolution=64, batch_size=1),
    ]
    scaled = [
        {"odd_more": start, "odd": node("LatentMultiply", samples=["odd_more", 0], multiplier=m)}
        for start in (
            empty,
            node("GMFlowClassLabels", model=["odd_model", 0], label="0", more_labels="", repeat=2),
        )
        for m in (NAN, math.inf, 1e30, -10.0)
    ]
    digits = node("GMFlowLoader", model_name="digits_k8.safetensors")
    for graph in scaled[4:]:
        graph["odd_model"] = digits
        graph["odd"]["inputs"]["samples"] = ["odd_more", 2]
    flat = node("LatentMultiply", samples=["odd_more", 0], multiplier=0.0)
    return [{"odd": each} for each in plain] + scaled + [{"odd_more": empty, "odd": flat}]


def _models() -> list[Prompt]:
    shipped = ("checkerboard_k64", "digits_k8", "digits_modes_k8")
    graphs = [{"odd": node("GMFlowLoader", model_name=f"{name}.safetensors")} for name in shipped]
    for base in ("flux", "qwen"):
        plain = node("UNETLoader", unet_name=FILES[base], weight_dtype="default")
        graphs.append({"odd": plain})
        for strength in (1.0, NAN, -5.0, 1e20):
            adapter = node(
                "GMFlowAdapter",
                model=["odd_more", 0],
                adapter_name=ADAPTERS[base],
                strength=strength,
            )
            graphs.append({"odd_more": plain, "odd": adapter})
    eight = node("GMFlowLoadDiffusionModel8bit", unet_name=FILES["flux"], compute="int8")
    graphs.append({"odd": eight})
    for kind, more in (
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
        ("ModelSamplingSD3", {"shift": 3.0}),
        ("RescaleCFG", {"multiplier": 0.7}),
        ("ModelMergeSubtract", {"model2": ["odd_more", 0], "multiplier": 1.0}),
    ):
        wire = {"model1" if "model2" in more else "model": ["odd_more", 0]}
        graphs += [
            {"odd_more": graphs[n]["odd"], "odd": node(kind, **wire, **more)} for n in range(3)
        ]
    return graphs


def _conditionings() -> list[Prompt]:
    clip = node(
        "DualCLIPLoader",
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl.safetensors",
        type="flux",
    )
    text = node("CLIPTextEncode", clip=["odd_more", 0], text="a fox")
    digits = node("GMFlowLoader", model_name="digits_k8.safetensors")
    labels = node(
        "GMFlowClassLabels", model=["odd_more", 0], label="0", more_labels="1\n2", repeat=3
    )
    return [
        {"odd_more": clip, "odd": text},
        {"odd_more": digits, "odd": labels},
        {"odd": node("GMFlowUnconditional")},
        {
            "odd_clip": clip,
            "odd_more": {**text, "inputs": {**text["inputs"], "clip": ["odd_clip", 0]}},
            "odd": node("ConditioningZeroOut", conditioning=["odd_more", 0]),
        },
    ]


ODD = {"LATENT": _latents(), "MODEL": _models(), "CONDITIONING": _conditionings()}


def odd_source(rng: random.Random, type_: str) -> Prompt | None:
    """Draw nodes to add to a prompt, of which "odd" has an output of the type; None for others."""
    return rng.choice(ODD[type_]) if type_ in ODD else None
