"""Nodes that show samples as pictures."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..gmflow_core.pictures import image_grid
from ..gmflow_core.toys.density_picture import density_picture
from .comfyui.latent_shapes import to_points
from .comfyui.notices import notice
from .comfyui.schema import node_schema
from .comfyui.sizes import check_size

GAP = 4  # between pictures on one sheet


class GMFlowDensity(io.ComfyNode):
    """A node that draws 2-D samples as a density picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowDensity",
            display_name="GM Density",
            category="GMFlow/view",
            aliases="preview, histogram, density, 2d, points, checkerboard, view",
            description="Draws the points of a two-channel latent as a picture of their density.",
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="A latent with two channels, x and y: each of its pixels is one point.",
                ),
                io.Int.Input("size", default=512, min=32, max=4096, tooltip="Pixels per side."),
                io.Int.Input(
                    "bins",
                    default=128,
                    min=8,
                    max=1024,
                    tooltip="Histogram cells per side. More cells show finer detail and need more "
                    "points: 128 cells need 60,000 or more.",
                ),
                io.Float.Input(
                    "extent",
                    default=4.4,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="The picture shows [-extent, extent] on both axes.",
                ),
                io.Boolean.Input(
                    "outline",
                    default=False,
                    tooltip="Draw the exact support of the checkerboard, the borders of its "
                    "squares, over the density.",
                ),
                io.Boolean.Input(
                    "merge_batch",
                    default=True,
                    tooltip="One picture of all the points, or one for each item of the batch.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    tooltip="The density; dark is empty, bright is at least 1.5 times that of a "
                    "checkerboard."
                )
            ],
        )

    @classmethod
    def execute(
        cls, samples, size: int, bins: int, extent: float, outline: bool, merge_batch: bool
    ) -> io.NodeOutput:
        latent = samples["samples"]
        if latent.shape[1] != 2:
            raise ValueError(
                f"this latent is not of points: it has {latent.shape[1]} channels, not two (shape "
                f"{tuple(latent.shape)}); use VAE Decode or GM Pixels for image models"
            )
        groups = [latent] if merge_batch else latent.split(1)
        check_size("pictures", len(groups), (size, size, 3), "choose a smaller size")
        bins = min(bins, size)
        if (points := groups[0].numel() // 2) < bins**2:
            notice(
                f"{points:,} points are few for {bins} x {bins} cells, and show as single dots; "
                "use fewer bins, or a larger latent"
            )
        pictures = [
            density_picture(to_points(g), size, bins, extent, outline=outline) for g in groups
        ]
        return io.NodeOutput(torch.stack(pictures))


class GMFlowPixels(io.ComfyNode):
    """A node that shows the samples of a pixel-space model as images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowPixels",
            display_name="GM Pixels",
            category="GMFlow/view",
            aliases="preview, latent to image, vae decode, emoji, digits, grid, view",
            description="Shows the samples of a model that works on pixels (emoji, digits), which "
            "need no VAE Decode: each pixel becomes a square.",
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="A latent with three channels, red, green and blue in [-1, 1].",
                ),
                io.Int.Input(
                    "scale",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Image pixels per side for each pixel of the sample: 16 makes an 8 x 8 "
                    "digit 128 x 128.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Samples side by side in one picture, row after row; 0 makes an image "
                    "for each.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="One image for each item of the batch, or one of them all.")
            ],
        )

    @classmethod
    def execute(cls, samples, scale: int, columns: int) -> io.NodeOutput:
        latent = samples["samples"]
        if latent.ndim != 4 or latent.shape[1] != 3:
            raise ValueError(
                f"this latent is not of pixels: its shape is {tuple(latent.shape)}, not (B, 3, h, "
                "w); use VAE Decode for models of latents, GM Density for points"
            )
        shape = (latent.shape[2] * scale, latent.shape[3] * scale, 3)
        check_size("pictures", len(latent), shape, "choose a smaller scale")
        images = (latent.float() + 1) / 2
        groups = [images] if columns else images.split(1)
        gap = GAP if columns else 0
        return io.NodeOutput(
            torch.stack([image_grid(g.clamp(0, 1), columns or 1, scale, gap) for g in groups])
        )
