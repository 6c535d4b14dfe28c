"""Inception network of torch-fidelity as feature extractor."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmflow_core.files.errors import FileError, check_regular_file, printable
from gmflow_core.files.safetensors_files import check_finite, read_safetensors
from training.common.files import load_pytorch, temporary_folder
from training.evaluation.extractors import SPATIAL_CHANNELS, check_images, flat_maps, one_line

SPATIAL = SPATIAL_CHANNELS * 17 * 17


def fidelity(module: str) -> ModuleType:
    """Import a module of torch-fidelity.

    Raises:
        ModuleNotFoundError: torch-fidelity, or the torchvision that it needs, does not import.
    """
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise ModuleNotFoundError(
            f"Inception needs torch-fidelity, which does not import ({error}): "
            "pip install -e '.[inception]'; if the message names torchvision, install the "
            "torchvision that was built for your torch, from where torch came from. Or give "
            "--features FILE.safetensors: a small classifier, which training.evaluate trains on "
            "its --data if the file does not exist yet"
        ) from error


class InceptionFeatures:
    """torch-fidelity's port of the TensorFlow Inception of the FID (Heusel et al. 2017).

    It extracts 2048 features, and 1008 probabilities from the logits without their bias. Spatial
    features are ADM's, of the sFID: the TensorFlow graph's `mixed_6/conv:0`, which is the output
    of the 1 x 1 branch of torch-fidelity's block `Mixed_6d` (convolution, batch norm, ReLU; 17 x
    17), its first 7 channels, 2023 numbers.

    Args:
        weights: torch-fidelity's weight file (.pth, or the same tensors as .safetensors);
            downloaded if None.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: torch-fidelity is not installed.
        ValueError: the file does not hold these weights, or the download failed; the message says
            what to do.
    """

    name = "inception-v3-compat"
    classes = None  # ImageNet's, in torch-fidelity's order

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        path = Path(weights) if weights is not None else download_inception()
        state = read_inception(path)
        extractor = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        # torch-fidelity unpickles the file that it is given: give it one written here.
        with temporary_folder() as folder:
            file = folder / "weights.pth"
            torch.save(state, file)
            try:
                network = extractor(
                    self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=file
                )
            except RuntimeError as error:
                raise ValueError(
                    f"{path} does not hold torch-fidelity's Inception weights "
                    f"({one_line(error)}); {inception_help()}"
                ) from error
        self.network = network.to(device)
        self.device = torch.device(device)
        self.maps: Tensor | None = None  # of the last images
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """Name, dimensions, spatial dimensions and fingerprint, for a report."""
        dimensions = {"dimensions": 2048, "spatial_dimensions": SPATIAL}
        return {"name": self.name, **dimensions, "fingerprint": self.fingerprint[:16]}

    def _keep(self, branch: Any, given: Any, maps: Tensor) -> None:
        self.maps = maps

    @torch.inference_mode()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Extract features, spatial features and class probabilities.

        Args:
            images: uint8 (B, 3, H, W) of any size; torch-fidelity scales them to 299 x 299.

        Returns:
            "features" (B, 2048), "spatial" (B, 2023) and "probabilities" (B, 1008), on the CPU.
        """
        features, logits = self.network(check_images(images).to(self.device))
        spatial, self.maps = flat_maps(self.maps), None
        probabilities = logits.softmax(1).cpu()
        return {"features": features.cpu(), "spatial": spatial, "probabilities": probabilities}


def download_inception() -> Path:
    """Download the weights to torch's hub cache, where torch-fidelity keeps them too.

    Returns:
        Their file; nothing is downloaded if it is already there.

    Raises:
        ValueError: the download failed, or its checksum is wrong.
    """
    url = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the Inception weights could not be downloaded ({error}); {inception_help()}"
            ) from error
    return path


def inception_help() -> str:
    """Return the end of error messages: how to do without the download."""
    url = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    return (
        f"fetch {url} by hand and give it as --inception-weights, or give --features "
        "FILE.safetensors: a small classifier, which training.evaluate trains on its --data if the "
        "file does not exist yet"
    )


def read_inception(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file; nothing but tensors is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no weight file {printable(str(path))} (--inception-weights); "
            f"{inception_help()}"
        )
    check_regular_file(path)
    try:
        whole = path.suffix == ".safetensors"
        tensors = read_safetensors(path)[0] if whole else load_pytorch(path)
    except FileError as error:
        raise ValueError(f"{error}; {inception_help()}") from error
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return tensors
