"""torch-fidelity's Inception as feature extractor."""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.evaluation.extractors import _checked, _short


def fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity.

    Raises:
        ModuleNotFoundError: it is not installed, or does not import.
    """
    try:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            # It was built for another torch (for CUDA, say, beside a torch for CPUs), so that its compiled operators are not
            # there, and the import stops at the first one named. torch-fidelity uses none of them: their names are enough.
            operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                operators.define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _KEPT.append(operators)
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:
        raise ModuleNotFoundError(
            f"Inception needs torch-fidelity, which does not import ({error}): pip install -e '.[inception]'; if torchvision "
            "is named, install it from where torch came from. Or give --features FILE.safetensors: a small classifier, trained "
            "on --data if the file does not exist yet"
        ) from error


_KEPT: list[torch.library.Library] = []  # operators vanish with the object that defined them


class InceptionFeatures:
    """torch-fidelity's port of the TensorFlow Inception of FID: 2048 features, and 1008 probabilities without the last bias.

    Args:
        weights: torch-fidelity's weight file (.pth, or the same tensors as .safetensors); its download if None.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: torch-fidelity is not installed.
        ValueError: the file does not hold these weights, or the download failed; the message names the ways out.
    """

    name = "inception-v3-compat"
    classes = None  # ImageNet's, in an order of its own

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        path = Path(weights) if weights is not None else download_inception()
        state = _read_inception(path)
        # torch-fidelity unpickles whatever file it is given, so it gets one that was written here, of tensors alone.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / "weights.pth")
            try:
                self.network = (
                    fidelity("feature_extractor_inceptionv3")
                    .FeatureExtractorInceptionV3(
                        self.name,
                        ["2048", "logits_unbiased"],
                        feature_extractor_weights_path=Path(folder) / "weights.pth",
                    )
                    .to(device)
                )
            except RuntimeError as error:
                raise ValueError(
                    f"{path} does not hold torch-fidelity's Inception weights ({_short(error)}); {_inception_help()}"
                ) from error
        self.device = torch.device(device)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "dimensions": 2048, "fingerprint": self.fingerprint[:16]}

    @torch.inference_mode()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) of any size, which it scales to 299 -> features (B, 2048), probabilities (B, 1008)."""
        features, logits = self.network(_checked(images).to(self.device))
        return {"features": features.cpu(), "probabilities": logits.softmax(1).cpu()}


def download_inception() -> Path:
    """The weight file in torch's hub cache, where torch-fidelity keeps it; downloaded first if it is not there.

    Raises:
        ValueError: the download failed, or brought something else.
    """
    url = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the Inception weights could not be downloaded ({error}); {_inception_help()}"
            ) from error
    return path


def _inception_help() -> str:
    url = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    return (
        f"fetch {url} by hand and give it as --inception-weights, or give --features FILE.safetensors: a small "
        "classifier, trained on --data if the file does not exist yet"
    )


def _read_inception(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file; a pickle may hold nothing else."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no weight file {path} (--inception-weights); {_inception_help()}"
        )
    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged archive raises nearly anything
        raise ValueError(
            f"{path} (--inception-weights) is not a whole file of tensors ({_short(error)}); {_inception_help()}"
        ) from error
