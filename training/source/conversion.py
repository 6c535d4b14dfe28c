"""Convert published mixtures to sources."""

from __future__ import annotations

from pathlib import Path

from gmflow_core.files.checkpoint import SOURCE_CLASS
from gmflow_core.files.errors import FileError, check_regular_file, quoted
from gmflow_core.files.safetensors_files import read_safetensors
from gmflow_core.files.targets import check_is_own
from gmflow_core.source.files import load_source, read_source_metadata, save_source
from gmflow_core.source.pickle_arrays import FIELDS
from gmflow_core.source.pickles import convert_pickle, mixture_of
from gmflow_core.source.source import GaussianMixtureSource
from training.common.arrays import read_npz
from training.source.config import ConvertConfig

ARRAYS = (".npz", ".safetensors")
PICKLES = (".pkl", ".pickle", ".joblib")


def convert(config: ConvertConfig) -> GaussianMixtureSource:
    """Write a published mixture as a source.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: --out is a file that this command did not write.
        ValueError: a pickle asks for more than arrays, or a file holds no mixture, or a source.
    """
    check_is_own(config.out, is_converted, "training.fit_source convert")
    assigner = config.assigner
    if assigner is not None:
        load = convert_pickle if assigner.suffix.lower() in PICKLES else load_source
        assigner = load(assigner)
    source = converted(config.source, assigner)
    save_source(source, config.out, facts={"converted": config.source.name})
    kind = "spherical" if source.is_spherical else "diagonal"
    print(f"{config.out}: {source.num_modes} {kind} modes of {source.shape}")
    return source


def is_converted(path: Path) -> bool:
    """Return whether a file is a source that `convert` wrote.

    Raises:
        FileError: it is no source.
    """
    return "converted" in read_source_metadata(path)["training"]


def converted(path: Path, assigner: GaussianMixtureSource | None) -> GaussianMixtureSource:
    """Return the source of a published mixture: of a pickle, or of arrays with the same names.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: it holds no mixture, or a source, which needs no conversion.
    """
    if path.suffix.lower() not in ARRAYS:
        return convert_pickle(path, assigner)
    check_regular_file(path)
    if path.suffix.lower() == ".npz":
        arrays, _ = read_npz(path)
    else:
        tensors, metadata = read_safetensors(path)
        if metadata.get("model_class") == SOURCE_CLASS:
            raise FileError(path, "is a source already", "give it as --source as it is")
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    fields = {
        field: arrays[name]
        for field, names in FIELDS.items()
        for name in reversed(names)
        if name in arrays
    }
    if "means" not in fields or not {"variances", "stds"} & set(fields):
        found = f"holds no mixture: it has {quoted(sorted(arrays))}"
        raise FileError(path, found, "means with variances (means_, covariances_) are needed")
    return mixture_of({**fields, "kind": "diag"}, path, assigner)
