"""Nodes that sample several times: samplers and steps side by side, and many seeds."""

from __future__ import annotations

from comfy_api.latest import io

from .comfyui.adapter_info import final_step_size_for
from .comfyui.cells import Subject
from .comfyui.comparison import compare, comparison_sheet, comparison_table, rows_of, step_counts
from .comfyui.gm_sampler import gm_sampler
from .comfyui.plain_model import sampling_of
from .comfyui.sample_pictures import decoder_of, draws_points, enlarged
from .comfyui.schema import (
    ADVANCED,
    conditioning_inputs,
    empty_latent_input,
    model_input,
    node_schema,
    seed_input,
    shift_input,
    solver_input,
    steps_input,
    vae_input,
)
from .comfyui.seed_spread import MOST_SEEDS, figure_of, reference_of, sample_seeds, spread_sheet
from .comfyui.shown import shown_sheet
from .comfyui.solver_choice import AUTO, no_effect, resolved
from .comfyui.time_shift import own_shift, own_sigmas

EACH_TIME = " A batch gives several pictures each time."


def size_input() -> io.Input:
    """Return the input for the size of a picture on a sheet."""
    return io.Int.Input(
        "size",
        default=256,
        min=32,
        max=2048,
        tooltip="Pixels from side to side of each picture on the sheet.",
    )


class GMFlowCompare(io.ComfyNode):
    """A node that lays samplers and numbers of steps side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowCompare",
            display_name="GM Compare Samplers",
            category="GMFlow/view",
            aliases="compare, comparison, xy plot, grid, sheet, sampler, few step, 4 steps, steps, "
            "benchmark, speed, view",
            description="Samples the same noise with several samplers (rows) and numbers of steps "
            "(columns), and draws one sheet with the time that each took.",
            inputs=[
                model_input(),
                empty_latent_input(EACH_TIME),
                seed_input("seed", "Seed of the noise, the same for all."),
                io.String.Input(
                    "samplers",
                    default="euler\ngm-ode\ngm-sde",
                    multiline=True,
                    tooltip="Names, one per line: the solvers of GM Sampler (gm-ode, gm-sde, "
                    "gm-policy, euler, dpmpp-2m, uni-pc) and ComfyUI's own samplers "
                    "(euler_ancestral, res_multistep, heun, ...). At most 16.",
                ),
                io.String.Input(
                    "steps",
                    default="1, 2, 4, 8",
                    tooltip="Numbers of steps, between commas. At most 12.",
                ),
                size_input(),
                shift_input(default=0.0, lowest=0.0, optional=True, **ADVANCED),
                *conditioning_inputs(),
                vae_input(),
                *cls._sampler_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="All results on one picture, with their times."
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="Steps, network calls and seconds of each, as a table in Markdown.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def _sampler_inputs(cls) -> list[io.Input]:
        return [
            io.Sampler.Input(
                f"sampler_{i}",
                optional=True,
                tooltip="A further row: any SAMPLER, such as one of GM ODE Sampler with settings "
                "of its own.",
            )
            for i in (1, 2, 3)
        ]

    @classmethod
    def execute(
        cls,
        model,
        latent_image,
        seed: int,
        samplers: str,
        steps: str,
        size: int,
        shift: float = 0.0,
        positive=None,
        negative=None,
        guidance: float = 0.0,
        vae=None,
        **further,
    ) -> io.NodeOutput:
        shift = shift or own_shift(sampling_of(model))
        named = [(name, each) for name, each in further.items() if each is not None]
        rows, counts = rows_of(samplers, named, model, shift), step_counts(steps)
        decode, how = decoder_of(model, vae)
        subject = Subject(model, latent_image, positive, negative, guidance)
        cells = compare(subject, rows, counts, shift, seed, decode)
        title = f"seed {seed}, shift {shift:.3g}, {how}"
        sheet, table = comparison_sheet(cells, title, size), comparison_table(cells)
        return io.NodeOutput(sheet[None], table, ui=shown_sheet(cls, sheet, table))


class GMFlowSeedSpread(io.ComfyNode):
    """A node that samples many seeds, and measures their variety."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="GMFlowSeedSpread",
            display_name="GM Seed Spread",
            category="GMFlow/view",
            aliases="seed, seeds, variety, diversity, variation, grid, sheet, few step, 4 steps, "
            "distilled, view",
            description="Samples several seeds on one sheet, with a figure for their variety: the "
            "mean distance of two of the pictures (root mean square difference of their pixels, 0 "
            "for equal pictures, 1 for black and white).",
            inputs=[
                model_input(),
                empty_latent_input(EACH_TIME),
                seed_input("seed", "The first seed; the others follow it."),
                io.Int.Input(
                    "seeds", default=8, min=2, max=MOST_SEEDS, tooltip="How many seeds are sampled."
                ),
                steps_input(default=0),
                solver_input(
                    "As in GM Sampler: auto is gm-policy behind a GM adapter, and gm-ode for "
                    "other models."
                ),
                size_input(),
                shift_input(default=0.0, lowest=0.0, optional=True, **ADVANCED),
                *conditioning_inputs(),
                vae_input(),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Any SAMPLER in the place of the solver, such as one of "
                    "KSamplerSelect.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="Pictures to compare the variety with: those of another GM Seed "
                    "Spread, for instance of the base model with many steps.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="All pictures, with the figure of their variety."
                ),
                io.Image.Output(
                    display_name="images", tooltip="The pictures themselves, seed after seed."
                ),
                io.Float.Output(
                    display_name="variety", tooltip="The mean pairwise distance, from 0 to 1."
                ),
                io.String.Output(display_name="text", tooltip="The figures in words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        latent_image,
        seed: int,
        seeds: int,
        steps: int,
        solver: str,
        size: int,
        shift: float = 0.0,
        positive=None,
        negative=None,
        guidance: float = 0.0,
        vae=None,
        sampler=None,
        reference=None,
    ) -> io.NodeOutput:
        if draws_points(model):
            raise ValueError(
                "only models of images have a spread of seeds: a latent of this one is many points "
                "at once, so that all seeds show the same density; use GM Density"
            )
        if sampler is not None and solver != AUTO:
            no_effect(f"solver {solver}", "a sampler is connected")
        decode, how = decoder_of(model, vae)
        shift = shift or own_shift(sampling_of(model))
        solver, steps = resolved(model, solver, steps)
        size_of_last = 1.0 if sampler is not None else final_step_size_for(model, solver)
        sigmas = own_sigmas(sampling_of(model), steps, shift, final_step_size=size_of_last)
        subject = Subject(model, latent_image, positive, negative, guidance)
        run = gm_sampler(solver, shift) if sampler is None else sampler
        spread = sample_seeds(subject, run, sigmas, seed, seeds, decode)
        name = solver if sampler is None else "sampler"
        what = f"{name}, {steps} step{'s' * (steps > 1)}, {how}"
        other = None if reference is None else reference_of(reference, spread.pictures.shape[1])
        sheet, text = spread_sheet(spread, other, what, size), figure_of(spread, other, what)
        images = enlarged(spread.together())
        return io.NodeOutput(
            sheet[None], images, spread.variety(), text, ui=shown_sheet(cls, sheet, text)
        )
