"""Golden figures, random mixtures, comparisons and exact 1-D references for several test files."""

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from gmflow_core import GaussianMixture

SPACES = [(), (3,), (2, 3), (2, 1, 3)]  # points, signals, images, video-shaped latents
F64 = torch.float64
GOLDEN = 2e-6  # error allowed against the reference's float32, relative to the largest value


@functools.cache
def golden(name):
    """Load recorded inputs and outputs of the reference (GMFlow / LakonLab, CPU, float32)."""
    return load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")


def golden_mixture(name, prefix):
    """Return the recorded mixture whose tensors are called `prefix`.means and so on."""
    figures = golden(name)
    return GaussianMixture(
        *(figures[f"{prefix}.{part}"] for part in ("means", "logweights", "logstds"))
    )


def random_mixture(
    seed=0, batch=2, components=4, channels=3, space=(2, 3), spread=1.5, dtype=torch.float32
):
    """Return a mixture around 0, with a standard deviation in [0.3, 0.8] for each sample."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(
        batch, components, channels, *space, generator=generator, dtype=F64
    )
    logits = torch.randn(batch, components, 1, *space, generator=generator, dtype=F64)
    std = 0.3 + 0.5 * torch.rand(batch, 1, 1, *[1] * len(space), generator=generator, dtype=F64)
    return GaussianMixture(means.to(dtype), logits.log_softmax(1).to(dtype), std.log().to(dtype))


def normal(*shape, seed=1, dtype=torch.float32):
    """Draw standard normal numbers of that shape, the same for each call with one seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def cast(mixture, dtype):
    """Return the mixture in another dtype."""
    return GaussianMixture(
        mixture.means.to(dtype), mixture.log_weights.to(dtype), mixture.log_std.to(dtype)
    )


def repeated(mixture, count):
    """Return a mixture of points (B, K, C) as one of `count` equal pixels."""
    means, log_weights, log_std = (
        t.unsqueeze(3) for t in (mixture.means, mixture.log_weights, mixture.log_std)
    )
    return GaussianMixture(
        means.expand(-1, -1, -1, count), log_weights.expand(-1, -1, -1, count), log_std
    )


def is_near(actual, expected, tolerance=GOLDEN):
    """Assert equal shapes and errors of at most `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual - expected).abs().max().item()
    bound = tolerance * expected.abs().max().item()
    assert error <= bound, f"largest error {error:.3g} exceeds {bound:.3g}"
    return True


def same_mixture(actual, expected, tolerance=GOLDEN):
    """Assert `is_near` for means, log-weights and log-std; the log-stds are broadcast first."""
    assert is_near(actual.means, expected.means, tolerance)
    assert is_near(actual.log_weights, expected.log_weights, tolerance)
    return is_near(*torch.broadcast_tensors(actual.log_std, expected.log_std), tolerance)


def bisect(increasing, low, high):
    """Return where `increasing(x)` changes from negative to positive, elementwise in float64."""
    for _ in range(120):
        middle = 0.5 * (low + high)
        above = increasing(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)


def normal_score(log_weights, offset):
    """Return the z with Phi(z) = sum_k w_k Phi(offset_k), with K in dimension 1.

    A slow float64 reference that is exact in both tails.
    """
    log_weights, offset = log_weights.double(), offset.double()
    below = (log_weights + torch.special.log_ndtr(offset)).logsumexp(1)
    above = (log_weights + torch.special.log_ndtr(-offset)).logsumexp(1)
    tail = torch.minimum(below, above)
    score = bisect(
        lambda z: torch.special.log_ndtr(z) - tail,
        torch.full_like(tail, -40.0),
        torch.full_like(tail, 1e-9),
    )
    return torch.where(below < above, score, -score)


WAITING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._linalg_eigh",
)
COPYING = ("aten.lift_fresh",)  # a Python number becomes a tensor: a copy that syncs on a GPU


class Waits(TorchDispatchMode):
    """A record of operations that force a GPU sync: values read, and shapes that depend on them."""

    def __init__(self, names=WAITING):
        super().__init__()
        self.names, self.found = names, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        by_mask = name == "aten.index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if by_mask or name in self.names:
            self.found.append(name)
        return function(*args, **(kwargs or {}))
