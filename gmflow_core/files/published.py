"""What the papers' authors have published on the Hugging Face hub, and what of it is needed.

Files are as the published code and configs name them; their sizes and checksums are the hub's own,
which `fetching.py` asks for. Where a size is given here, it says where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import quoted

IMAGENET = "Lakonik/gmflow_imagenet_k8_ema"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MM_FM = "luo00042/mm-fm"
ADAPTERS = {  # names of few-step adapters that this version can use, and their repositories
    "gmflux_k8_piid_4step": "Lakonik/pi-FLUX.1",
    "gmflux_k8_piid_8step": "Lakonik/pi-FLUX.1",
    "gmqwen_k8_piid_4step": "Lakonik/pi-Qwen-Image",
    "gmflux2_k8_piid_4step": "Lakonik/pi-FLUX.2",
    "dxflux_n10_piid_4step": "Lakonik/pi-FLUX.1",
    "dxqwen_n10_piid_4step": "Lakonik/pi-Qwen-Image",
    "arcflow-flux-2steps": "ymyy307/ArcFlow",
    "arcflow-qwen-2steps": "ymyy307/ArcFlow",
}
ENCODERS = {  # MM-FM's folders, and the encoders they were made with
    "dinov2-b": "facebook/dinov2-with-registers-base",
    "siglip2-b": "google/siglip2-base-patch16-256",
    "mae-b": "facebook/vit-mae-base",
}
COLLECTIONS = ("gmflow", "mm-fm", "pi-flow")
COMPUTED = "computed from the number of parameters"


@dataclass(frozen=True)
class Part:
    """Files of one repository that belong together.

    Args:
        name: of the part.
        repository: "owner/name" on the hub.
        files: paths in it, or patterns of paths.
        what: what it is for.
        size: what is known of its size without the hub, and from where; "" for nothing.
        comfyui: folder below ComfyUI's models/ that it belongs into; None if ComfyUI cannot use it.
        usual: it is fetched if no part is named.
    """

    name: str
    repository: str
    files: tuple[str, ...]
    what: str
    size: str = ""
    comfyui: str | None = None
    usual: bool = True


def gmflow_parts() -> list[Part]:
    """Return GMFlow's class-conditional ImageNet model and the VAEs that go with it."""
    weights = tuple(f"{part}/*.safetensors" for part in ("spectrum_net", "vae"))
    model = ("transformer/diffusion_pytorch_model.bf16.safetensors", *weights)
    return [
        Part(
            "model",
            IMAGENET,
            ("model_index.json", "*/*.json", *model),
            "GM-DiT of ImageNet 256 with its VAE, for `gmflow sample` and ComfyUI",
            f"1.35 GB for the transformer ({COMPUTED})",
            f"gmflow/{IMAGENET.split('/')[1]}",
        ),
        Part(
            "comfyui-vae",
            "stabilityai/sd-vae-ft-ema-original",
            ("vae-ft-ema-560000-ema-pruned.safetensors",),
            "the same VAE as one file, for ComfyUI's Load VAE",
            comfyui="vae",
            usual=False,
        ),
        Part(
            "training-vae",
            "stabilityai/sd-vae-ft-ema",
            ("config.json", WEIGHTS),
            "the VAE that training.prepare and training.evaluate use",
            usual=False,
        ),
    ]


def adapter_parts() -> list[Part]:
    """Return the few-step adapters of pi-Flow, and ArcFlow's."""
    sizes = {"gmflux_k8": "1.3 GB", "gmqwen_k8": "1.9 GB"}
    parts = []
    for name, repository in ADAPTERS.items():
        size = next((size for start, size in sizes.items() if name.startswith(start)), "")
        parts.append(
            Part(
                name,
                repository,
                (f"{name}/*.safetensors",),
                "few-step adapter, for GM Adapter and gmflow_core.diffusers",
                f"{size} ({COMPUTED})" if size else "",
                "loras",
                name in ("gmflux_k8_piid_4step", "gmqwen_k8_piid_4step"),
            )
        )
    return parts


def mm_fm_parts(encoder: str) -> list[Part]:
    """Return what MM-FM has published for one of `ENCODERS`."""
    ends = ("25k", "100k") if encoder == "dinov2-b" else ("25k",)
    nets = tuple(
        f"checkpoints/{encoder}/{m}-gmm-{end}.pt" for m in ("mode", "uncond") for end in ends
    )
    mixtures = (
        "gmm_n8192_diag_k-means++.pkl",
        "spatial_gmm_from_cls_n8192_diag_k-means++_flip.pkl",
    )
    guides = tuple(f"checkpoints/autoguidance/dit-s-{m}-gmm-25k.pt" for m in ("mode", "uncond"))
    parts = [
        Part("checkpoints", MM_FM, nets, "DiT^DH-XL; 25k: 20 epochs, 100k: 80"),
        Part("guides", MM_FM, guides, "DiT^DH-S, the weaker models of autoguidance"),
        Part(
            "mixtures",
            MM_FM,
            tuple(f"gmm/{encoder}/{name}" for name in mixtures),
            "mixtures of tokens and of latents, for training.fit_source convert",
        ),
        Part(
            "decoder",
            MM_FM,
            (f"decoders/{encoder}/ViTXL_n08/model.pt",),
            "the RAE's decoder, for rae.json",
        ),
        Part(
            "statistics",
            MM_FM,
            (f"normalization_stats/{encoder}/stat.pt",),
            "mean and variance of the latents, for rae.json",
        ),
        Part(
            "reference",
            MM_FM,
            ("fid_reference/VIRTUAL_imagenet256_labeled.npz",),
            "ADM's statistics of ImageNet 256, for training.evaluate --reference",
        ),
        Part(
            "encoder",
            ENCODERS[encoder],
            ("config.json", "preprocessor_config.json", "model.safetensors"),
            "the RAE's encoder, for rae.json",
        ),
    ]
    return [part for part in parts if part.name != "guides" or encoder == "dinov2-b"]


NOTES = {
    "gmflow": "",
    "pi-flow": (
        "Their base models are not fetched; FLUX.1 dev asks you to accept its licence on its page."
    ),
    "mm-fm": (
        "MM-FM's README gives about 72 GB for everything of DINOv2-B, and about 160 GB for all "
        "three encoders."
    ),
}


def all_parts(collection: str, encoder: str = "dinov2-b") -> list[Part]:
    """Return all parts of a collection, those too that are fetched only if they are named.

    Args:
        collection: one of `COLLECTIONS`.
        encoder: one of `ENCODERS`, for MM-FM.
    """
    if collection == "mm-fm":
        return mm_fm_parts(encoder)
    return gmflow_parts() if collection == "gmflow" else adapter_parts()


def parts_of(collection: str, encoder: str = "dinov2-b", names: Sequence[str] = ()) -> list[Part]:
    """Return the parts of a collection that are named, or else the usual ones; see `all_parts`.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    every = all_parts(collection, encoder)
    if not names:
        return [part for part in every if part.usual]
    known = {part.name: part for part in every}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{collection} has no part {quoted(unknown[0], 60)}; its parts: {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(names)]
