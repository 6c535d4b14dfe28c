"""int8 weights: rounding, rotation, products, and the packed form."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow_core.quantization import int8 as quantize
from gmflow_core.quantization.int8 import (
    Int8Weight,
    bitsandbytes_product,
    hadamard,
    int8_linear,
    int8_product,
    linear,
    pack,
    quantize_rows,
    rotate,
    rotation_group,
    unpack,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


# --- rotation


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_hadamard_is_orthogonal_symmetric_and_regular(size: int) -> None:
    matrix = hadamard(size).double()
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size).double(), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    sums = matrix.sum(0)  # regular: no row is a plain mean
    assert torch.allclose(sums, torch.ones(size).double(), atol=1e-6)


def test_hadamard_is_that_of_comfyui() -> None:
    """Files are exchanged with ComfyUI, so the 4 x 4 matrix and the product's order are fixed."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    assert torch.equal(hadamard(4), four)
    assert torch.equal(hadamard(16), torch.kron(four, four))


@pytest.mark.parametrize("size", [2, 8, 12, 0])
def test_hadamard_refuses_other_sizes(size: int) -> None:
    if size == 0:
        assert rotate(normal(3, 5), 0).shape == (3, 5)
        return
    with pytest.raises(ValueError, match=f"size {size}"):
        hadamard(size)


def test_rotation_is_its_own_inverse_and_keeps_products() -> None:
    x, w = normal(2, 5, 128), normal(7, 128, seed=1)
    assert torch.allclose(rotate(rotate(x, 64), 64), x, atol=1e-5)
    assert torch.allclose(rotate(x, 64) @ rotate(w, 64).T, x @ w.T, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "group"), [(3072, 256), (12288, 256), (2432, 64), (48, 16), (30, 0), (4, 0)]
)
def test_largest_rotation_that_divides(inputs: int, group: int) -> None:
    assert rotation_group(inputs) == group


# --- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [None, 0])
def test_rounds_to_the_nearest_of_255_levels(dtype: torch.dtype, group: int | None) -> None:
    weight = normal(9, 128).to(dtype)
    before = weight.clone()
    int8 = quantize_rows(weight, group)
    exact = rotate(before.float(), int8.group)
    assert int8.group == (64 if group is None else 0)
    assert (int8.values.shape, int8.values.dtype, int8.scale.shape, int8.scale.dtype) == (
        (9, 128),
        torch.int8,
        (9, 1),
        torch.float32,
    )
    assert (int8.values.abs().amax(1) == 127).all()
    assert ((int8.values * int8.scale - exact).abs() <= int8.scale * 0.5001).all()
    assert torch.equal(weight, before)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(50, 64)
    whole = quantize_rows(weight)
    monkeypatch.setattr(quantize, "CHUNK", {"cpu": 7 * 64 + 3})
    parts = quantize_rows(weight, device="cpu")
    assert torch.equal(whole.values, parts.values)
    assert torch.allclose(whole.scale, parts.scale, rtol=1e-6)
    assert (
        torch.equal(parts.dequantize(), whole.dequantize())
        or relative(parts.dequantize(), whole.dequantize()) < 1e-6
    )


def test_small_float32_copies_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no float32 tensor larger than a chunk, whatever the size of the weight."""
    sizes = []
    real = quantize.rotate
    monkeypatch.setattr(quantize, "CHUNK", {"cpu": 1024})
    monkeypatch.setattr(
        quantize, "rotate", lambda x, group: sizes.append(x.numel()) or real(x, group)
    )
    quantize_rows(normal(64, 256).bfloat16()).dequantize()
    assert sizes
    assert max(sizes) <= 1024


def test_rows_of_zeros() -> None:
    weight = normal(3, 16)
    weight[1] = 0
    int8 = quantize_rows(weight)
    assert (int8.values[1] == 0).all()
    assert (int8.dequantize()[1] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(value: float) -> None:
    weight = normal(4, 64)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="1 of 4 rows"):
        quantize_rows(weight)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int8)]
)
def test_refuses_what_is_no_float_matrix(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="no float matrix"):
        quantize_rows(weight)


def test_stochastic_rounding_is_right_on_average() -> None:
    weight = normal(8, 64)
    draws = [quantize_rows(weight, seed=seed).dequantize() for seed in range(400)]
    error = (torch.stack(draws).mean(0) - weight).abs()
    # one draw is off by up to a step, the mean of 400 by about 0.025 steps
    assert (error < 0.15 * quantize_rows(weight).scale).all()
    assert torch.equal(quantize_rows(weight, seed=3).values, quantize_rows(weight, seed=3).values)
    assert not torch.equal(
        quantize_rows(weight, seed=3).values, quantize_rows(weight, seed=4).values
    )


def test_changes_below_a_step_survive_stochastic_rounding_only() -> None:
    """Add a LoRA to a rounded weight: rounding to nearest would lose most of a small change."""
    rounded = quantize_rows(normal(64, 256)).dequantize()
    change = 0.003 * normal(64, 4, seed=1) @ normal(4, 256, seed=2) / 2

    def kept(seed: int | None) -> float:
        moved = quantize_rows(rounded + change, seed=seed).dequantize() - rounded
        return ((moved * change).sum() / change.square().sum()).item()

    assert kept(None) < 0.5
    assert abs(kept(0) - 1) < 0.15


def test_scales_of_a_whole_tensor() -> None:
    """ComfyUI's layout allows one scale for all rows."""
    values = torch.randint(-127, 128, (6, 32), dtype=torch.int8)
    one, each = (Int8Weight(values, torch.full((rows, 1), 0.1), 0) for rows in (1, 6))
    assert torch.equal(one.dequantize(), each.dequantize())
    x = normal(3, 32)
    assert torch.allclose(linear(x, one), linear(x, each))
    assert torch.equal(unpack(pack(one), 6, 0).scale, each.scale)


# --- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_that_of_the_dequantised_weight(
    dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool
) -> None:
    int8 = quantize_rows(normal(20, 64, seed=1))
    x, bias = normal(*shape), normal(20, seed=2) if with_bias else None
    exact = F.linear(
        x.to(dtype).float(), int8.dequantize(), None if bias is None else bias.to(dtype).float()
    )
    for product, tolerance in (
        (linear, {torch.float32: 1e-6}.get(dtype, 0.01)),
        (int8_linear, 0.025),
    ):
        out = product(x.to(dtype), int8, None if bias is None else bias.to(dtype))
        assert (out.dtype, out.shape) == (dtype, (*shape[:-1], 20))
        assert relative(out, exact) < tolerance


def test_float16_does_not_overflow() -> None:
    """Without the scale the products below would be 127 * 60 * 64 > 65504."""
    int8 = quantize_rows(torch.full((4, 64), 0.01), 0)
    out = linear(torch.full((1, 64), 60.0, dtype=torch.float16), int8)
    assert torch.allclose(out.float(), torch.full((1, 4), 38.4), rtol=2e-3)


def test_inputs_stay_as_they_were() -> None:
    int8, x, bias = quantize_rows(normal(8, 64)), normal(5, 64), normal(8)
    copies = x.clone(), bias.clone(), int8.values.clone(), int8.scale.clone()
    linear(x, int8, bias)
    int8_linear(x, int8, bias)
    assert all(map(torch.equal, (x, bias, int8.values, int8.scale), copies))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_product_is_exact(rows: int) -> None:
    a, b = (torch.randint(-127, 128, (n, 64), dtype=torch.int8) for n in (rows, 24))
    assert torch.equal(int8_product(a, b), (a.long() @ b.long().T).int())


def test_bitsandbytes_gives_the_same_product() -> None:
    product = bitsandbytes_product()
    if product is None:
        pytest.skip("bitsandbytes is not installed")
    a, b = (torch.randint(-127, 128, (n, 64), dtype=torch.int8) for n in (32, 24))
    assert torch.equal(product(a, b), int8_product(a, b))


def test_bitsandbytes_is_imported_on_demand() -> None:
    """Import it only on use: that takes seconds, and ComfyUI works without."""
    code = (
        "import sys, gmflow_core, gmflow_core.quantization.int8; "
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("kind", ["none", "weights", "activations"])
def test_error_is_at_most_half_of_fp8(kind: str) -> None:
    """Outlier channels in the weight or in the input hurt neither product."""
    weight, x = normal(512, 1024) / 32, normal(64, 1024, seed=1)
    if kind == "weights":
        weight[:, :8] *= 10
    if kind == "activations":
        x[:, :8] *= 20
    exact = x @ weight.T
    int8 = quantize_rows(weight)
    fp8 = relative(x @ weight.to(torch.float8_e4m3fn).float().T, exact)
    assert relative(linear(x, int8), exact) < 0.4 * fp8
    assert relative(int8_linear(x, int8), exact) < 0.5 * fp8
    if kind == "weights":
        assert relative(linear(x, int8), exact) < 0.4 * relative(
            linear(x, quantize_rows(weight, 0)), exact
        )


# --- the packed form


@pytest.mark.parametrize("shape", [(9, 64), (3, 30), (70, 5), (1, 1)])
def test_pack_and_back(shape: tuple[int, int]) -> None:
    int8 = quantize_rows(normal(*shape))
    packed = pack(int8)
    assert packed.dtype == torch.int8
    assert packed.shape[1] == shape[1]
    assert packed.shape[0] > shape[0]
    # ComfyUI's patcher casts a weight before it asks for the conversion
    for kept in (packed, packed.float()):
        back = unpack(kept, shape[0], int8.group)
        assert torch.equal(back.values, int8.values)
        assert torch.equal(back.scale, int8.scale)
        assert back.group == int8.group
