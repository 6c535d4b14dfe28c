"""A node that shows the mixture a model predicts at one step."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.cells import Subject
from .comfyui.gm_model import PixelLatent
from .comfyui.inspection import record_mixture
from .comfyui.inspection_sheet import AT, UNCERTAIN, Inspection, describe, draw_inspection
from .comfyui.sample_pictures import decoder_of, enlarged
from .comfyui.schema import (
    conditioning_inputs,
    empty_latent_input,
    model_input,
    node_schema,
    seed_input,
    steps_input,
    vae_input,
)
from .comfyui.shown import shown_sheet
from .comfyui.solver_choice import no_effect


class GMFlowInspector(io.ComfyNode):
    """A node that samples, and draws the mixture of one step."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowInspector",
            display_name="GM Mixture Inspector",
            category="GMFlow/view",
            aliases="inspect, mixture, gaussian mixture, gaussian, entropy, uncertainty, weights, "
            "components, debug, view, preview",
            description="Shows the mixture that the model predicts at one step: maps of the "
            "weights' entropy, the effective number of components and the spread; the weights; the "
            "components' means as pictures; and the mixture of one pixel, which a click on a map "
            "chooses.",
            inputs=[
                model_input(),
                empty_latent_input(),
                seed_input("seed", "Seed of the noise; the same as in GM Sampler.", stays=True),
                steps_input(default=0),
                io.Int.Input(
                    "step",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="The step to look at, from 1. At the first one, in pure noise, the "
                    "mixture is widest.",
                ),
                *cls._place_inputs(),
                *conditioning_inputs(),
                vae_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet",
                    tooltip="All of it on one picture, as the node shows it.",
                ),
                io.Image.Output(
                    display_name="means",
                    tooltip="The components' means as pictures, one for each component.",
                ),
                io.String.Output(display_name="text", tooltip="The figures, to read or to save."),
            ],
            is_output_node=True,
        )

    @classmethod
    def _place_inputs(cls) -> list[io.Input]:
        at = {"default": 0.0, "min": -100_000.0, "max": 100_000.0, "step": 0.01}
        return [
            io.Int.Input(
                "item",
                default=0,
                min=0,
                max=4095,
                tooltip="The picture of the batch to look at, from 0.",
            ),
            io.Combo.Input(
                "place",
                options=[UNCERTAIN, AT],
                default=UNCERTAIN,
                tooltip="The pixel whose own mixture is drawn: the one whose weights have the "
                "highest entropy, or the one at x and y. A click on a map sets all three.",
            ),
            io.Float.Input(
                "x",
                tooltip="Column of that pixel, 0 at the left, in pixels of the mixture (a pixel of "
                "a latent stands for 8 image pixels). For models of points it is a coordinate: the "
                "nearest point is taken.",
                **at,
            ),
            io.Float.Input(
                "y",
                tooltip="Row of that pixel, 0 at the top. For models of points it is a coordinate, "
                "upwards.",
                **at,
            ),
        ]

    @classmethod
    def execute(
        cls,
        model,
        latent_image,
        seed: int,
        steps: int,
        step: int,
        item: int,
        place: str,
        x: float,
        y: float,
        positive=None,
        negative=None,
        guidance: float = 0.0,
        vae=None,
    ) -> io.NodeOutput:
        subject = Subject(model, latent_image, positive, negative, guidance)
        decode, how = decoder_of(model, vae)
        if place == UNCERTAIN and (x or y):
            no_effect("x and y", f"place is {UNCERTAIN}; choose {AT!r} for that pixel")
        inspection = Inspection(record_mixture(subject, seed, steps, step), item)
        chosen = inspection.place(place, x, y)
        tints = isinstance(model.get_model_object("latent_format"), PixelLatent)
        sheet, means = draw_inspection(inspection, chosen, decode, how, tints)
        text = describe(inspection, chosen)
        maps = {"gmflow_maps": [{"boxes": sheet.maps, "area": sheet.area}]}
        return io.NodeOutput(
            sheet.picture[None],
            enlarged(means),
            text,
            ui=shown_sheet(cls, sheet.picture, text, **maps),
        )
