"""Fit a Gaussian-mixture source (MM-FM, CVPR 2026), from the repository's root:

    python -m training.fit_source --data data/digits_train --modes 64 --out outputs/digits_source      # the latents themselves
    python -m training.fit_source --data points.npy --modes 8 --out outputs/points                     # any (N, D) array
    python -m training.fit_source --data data/imagenet_rae --encoder dinov2 --modes 8192 --out outputs/source
    python -m training.fit_source --data data/imagenet_rae --tokens tokens.npy --modes 8192 --out outputs/source
    torchrun --nproc-per-node 8 -m training.fit_source --data ...                                      # the same on eight GPUs
    python -m training.fit_source convert FILE.pkl --out source.safetensors --assigner CLS.pkl         # published mixtures

Without tokens, EM with a k-means++ start fits the mixture to the samples. With one token for each sample, from a frozen encoder
or from a file, EM fits a mixture to the tokens, each sample belongs to the mode of its token, and one pass over the samples
gives the modes' means and variances; the tokens stay in DATA/tokens.safetensors for training. OUT/source.safetensors is the
source, with the mixture of the tokens in it; OUT/report.png shows its modes.

Stopped in any way and started again with the same command, it keeps the tokens that are made, goes on at the last iteration of
EM, and loses ten minutes of the pass over the samples at most. Several machines need a shared OUT and DATA.
"""

from __future__ import annotations

import sys

import tyro

from gmflow_core.source.files import load_source, save_source
from gmflow_core.source.pickles import convert_pickle
from gmflow_core.source.source import GaussianMixtureSource
from training.common.processes import command
from training.source.config import Config, ConvertConfig
from training.source.fitting import fit


def convert(config: ConvertConfig) -> GaussianMixtureSource:
    """Write a published mixture as a source.

    Raises:
        FileNotFoundError, ValueError: a file is missing, is refused, or holds no mixture.
    """
    assigner = config.assigner
    if assigner is not None:
        assigner = (
            convert_pickle(assigner)
            if assigner.suffix in (".pkl", ".pickle", ".joblib")
            else load_source(assigner)
        )
    source = convert_pickle(config.source, assigner)
    save_source(source, config.out, facts={"converted": config.source.name})
    print(
        f"{config.out}: {source.num_modes} {'spherical' if source.is_spherical else 'diagonal'} modes of {source.shape}"
    )
    return source


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m training.fit_source"
    with command():
        if arguments[:1] == ["convert"]:
            convert(tyro.cli(ConvertConfig, args=arguments[1:], prog=f"{prog} convert"))
            return
        fit(tyro.cli(Config, args=arguments, prog=prog, description=__doc__))


if __name__ == "__main__":
    main()
