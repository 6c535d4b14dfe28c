"""Look up the classes of a model, and make an empty latent for them."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ...gmflow_core.files.labels import find_label
from .gm_network import ImageNetwork
from .model_folders import classes_by_model
from .sizes import check_size

MOST_IMAGES = 65_536  # in one batch
ONLY_MORE = "(only more_labels)"  # choice of no first label


def classes_for_page() -> dict[str, Any]:
    """Return the option of an input that tells the page which model has which classes.

    Versions of ComfyUI that pass nothing of the kind on get none, and show the whole list.
    """
    known = inspect.signature(io.Combo.Input).parameters
    return {"extra_dict": {"classes": classes_by_model()}} if "extra_dict" in known else {}


def network_of(model) -> ImageNetwork:
    """Return the class-conditional network of a MODEL.

    Raises:
        ValueError: it has none.
    """
    network = model.get_model_object("diffusion_model")
    if not isinstance(network, ImageNetwork):
        raise ValueError(
            "this model takes no class labels, and GM Class Labels needs one that does; load "
            "emoji, digits or an ImageNet model with 'GM Load Model', or use 'GM Unconditional'"
        )
    return network


def choose_labels(
    network: ImageNetwork, label: str, more_labels: str
) -> tuple[list[int], list[str]]:
    """Return the labels that texts name, and the full names of their classes.

    Args:
        label: the first text, or ONLY_MORE.
        more_labels: further texts, one per line.

    Raises:
        ValueError: there is no text, or one that fits no class or several.
    """
    texts = [] if label == ONLY_MORE else [label]
    texts += [line for line in more_labels.splitlines() if line.strip()]
    if not texts:
        raise ValueError(
            "there are no labels; choose one, or write some into more_labels, one per line"
        )
    if len(texts) > MOST_IMAGES:
        raise ValueError(
            f"too many labels, {len(texts):,}, one for each line; the most is {MOST_IMAGES:,}"
        )
    names, num_classes = network.label_names, network.network.config.num_classes
    try:
        found = {text: find_label(text, names, num_classes) for text in dict.fromkeys(texts)}
        labels = [found[text] for text in texts]
    except ValueError as error:
        raise ValueError(f"{error} (in more_labels, one per line)") from error
    return labels, [names[label] if names else str(label) for label in labels]


def empty_images(network: ImageNetwork, count: int) -> dict:
    """Return an empty LATENT of a network's own size.

    Raises:
        ValueError: it would be too large.
    """
    config = network.network.config
    shape = (count, config.channels, config.latent_size, config.latent_size)
    advice = "choose fewer labels, or a smaller repeat, and run it more than once"
    if count > MOST_IMAGES:
        raise ValueError(
            f"a batch of {count:,} images is too large; the most is {MOST_IMAGES:,}: {advice}"
        )
    check_size("images", count, shape[1:], advice)
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(shape, device=device)}
