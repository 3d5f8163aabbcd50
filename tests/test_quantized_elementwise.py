"""Elementwise ops on quantized tensors."""

from __future__ import annotations

import math
import platform
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import elementwise_calls
from elementwise_calls import DTYPES, INF, TORCHS, UNBOUNDED, Quantized, random_bytes
from fastquant import _C
from fastquant._native import ops
from fastquant._native.reference import OPS
from oracle import needs_torch_to_round_once
from strategies import random_values, seeds

CHANNELS_LAST = torch.channels_last


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert ours.stride() == expected.stride()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def results(returned: Any) -> tuple[Tensor, ...]:
    """The tensors that an op returns, one or several."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def assert_all_equal(ours: Any, expected: Any) -> None:
    for got, wanted in zip(results(ours), results(expected), strict=True):
        assert_equal(got, wanted)


def assert_as_reference(isas: list[str], name: str, args: tuple[Any, ...]) -> None:
    expected = OPS[name](*args)
    for isa in isas:
        _C.set_isa(isa)
        assert_all_equal(getattr(ops, name)(*args), expected)


def assert_same_with_threads(*counts: int, name: str, args: tuple[Any, ...]) -> None:
    """The op gives with these numbers of threads what it gives with one: the same bytes."""
    torch.set_num_threads(1)
    expected = getattr(ops, name)(*args)
    for threads in counts:
        torch.set_num_threads(threads)
        assert_all_equal(getattr(ops, name)(*args), expected)


@given(elementwise_calls.elementwise)
def test_as_reference(every_isa: list[str], call: elementwise_calls.Call) -> None:
    assert_as_reference(every_isa, *call)


@pytest.mark.parametrize("channels", [64, 2001])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(channels: int) -> None:
    for name, args in elementwise_calls.samples(channels):
        assert_same_with_threads(2, 3, name=name, args=args)


def test_large_tensors_as_reference(every_isa: list[str]) -> None:
    for name, args in elementwise_calls.samples(4001):
        assert_as_reference(every_isa, name, args)


# ------------------------------------------------------------------- float64, and torch's own


def steps_off(values: Tensor, real: Tensor, scale: float, zero_point: int) -> float:
    """How far integers are from the real values that they stand for, in steps."""
    info = torch.iinfo(values.dtype)
    exact = (real / scale + zero_point).clamp(info.min, info.max)
    return (values.to(torch.float64) - exact).abs().max().item() if values.numel() else 0.0


HALF = 0.5 + 1e-3


@given(elementwise_calls.of_two())
def test_sums_and_products_are_within_half_a_step(call: elementwise_calls.Call) -> None:
    name, args = call
    a, b = Quantized(*args[:3]), Quantized(*args[3:6])
    real = a.real() + b.real() if name == "quantized_add" else a.real() * b.real()
    scale, zero_point, low, high = args[6:]
    level = min(max(real.max().item() if real.numel() else 0.0, low), high)
    if abs(level) < INF:  # bounds are rounded to levels
        bounds = [
            round(bound / scale) * scale if abs(bound) < INF else bound for bound in (low, high)
        ]
        real = real.clamp(*bounds)
    # fp32 has 24 bits for numbers of steps, of which the largest here are 2^7 * 255 * 255.
    slack = (
        1e-3 + 2.0**-23 * (a.real().abs().max() + b.real().abs().max()).item() / scale
        if real.numel()
        else 0
    )
    if name == "quantized_mul" and real.numel():
        slack = 1e-3 + 2.0**-22 * real.abs().max().item() / scale
    assert steps_off(getattr(ops, name)(*args), real, scale, zero_point) <= 0.5 + slack


@given(seeds, st.sampled_from(DTYPES), elementwise_calls.scales)
def test_quantize_is_within_half_a_step(seed: int, dtype: torch.dtype, scale: float) -> None:
    x = random_values((4, 50), torch.float32, seed)
    values = ops.quantize(x, scale, 7, dtype, False)
    assert steps_off(values, x.to(torch.float64), scale, 7) <= HALF


on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="torch rounds otherwise on Arm"
)


@on_x86
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.03, 1.0, 1e-4, 70.0, 1e-30])
def test_quantize_and_dequantize_as_torch(
    dtype: torch.dtype, scale: float, every_isa: list[str]
) -> None:
    needs_torch_to_round_once()
    special = torch.tensor([0.0, -0.0, 0.5, 1.5, -0.5, 3e9, -3e9, 3e38, -3e38, INF, -INF, math.nan])
    x = torch.cat([random_values((1000,), torch.float32, 1), special, special * scale])
    for zero_point in (0, 11, 100):
        theirs = torch.quantize_per_tensor(x, scale, zero_point, TORCHS[dtype])
        for isa in every_isa:
            _C.set_isa(isa)
            ours = ops.quantize(x, scale, zero_point, dtype, False)
            assert torch.equal(ours, theirs.int_repr())
            real = ops.dequantize(ours, scale, zero_point, torch.float32)
            assert torch.equal(real, theirs.dequantize())


@on_x86
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rounds_as_torch_next_to_ties(dtype: torch.dtype, every_isa: list[str]) -> None:
    needs_torch_to_round_once()
    info = torch.iinfo(dtype)
    for seed, scale in enumerate((0.0123, 0.3, 0.77)):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(-300, 300, (4096,), generator=generator) + 0.5
        x = (steps * scale).to(torch.float32)
        nudge = torch.randint(-2, 3, x.shape, dtype=torch.int32, generator=generator)
        x = (x.view(torch.int32) + nudge).view(torch.float32)
        for zero_point in (info.min, info.max - 54):
            theirs = torch.quantize_per_tensor(x, scale, zero_point, TORCHS[dtype])
            for isa in every_isa:
                _C.set_isa(isa)
                ours = ops.quantize(x, scale, zero_point, dtype, False)
                assert torch.equal(ours, theirs.int_repr())
            assert torch.equal(OPS["quantize"](x, scale, zero_point, dtype, False), ours)


def operands(dtype: torch.dtype) -> tuple[Quantized, Quantized]:
    info = torch.iinfo(dtype)
    a, b = (random_bytes((2, 40, 6, 5), dtype, seed) for seed in (1, 2))
    # No sum of these lies between two steps, where rounding would decide.
    return Quantized(a, 0.0307, info.max - 100), Quantized(b, 0.0509, info.min + 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_products_and_concatenations_as_torch(dtype: torch.dtype) -> None:
    a, b = operands(dtype)
    scale, zero_point = 0.0611, torch.iinfo(dtype).max - 130
    theirs = torch.ops.quantized
    pair = (a.torchs(), b.torchs())
    relu, output = (0.0, INF), (scale, zero_point)
    for ours, expected in (
        (ops.quantized_add(*a, *b, *output, *UNBOUNDED), theirs.add(*pair, *output)),
        (ops.quantized_add(*a, *b, *output, *relu), theirs.add_relu(*pair, *output)),
        (ops.quantized_mul(*a, *b, *output, *UNBOUNDED), theirs.mul(*pair, *output)),
        (ops.quantized_mul(*a, *b, *output, *relu), theirs.mul_relu(*pair, *output)),
        (
            ops.quantized_cat(
                [a.values, b.values],
                [a.scale, b.scale],
                [a.zero_point, b.zero_point],
                1,
                *output,
                *UNBOUNDED,
            ),
            theirs.cat(list(pair), 1, *output),
        ),
    ):
        difference = (ours.int() - expected.int_repr().int()).abs()
        assert difference.max().item() <= 1
        assert (difference > 0).to(torch.float32).mean().item() < 0.01


def test_a_zero_is_exact_however_much_larger_a_scale_is() -> None:
    a = torch.tensor([7, 8, 6], dtype=torch.uint8)
    b = torch.tensor([3, 3, 3], dtype=torch.uint8)
    y = ops.quantized_add(a, 1e30, 7, b, 1.0, 3, 1e-30, 10, *UNBOUNDED)
    assert y.tolist() == [10, 255, 0]
    y = ops.quantized_cat([a], [1e30], [7], 0, 1e-30, 10, *UNBOUNDED)
    assert y.tolist() == [10, 255, 0]


def test_lookup_takes_the_byte_as_the_index() -> None:
    table = torch.arange(256, dtype=torch.uint8)
    x = torch.tensor([-128, -1, 0, 127], dtype=torch.int8)
    assert ops.lookup(x, table).tolist() == [128, 255, 0, 127]
    assert ops.lookup(x, table.to(torch.float32) / 2).tolist() == [64.0, 127.5, 0.0, 63.5]


# ---------------------------------------------------------------------------- layouts


def test_quantize_makes_channels_last_of_any_input() -> None:
    for channels in (1, 3, 4, 16, 35):
        x = random_values((2, channels, 9, 11), torch.float32, 0)
        expected = ops.quantize(x, 0.02, 3, torch.uint8, False)
        for view in (
            x,
            x.contiguous(memory_format=CHANNELS_LAST),
            x.flip(0).flip(0),
            x[:, :, 1:-1],
        ):
            y = ops.quantize(view, 0.02, 3, torch.uint8, True)
            assert y.is_contiguous(memory_format=CHANNELS_LAST)
            assert torch.equal(y, expected if view.shape == x.shape else expected[:, :, 1:-1])


def test_a_result_lies_as_the_operand_of_its_shape() -> None:
    a = random_bytes((2, 16, 4, 5), torch.uint8, 0)
    last = a.contiguous(memory_format=CHANNELS_LAST)
    gate = random_bytes((2, 16, 1, 1), torch.uint8, 1)
    settings = (0.01, 0, 0.02, 3, *UNBOUNDED)
    for x in (a, last, a.permute(1, 0, 3, 2)):
        other = gate if x.shape == a.shape else gate.permute(1, 0, 3, 2)
        assert ops.quantized_mul(x, 0.1, 2, other, *settings).stride() == x.stride()
        assert ops.quantized_mul(other, 0.1, 2, x, *settings).stride() == x.stride()


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("quantize", (torch.ones(3), 0.0, 0, torch.uint8, False)),
        ("quantize", (torch.ones(3), -1.0, 0, torch.uint8, False)),
        ("quantize", (torch.ones(3), math.nan, 0, torch.uint8, False)),
        ("quantize", (torch.ones(3), 1.0, 256, torch.uint8, False)),
        ("quantize", (torch.ones(3), 1.0, -1, torch.uint8, False)),
        ("quantize", (torch.ones(3), 1.0, 128, torch.int8, False)),
        ("quantize", (torch.ones(3), 1.0, 0, torch.int32, False)),
        ("quantize", (torch.arange(3), 1.0, 0, torch.uint8, False)),
        ("dequantize", (torch.ones(3), 1.0, 0, torch.float32)),
        ("lookup", (torch.ones(3), torch.zeros(256))),
        ("lookup", (torch.zeros(3, dtype=torch.uint8), torch.zeros(255))),
        ("lookup", (torch.zeros(3, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64))),
    ],
)
def test_what_does_not_fit_is_refused(name: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError):
        getattr(ops, name)(*args)


def test_shapes_that_do_not_fit_are_refused() -> None:
    a, b = (torch.zeros(size, dtype=torch.uint8) for size in (3, 4))
    with pytest.raises(RuntimeError, match="broadcast"):
        ops.quantized_add(a, 1.0, 0, b, 1.0, 0, 1.0, 0, *UNBOUNDED)
    with pytest.raises(RuntimeError, match="same sizes"):
        ops.quantized_cat([a[None], b[None]], [1.0, 1.0], [0, 0], 0, 1.0, 0, *UNBOUNDED)
    with pytest.raises(RuntimeError, match="a scale and a zero point for each"):
        ops.quantized_cat([a, b], [1.0], [0], 0, 1.0, 0, *UNBOUNDED)
    with pytest.raises(RuntimeError, match="out of range"):
        ops.quantized_cat([a, b], [1.0, 1.0], [0, 0], 1, 1.0, 0, *UNBOUNDED)
