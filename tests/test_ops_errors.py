"""The op that sums the errors of what quantization made of a tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastquant._native import ops
from fastquant._native import reference as reference_ops

GRID = (0.05, 7, -3, 40)
NONE = (None, 0, 0, 0)


def summed(op: Any, reference: Tensor, x: Tensor, grid: Any = NONE, levels: int = 0) -> Any:
    sums, integers = torch.zeros(5, dtype=torch.float64), torch.zeros(levels, dtype=torch.uint8)
    op(reference, x, *grid, sums, integers)
    return sums, integers


def both(reference: Tensor, x: Tensor, grid: Any = NONE, levels: int = 0) -> Any:
    """What the op gives, after a comparison with its reference."""
    sums, integers = summed(ops.observe_error_, reference, x, grid, levels)
    expected = summed(reference_ops.OPS["observe_error_"], reference, x, grid, levels)
    torch.testing.assert_close(sums, expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(integers, expected[1])
    return sums, integers


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("numel", [0, 1, 15, 33, 2047, 2049, 70_001, 300_000])
def test_sums_are_those_of_the_formulas(numel: int) -> None:
    a = normal(numel)
    b = a + 0.01 * a.cos()
    sums, _ = both(a, b)
    x, e = a.double(), b.double() - a.double()
    products = [float((t * u).sum()) for t, u in ((x, x), (e, e), (x, e))]
    expected = torch.tensor([numel, *products, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numel", [5, 2100, 150_000])
def test_x_is_rounded_and_integers_of_the_reference_are_noted(numel: int) -> None:
    a = normal(numel)
    b = a + 0.3
    sums, integers = both(a, b, GRID, 44)
    scale, zero_point, low, high = GRID
    rounded = torch.fake_quantize_per_tensor_affine(b, scale, zero_point, low, high)
    torch.testing.assert_close(sums[:4], both(a, rounded)[0][:4], rtol=0, atol=0)
    q = (a / scale).round() + zero_point
    assert float(sums[4]) == int(((q < low) | (q > high)).sum())
    assert integers.nonzero().flatten().tolist() == (q.clamp(low, high) - low).unique().tolist()


def test_sums_and_integers_add_up() -> None:
    a = normal(3000)
    sums, integers = torch.zeros(5, dtype=torch.float64), torch.zeros(44, dtype=torch.uint8)
    for part in a.split(1000):
        ops.observe_error_(part, part, *GRID, sums, integers)
    whole, noted = both(a, a, GRID, 44)
    torch.testing.assert_close(sums, whole)
    assert torch.equal(integers, noted)


def test_what_is_not_finite_is_left_out() -> None:
    a = normal(5000)
    b = a.clone()
    a[[3, 4000]] = math.nan
    a[17] = math.inf
    b[[20, 21]] = -math.inf
    kept = a.isfinite() & b.isfinite()
    sums, _ = both(a, b)
    torch.testing.assert_close(sums, both(a[kept], b[kept])[0])
    # Rounded to a grid, an infinity is its end; NaN stays.
    sums, integers = both(a, b, GRID, 44)
    assert float(sums[0]) == 4997
    assert torch.equal(integers, both(a[a.isfinite()], a[a.isfinite()], GRID, 44)[1])


def test_huge_values_do_not_overflow() -> None:
    a = torch.full((100,), 3e38)
    assert float(both(a, -a)[0][2]) == pytest.approx(100 * 6e38**2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(3, 17, 9, 5), (2, 40, 6), (1, 3, 2, 5, 4), (1, 64, 1, 1), (7,)])
def test_integers_in_any_layout_stand_for_real_numbers(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    a = normal(*shape)
    zero_point = 9 if dtype == torch.uint8 else -20
    q = ops.quantize(a, 0.03, zero_point, dtype, False)
    real = (q.float() - zero_point) * 0.03
    expected, _ = both(a, real)
    layouts = [q, torch.empty_like(q.mT.contiguous().mT).copy_(q) if q.dim() > 1 else q]
    layouts.append(ops.quantize(a, 0.03, zero_point, dtype, q.dim() > 2))
    for laid_out in layouts:
        for reference in (a, a.mT.contiguous().mT if a.dim() > 1 else a):
            sums, _ = both(reference, laid_out, (0.03, zero_point, 0, 0))
            torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "grid", "levels", "message"),
    [
        (torch.zeros(3), NONE, 0, "same shape"),
        (torch.zeros(4, dtype=torch.float64), NONE, 0, "x must be float32"),
        (torch.zeros(4, dtype=torch.uint8), NONE, 0, "need a scale"),
        (torch.zeros(4), GRID, 3, "an entry for each integer"),
        (torch.zeros(4), NONE, 3, "an entry for each integer"),
        (torch.zeros(4), (1e-42, *GRID[1:]), 44, "normal number"),
    ],
)
def test_bad_arguments_are_refused(x: Tensor, grid: Any, levels: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        summed(ops.observe_error_, torch.zeros(4), x, grid, levels)
