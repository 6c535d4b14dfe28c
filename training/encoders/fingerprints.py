"""Tell autoencoders apart by what they compute, whatever their names and files are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from torch import Tensor

from gmflow_core.models.vae import VAE
from training.encoders.rae import POSITIONS, RAE

MARK = "vae_fingerprint"  # entry of records; what older versions wrote lacks it
CHANGED = (
    "its autoencoder has other weights, settings or statistics than the one of this name has now; "
    "so it may be after an update of diffusers or transformers"
)
VAE_SETTINGS = ("act_fn", "norm_num_groups")  # that neither weights nor factors show
ENCODER_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


def fingerprint(vae: VAE | RAE, *, decoding: bool = False) -> str:
    """Return the SHA-256 of an autoencoder's config, weights and statistics.

    Names of tensors do not count, as versions of diffusers and transformers rename them.

    Args:
        decoding: of an RAE, count its decoder too, on which latents do not depend.
    """
    if isinstance(vae, VAE):
        config = vae.network.config
        settings = {name: config.get(name) for name in VAE_SETTINGS}
        settings |= {"scaling_factor": vae.scaling_factor, "shift_factor": vae.shift_factor}
        return _digest(settings, vae.network.state_dict().values())
    config = vae.encoder.network.config
    settings = {name: getattr(config, name, None) for name in ENCODER_SETTINGS}
    settings |= {"kind": vae.encoder.kind, "input_size": vae.encoder.input_size}
    tensors = [*vae.encoder.state_dict().values(), vae.mean, vae.std]
    if decoding and vae.decoder is not None:
        settings["decoder_heads"] = getattr(vae.decoder, "heads", None)  # of `load_decoder`
        tensors += [*vae.decoder.state_dict().values(), getattr(vae.decoder, POSITIONS)]
    return _digest(settings, tensors)


def _digest(settings: dict[str, object], tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of settings, and of tensors in any order."""
    found = []
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().numpy()
        about = f"{values.dtype} {values.shape} ".encode()
        found.append(hashlib.sha256(about + hashlib.sha256(values).digest()).digest())
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    whole.update(b"".join(sorted(found)))
    return whole.hexdigest()
