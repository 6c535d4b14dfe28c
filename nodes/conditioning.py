"""Nodes that make CONDITIONING."""

from __future__ import annotations

import torch
from comfy_api.latest import io


def unconditional() -> list:
    """CONDITIONING that says nothing."""
    return [[torch.zeros(1, 1, 1), {}]]


class GMFlowUnconditional(io.ComfyNode):
    """Empty CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GMFlowUnconditional",
            display_name="GM Unconditional",
            category="GMFlow",
            description="Empty conditioning, for models that take none (such as the checkerboard) in nodes that ask for one: "
            "KSampler, Basic Guider, CFG Guider.",
            inputs=[],
            outputs=[io.Conditioning.Output(tooltip="Says nothing; connect it to positive, and to negative where asked.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(unconditional())
