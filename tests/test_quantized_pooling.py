"""Pooling, means and other sizes of quantized tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import functional as F

import elementwise_calls
from elementwise_calls import DTYPES, Quantized, random_bytes
from fastquant import _C
from fastquant._native import ops
from test_quantized_elementwise import assert_as_reference


@given(elementwise_calls.pooling)
def test_as_reference(every_isa: list[str], call: elementwise_calls.Call) -> None:
    assert_as_reference(every_isa, *call)


def images(dtype: torch.dtype) -> Quantized:
    values = random_bytes((2, 70, 14, 13), dtype, 0).contiguous(memory_format=torch.channels_last)
    return Quantized(values, 0.1, torch.iinfo(dtype).max - 101)


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool_as_torch(dtype: torch.dtype) -> None:
    x = images(dtype)
    for kernel, stride, padding, ceil_mode in ((3, 2, 1, False), (2, 2, 0, True), (3, 1, 1, False)):
        sizes = [[size, size] for size in (kernel, stride, padding, 1)]
        theirs = F.max_pool2d(x.torchs(), kernel, stride, padding, ceil_mode=ceil_mode)
        assert torch.equal(ops.quantized_max_pool(x.values, *sizes, ceil_mode), theirs.int_repr())


def difference(ours: Tensor, theirs: Tensor) -> int:
    return int((ours.int() - theirs.int_repr().int()).abs().max().item())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pixels_of_expanded_tensors(every_isa: list[str], dims: int) -> None:
    """They lie at the same address, but each of them counts."""
    ones = [1] * dims
    for axis in range(2, 2 + dims):
        shape = [2, 1] + [5] * dims
        whole = random_bytes([1 if d == axis else n for d, n in enumerate(shape)], torch.uint8, 0)
        x = whole.expand(shape)
        for name, args in (
            ("quantized_max_pool", ([2] * dims, ones, ones, ones, False)),
            ("quantized_avg_pool", (7, [3] * dims, ones, ones, False, True, None)),
            ("quantized_adaptive_avg_pool", ([2] * dims,)),
        ):
            assert_as_reference(every_isa, name, (x, *args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_as_torch(dtype: torch.dtype) -> None:
    x = images(dtype)
    theirs = x.torchs()
    for counted in (True, False):
        ours = ops.quantized_avg_pool(
            x.values, x.zero_point, [3, 3], [2, 2], [1, 1], False, counted, None
        )
        pooled = F.avg_pool2d(theirs, 3, 2, 1, count_include_pad=counted)
        assert difference(ours, pooled) == 0
    for size in (1, 7, 5):
        ours = ops.quantized_adaptive_avg_pool(x.values, [size, size])
        assert difference(ours, F.adaptive_avg_pool2d(theirs, size)) <= 1
    ours = ops.quantized_mean(x.values, [2, 3], False)
    assert difference(ours, theirs.mean([2, 3])) <= 1


@pytest.mark.parametrize("kernel", [[2, 1], [2, 3], [3, 3], [4, 7], [40, 3], [1, 9]])
def test_averages_of_windows_that_overlap_are_exact(
    every_isa: list[str], kernel: list[int]
) -> None:
    """Halves, of which windows with an even number of elements have many, go to even integers."""
    x = random_bytes((2, 70, 44, 23), torch.uint8, 3).contiguous(memory_format=torch.channels_last)
    for stride, counted in itertools.product(([1, 1], [1, 2]), (True, False)):
        settings = (kernel, stride, [size // 2 for size in kernel], True, counted)
        exact = F.avg_pool2d(x.to(torch.float64) - 128, *settings).round() + 128
        for isa in every_isa:
            _C.set_isa(isa)
            y = ops.quantized_avg_pool(x, 128, *settings, None)
            assert torch.equal(y.to(torch.float64), exact), isa


MODES = {"nearest": 0, "nearest-exact": 1, "bilinear": 2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_other_sizes_as_torch_interpolates_real_values(dtype: torch.dtype, mode: str) -> None:
    x = images(dtype)
    real = x.values.to(torch.float64)
    corners = {"bilinear": [True, False]}.get(mode, [False])
    for size, align_corners in itertools.product(([28, 26], [5, 7], [14, 13], [1, 1]), corners):
        ratios = [
            elementwise_calls.ratio_of(n, outputs, align_corners, None)
            for n, outputs in zip((14, 13), size, strict=True)
        ]
        y = ops.quantized_interpolate(x.values, size, ratios, MODES[mode], align_corners)
        settings = {"align_corners": align_corners} if mode == "bilinear" else {}
        expected = F.interpolate(real, size, mode=mode, **settings)
        assert (y.to(torch.float64) - expected).abs().max().item() <= 0.5 + 1e-3


@pytest.mark.parametrize("scale", [0.3, 0.7, 1.1, 2.3, 3.0])
def test_nearest_takes_the_pixels_that_torch_takes(scale: float) -> None:
    for size in range(1, 60):
        x = torch.arange(size, dtype=torch.uint8).reshape(1, 1, size)
        if int(size * scale) > 0:
            expected = F.interpolate(x, scale_factor=scale, mode="nearest")
            outputs = expected.shape[-1]
            y = ops.quantized_interpolate(x, [outputs], [1 / scale], 0, False)
            assert torch.equal(y, expected)
            y = ops.quantized_interpolate(x, [outputs], [size / outputs], 0, False)
            assert torch.equal(y, F.interpolate(x, size=outputs, mode="nearest"))


@given(elementwise_calls.mean())
def test_means_are_within_half_a_step(call: elementwise_calls.Call) -> None:
    _, (x, dim, keepdim) = call
    exact = x.to(torch.float64).mean(dim or None, keepdim)
    y = ops.quantized_mean(x, dim, keepdim).to(torch.float64)
    assert (y - exact).abs().max().item() <= 0.5 + 1e-3


def test_the_mean_of_many_elements(every_isa: list[str]) -> None:
    x = torch.full((9_000_001,), 200, dtype=torch.uint8)
    x[::2] = 100
    assert_as_reference(every_isa, "quantized_mean", (x, [0], False))
    many = x[:9_000_000].view(1, 4_500_000, 2)
    assert_as_reference(every_isa, "quantized_mean", (many, [1], False))


def test_a_window_of_padding_alone_has_the_least_value() -> None:
    wide = torch.full((1, 1, 1, 3), 100, dtype=torch.int8)
    y = ops.quantized_max_pool(wide, [1, 2], [1, 1], [0, 1], [1, 4], False)  # pixels -1 and 3
    assert y.flatten().tolist() == [-128]


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        ops.quantized_max_pool(x, [5, 5], [1, 1], [0, 0], [1, 1], False)
    with pytest.raises(RuntimeError, match="must be positive"):
        ops.quantized_max_pool(x, [2, 2], [0, 1], [0, 0], [1, 1], False)
    with pytest.raises(RuntimeError, match="stride must have 2 elements"):
        ops.quantized_max_pool(x, [2, 2], [1], [0, 0], [1, 1], False)
    with pytest.raises(RuntimeError, match="divisor_override"):
        ops.quantized_avg_pool(x, 0, [2, 2], [1, 1], [0, 0], False, True, 0)
    with pytest.raises(RuntimeError, match="dimensions"):
        ops.quantized_adaptive_avg_pool(x[0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="no elements"):
        ops.quantized_mean(x[:0], [0], False)
    with pytest.raises(RuntimeError, match="out of range"):
        ops.quantized_mean(x, [4], False)
