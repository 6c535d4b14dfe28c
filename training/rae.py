"""Representation autoencoders (RAE, arXiv 2510.11690): measure their latents, convert networks.

A frozen vision transformer encodes images to latents, and a trained one decodes them.

Every option that takes a VAE (--vae) takes an RAE too:

    rae-dinov2-b, rae-siglip2-b, rae-mae-b    the published ones; their parts come from the hub
    OWNER/NAME or FOLDER                      with config.json and safetensors of diffusers'
                                              AutoencoderRAE, such as
                                              nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08
    FOLDER                                    with rae.json, which names the parts:
                                              {"encoder": "facebook/vit-mae-base",
                                               "decoder": "decoder.safetensors",
                                               "statistics": "statistics.safetensors"}

The encoder is a folder or hub id for transformers. The other parts are files, in FOLDER or as
OWNER/NAME/PATH on the hub. They may be missing; without a decoder there are latents but no images.

`statistics` measures the latents of your own images; name its file in such a rae.json, before or
after. After a stop, the same command goes on, and loses ten minutes of its work at most. `convert`
writes a published DiT^DH network (.pt) as a GMFlow checkpoint; `--mixture` is the source that
MM-FM's were trained with, as training.fit_source converts it.

    python -m training.rae statistics --data IMAGES --vae FOLDER --out FOLDER/stat.safetensors
    torchrun --nproc-per-node 8 -m training.rae statistics --data IMAGES --vae FOLDER --out ...
    python -m training.rae convert --source stage2_model.pt --out ditdh_xl.safetensors
    python -m training.rae convert --source mode-gmm-100k.pt --mixture source.safetensors --out ...
    python -m training.rae convert --source uncond-gmm-100k.pt --mixture source.safetensors \\
        --unconditional --out ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import tyro

from gmflow_core.files.atomic import check_target
from gmflow_core.files.locks import locked_file
from training.common.processes import PATIENCE, command, owned
from training.data.given_files import check_kept
from training.data.rae_statistics import statistics
from training.encoders.rae_files import convert


def locking(run: Callable[..., None]) -> Callable[..., None]:
    """Return a function of the command that holds the lock of its --out."""

    @functools.wraps(run)
    def locked_run(*args, **settings) -> None:
        given = inspect.signature(run).bind(*args, **settings)
        given.apply_defaults()
        out, device = given.arguments["out"], given.arguments.get("device")
        check_target(out)
        names = {"data", "vae", "source", "mixture"} & set(given.arguments)
        check_kept([Path(out)], "replaced", **{name: given.arguments[name] for name in names})
        # `convert` runs in one process, and knows no device
        with locked_file(out) if device is None else owned(out, device, PATIENCE, file=True):
            run(*args, **settings)

    return locked_run


def main(arguments: list[str] | None = None) -> None:
    """Run `statistics` or `convert`; errors that the user can act on end in one line."""
    with command():
        tyro.extras.subcommand_cli_from_dict(
            {"statistics": locking(statistics), "convert": locking(convert)},
            prog="python -m training.rae",
            description=__doc__,
            args=arguments,
        )


if __name__ == "__main__":
    main()
