"""Convert published mixtures to sources."""

from __future__ import annotations

from gmflow_core.source.files import load_source, save_source
from gmflow_core.source.pickles import convert_pickle
from gmflow_core.source.source import GaussianMixtureSource
from training.source.config import ConvertConfig

PICKLES = (".pkl", ".pickle", ".joblib")


def convert(config: ConvertConfig) -> GaussianMixtureSource:
    """Write a published mixture as a source.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a pickle asks for more than arrays, or holds no mixture.
    """
    assigner = config.assigner
    if assigner is not None:
        load = convert_pickle if assigner.suffix.lower() in PICKLES else load_source
        assigner = load(assigner)
    source = convert_pickle(config.source, assigner)
    save_source(source, config.out, facts={"converted": config.source.name})
    kind = "spherical" if source.is_spherical else "diagonal"
    print(f"{config.out}: {source.num_modes} {kind} modes of {source.shape}")
    return source
