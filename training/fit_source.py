"""Fit a Gaussian-mixture source (MM-FM, CVPR 2026):

    python -m training.fit_source --data data/digits_train --modes 64 --out outputs/digits_source
    python -m training.fit_source --data points.npy --modes 8 --out outputs/points
    python -m training.fit_source --data data/imagenet_rae --encoder dinov2 --modes 8192 \\
        --out outputs/source
    python -m training.fit_source --data data/imagenet_rae --tokens tokens.npy --modes 8192 \\
        --out outputs/source
    python -m training.fit_source --data imagenet/train --encoder dinov2 --vae rae-dinov2-b \\
        --modes 8192 --out outputs/source                      # without a cache of latents
    torchrun --nproc-per-node 8 -m training.fit_source --data ...
    python -m training.fit_source convert FILE.pkl --out source.safetensors --assigner CLS.pkl

The data are prepared samples, any (N, D) array, or images. Without tokens, EM with a k-means++
start fits the mixture to the samples. With one token per sample, from a frozen encoder or from a
file, EM fits a mixture to the tokens; each sample belongs to the mode of its token, and one pass
over the samples measures the means and variances of the modes. The tokens stay in
DATA/tokens.safetensors for training. OUT/source.safetensors is the source, with the mixture of the
tokens in it; OUT/report.png and OUT/weights.png show its modes, and OUT/labels.npy has the number
of each sample's likeliest one (int64, in the order of DATA). `convert` writes a published mixture,
in a pickle or as arrays in .npz or .safetensors, as a source. Files in OUT that no fit wrote stay.

After a stop, the same command goes on: it keeps the tokens that are encoded, continues EM at its
last iteration, and loses ten minutes of the pass over the samples at most. Several machines need a
shared OUT and DATA. With --vae, DATA is a folder of images that are encoded in that pass, and their
tokens stay in OUT.
"""

from __future__ import annotations

import sys

import tyro

from gmflow_core.files.atomic import check_target
from gmflow_core.files.locks import locked_file
from training.common.processes import PATIENCE, command, owned
from training.data.given_files import check_kept
from training.source.config import Config, ConvertConfig
from training.source.conversion import convert
from training.source.fitting import fit


def main(arguments: list[str] | None = None) -> None:
    """Fit or convert a source; errors that the user can act on end in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m training.fit_source"
    with command():
        if arguments[:1] == ["convert"]:
            chosen = tyro.cli(ConvertConfig, args=arguments[1:], prog=f"{prog} convert")
            check_target(chosen.out)
            given = {"source": chosen.source, "assigner": chosen.assigner}
            check_kept([chosen.out], "replaced", **given)
            with locked_file(chosen.out):
                convert(chosen)
            return
        config = tyro.cli(Config, args=arguments, prog=prog, description=__doc__)
        with owned(config.out, config.device, PATIENCE):
            fit(config)


if __name__ == "__main__":
    main()
