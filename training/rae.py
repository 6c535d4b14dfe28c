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

`statistics` measures the latents of your own images; name its file in such a rae.json. `convert`
writes a published DiT^DH network (.pt) as a GMFlow checkpoint.

    python -m training.rae statistics --data IMAGES --vae FOLDER --out FOLDER/stat.safetensors
    torchrun --nproc-per-node 8 -m training.rae statistics --data IMAGES --vae FOLDER --out ...
    python -m training.rae convert --source stage2_model.pt --out ditdh_xl.safetensors
"""

from __future__ import annotations

import tyro

from training.common.processes import leave
from training.data.rae_statistics import statistics
from training.encoders.rae_files import convert


def main(arguments: list[str] | None = None) -> None:
    """Run `statistics` or `convert`; errors that the user can act on end in one line."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"statistics": statistics, "convert": convert},
            prog="python -m training.rae",
            description=__doc__,
            args=arguments,
        )
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        leave()


if __name__ == "__main__":
    main()
