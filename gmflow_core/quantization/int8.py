"""8-bit weights: row-wise int8 after a rotation, and the linear layer on them, in pure torch.

The weights of one output (a row) share one scale, so one large entry costs all others their
precision. Before rounding, every group of 256 inputs is therefore rotated by a Hadamard matrix,
which spreads such entries over the group. The layer's input is rotated alike, and x W^T =
(x H) (W H)^T stays the same (QuaRot, arXiv 2404.00456). The regular Hadamard matrix is that of
ConvRot and of ComfyUI's `int8_tensorwise` layout with `convrot`, so weights can be exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = (256, 64, 16)  # sizes of a rotation: powers of 4
LEVELS = 127  # largest magnitude of an int8 value that is used
CHUNK = {"cpu": 2**18}  # entries of a weight in float32 at a time: what a CPU's cache holds
GPU_CHUNK = 2**24  # the same on other devices
SMALLEST = 1e-30  # scale of a row of zeros
MIN_ROWS = 17  # cuBLAS requires more than 16 rows of int8


@dataclass(frozen=True)
class Int8Weight:
    """Weight of a linear layer with N outputs and K inputs: W H = values * scale.

    Args:
        values: (N, K) int8.
        scale: (N, 1) or (1, 1) float32.
        group: number of inputs that are rotated together; 0: not rotated, H = 1.
    """

    values: Tensor
    scale: Tensor
    group: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (N, K) that the int8 values stand for, rotated back."""
        out = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        scale = self.scale.expand(len(self.values), 1)
        for rows in row_slices(self.values, self.values.device):
            part = self.values[rows].float() * scale[rows]
            out[rows] = rotate(part, self.group)  # H is its own inverse
        return out


def row_slices(weight: Tensor, device: torch.device) -> list[slice]:
    """Return slices that cover the rows of `weight` (N, K), of a good size for that device."""
    rows = max(1, CHUNK.get(device.type, GPU_CHUNK) // max(1, weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def rotation_group(inputs: int) -> int:
    """Return the largest of GROUPS that divides the number of inputs; 0 (no rotation) if none."""
    return next((group for group in GROUPS if inputs % group == 0), 0)


@functools.lru_cache(maxsize=32)
def hadamard(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the regular Hadamard matrix (size, size) over sqrt(size).

    It is symmetric and orthogonal, and all its rows have the same sum.

    Raises:
        ValueError: `size` is not a power of 4.
    """
    with torch.inference_mode(False):  # it is cached, and training may use it later
        return _hadamard(size).to(device, dtype)


def _hadamard(size: int) -> Tensor:
    """Build the matrix of `hadamard` as a Kronecker power of the one of size 4."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four) / 2
    if len(matrix) != size:
        raise ValueError(
            f"a regular Hadamard matrix of size {size} is asked for; sizes are powers of 4"
        )
    return matrix


def rotate(x: Tensor, group: int) -> Tensor:
    """Multiply each group of `group` entries in x (..., K) by the Hadamard matrix.

    A group of 0 leaves x as it is. The matrix is a Kronecker product, so in float32 two small
    products replace a large one; coarser types would round the result between the two once more.
    """
    if not group:
        return x
    if x.dtype != torch.float32:
        return (x.unflatten(-1, (-1, group)) @ hadamard(group, x.dtype, x.device)).flatten(-2)
    right = min(16, group // 4)
    parts = x.reshape(-1, group // right, right) @ hadamard(right, x.dtype, x.device)
    return (hadamard(group // right, x.dtype, x.device) @ parts).reshape(x.shape)


def quantize_rows(
    weight: Tensor,
    group: int | None = None,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> Int8Weight:
    """Quantize a weight (N, K) of any float type to int8 with one scale per row.

    It works on chunks of rows, so no float32 copy of the whole is made; `weight` is only read.

    Args:
        weight: (N, K).
        group: size of the rotation; None chooses it by the number of inputs.
        seed: of stochastic rounding, which keeps changes smaller than a step on average; None
            rounds to nearest.
        device: where the chunks are computed; the result is where `weight` is.

    Raises:
        ValueError: `weight` is not a matrix, or not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} and type {weight.dtype} is no float matrix"
        )
    group = rotation_group(weight.shape[1]) if group is None else group
    device = weight.device if device is None else torch.device(device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed % 2**63)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    for rows in row_slices(weight, device):
        part = rotate(weight[rows].to(device, torch.float32), group)
        part_values, part_scale = _round_rows(part, generator)
        values[rows], scale[rows] = part_values.to(weight.device), part_scale.to(weight.device)
    if not scale.isfinite().all():
        raise ValueError(
            f"{(~scale.isfinite()).sum().item()} of {len(scale)} rows hold values that are not "
            "finite numbers"
        )
    return Int8Weight(values, scale, group)


def _round_rows(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return x (M, K) as int8, and scales (M, 1) such that each row's largest magnitude is 127.

    Rounds to nearest, or stochastically if there is a generator.
    """
    scale = x.abs().amax(-1, keepdim=True).float().div_(LEVELS).clamp_(min=SMALLEST)
    steps = x.float() / scale
    if generator is None:
        steps = steps.round_()
    else:
        uniform = torch.rand(steps.shape, generator=generator, device=steps.device)
        steps = steps.add_(uniform).floor_()
    return steps.clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias for x (..., K), with the int8 values expanded to the type of x.

    Integers up to 127 are exact in bfloat16 and float32, so the scale is applied to the result,
    which is smaller than the weight. In float16 the unscaled result could overflow, so the weight
    is scaled.
    """
    expanded = weight.values.to(x.dtype)
    if x.dtype == torch.float16:
        return F.linear(rotate(x, weight.group), expanded.mul_(weight.scale), bias)
    out = F.linear(rotate(x, weight.group), expanded).mul_(weight.scale.flatten())
    return out if bias is None else out.add_(bias)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias for x (..., K) as a product of int8 matrices.

    The rows of x are rounded to int8 too, each with its own scale. This is faster where the device
    multiplies int8, and adds an error about as large as that of the weight.
    """
    values, scale = _round_rows(rotate(x, weight.group).reshape(-1, x.shape[-1]))
    out = int8_product(values, weight.values).float().mul_(scale).mul_(weight.scale.flatten())
    out = out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])
    return out if bias is None else out.add_(bias)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T, int32 (M, N), of int8 matrices (M, K) and (N, K).

    bitsandbytes computes it on a GPU if it is installed, else torch.
    """
    odd = a.is_cuda and (len(b) % 8 or b.shape[1] % 8)
    if odd or a.device.type not in ("cpu", "cuda"):  # cuBLAS or torch has no int8 product for these
        return (a.float() @ b.float().T).int()
    if a.is_cuda and (product := bitsandbytes_product()) is not None:
        return product(a, b)
    missing = max(0, MIN_ROWS - len(a)) if a.is_cuda else 0
    return torch._int_mm(F.pad(a, (0, 0, 0, missing)), b.T)[: len(a)]


@functools.lru_cache(maxsize=1)
def bitsandbytes_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Import the int8 product of bitsandbytes, which takes seconds; None if that fails."""
    try:
        from bitsandbytes.functional import int8_linear_matmul
    except (ImportError, OSError, RuntimeError):
        return None
    return int8_linear_matmul


def pack(weight: Int8Weight) -> Tensor:
    """Pack values and scales into one int8 tensor (N + ceil(4 N / K), K).

    For callers that hold a single tensor per weight. The last rows are the bytes of the scales; the
    size of the rotation is not stored.
    """
    values, scale = weight.values, weight.scale.expand(len(weight.values), 1)
    extra = scale.contiguous().view(torch.int8).flatten()
    extra = F.pad(extra, (0, -len(extra) % values.shape[1]))
    return torch.cat([values, extra.unflatten(0, (-1, values.shape[1]))])


def unpack(packed: Tensor, rows: int, group: int) -> Int8Weight:
    """Unpack what `pack` returned for a weight of N = `rows` rows.

    The values are a view. `packed` may have another type that holds the same numbers, such as
    float32.
    """
    packed = packed.to(torch.int8)
    scale = packed[rows:].flatten()[: 4 * rows].clone().view(torch.float32).unsqueeze(1)
    return Int8Weight(packed[:rows], scale, group)
