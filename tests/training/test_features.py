"""Feature extractors: the small classifier, and torch-fidelity's Inception."""

import pytest
import torch
from safetensors.torch import save_file

from tests.training.evaluation_runs import CLASSES, torch_fidelity, two_classes
from training.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    ClassifierFeatures,
    train_classifier,
)
from training.evaluation.inception import InceptionFeatures


def test_classifier_learns_and_is_kept(tmp_path):
    images, labels = two_classes(200)
    settings = {
        "iterations": 40,
        "batch_size": 32,
        "progress": False,
        "test": two_classes(60, seed=1),
    }
    features = train_classifier(images, labels, CLASSES, **settings)
    assert features.training["accuracy"] >= 0.95
    assert features.fingerprint == train_classifier(images, labels, CLASSES, **settings).fingerprint
    features.save(tmp_path / "f.safetensors")
    again = ClassifierFeatures.load(tmp_path / "f.safetensors")
    assert (again.fingerprint, again.training, again.classes) == (
        features.fingerprint,
        features.training,
        features.classes,
    )
    found = again.extract(images[:5])
    assert found["features"].shape == (5, 64)
    assert found["probabilities"].sum(1).allclose(torch.ones(5))
    with pytest.raises(ValueError, match="8 x 8 pixels, not 16 x 16"):
        again.extract(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot train"):
        train_classifier(images[:10], labels[:10], CLASSES)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (64, 64)])
def test_classifier_of_any_small_size(size):
    features, logits = Classifier(ClassifierConfig(*size, 3, channels=8))(
        torch.zeros(2, 3, *size, dtype=torch.uint8)
    )
    assert (features.shape, logits.shape) == ((2, 64), (2, 3))
    with pytest.raises(ValueError, match="use --features inception"):
        ClassifierConfig(65, 65, 3)


def test_inception_weights(tmp_path, monkeypatch):
    """Weights are read in torch-fidelity's format; a pickle with code is refused unopened."""
    module = torch_fidelity("feature_extractor_inceptionv3")
    cls, name = module.FeatureExtractorInceptionV3, "inception-v3-compat"
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(cls, "load_state_dict", lambda *_: None)
        patch.setattr(torch.nn.init, "trunc_normal_", lambda t, **_: t)
        state = cls(name, ["2048"], None, verbose=False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    features = InceptionFeatures(tmp_path / "w.pth")
    found = features.extract(
        torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1)
    )
    assert (found["features"].shape, found["probabilities"].shape) == ((2, 2048), (2, 1008))
    assert found["spatial"].shape == (2, features.facts["spatial_dimensions"]) == (2, 2023)
    assert found["spatial"].min() >= 0  # after the ReLU
    assert found["spatial"].max() > 0
    assert found["probabilities"].sum(1).allclose(torch.ones(2))
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"\x80\x02cos\nsystem\n(S'exit 1'\ntR.")
    for weights in ("w.safetensors", "bad.pth", "none.pth"):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=rf"{weights}.*--inception-weights.*--features"
        ):
            InceptionFeatures(tmp_path / weights)

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(
        ValueError, match=r"no network.*fetch https://\S+\.pth.*--inception-weights.*--features"
    ):
        InceptionFeatures()
