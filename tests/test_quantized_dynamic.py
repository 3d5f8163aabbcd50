"""The ops of layers that quantize their input at each call, on every instruction set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import dynamic_calls
from elementwise_calls import Call
from fastquant import _C
from fastquant._native import ops
from layer_calls import random_weight, weight_scales
from strategies import seeds
from test_quantized_elementwise import (
    assert_as_reference,
    assert_equal,
    assert_same_with_threads,
    results,
)


@given(dynamic_calls.layers)
def test_as_reference(every_isa: list[str], call: Call) -> None:
    assert_as_reference(every_isa, *call)


def test_large_layers_as_reference(every_isa: list[str]) -> None:
    for name, args in dynamic_calls.samples():
        assert_as_reference(every_isa, name, args)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(every_isa: list[str]) -> None:
    for name, args in dynamic_calls.samples():
        for isa in every_isa[:-1]:  # the last one is scalar, and slow
            _C.set_isa(isa)
            assert_same_with_threads(2, 3, 5, name=name, args=args)


@given(call=dynamic_calls.layers)
def test_compilers_know_the_results(call: Call) -> None:
    name, args = call
    op = getattr(torch.ops.fastquant, name).default
    checks = ("test_schema", "test_faketensor")
    if not any(
        isinstance(a, Tensor) and not a.isfinite().all() for a in (*args, *results(op(*args)))
    ):
        assert set(torch.library.opcheck(op, args, test_utils=checks).values()) == {"SUCCESS"}


# ------------------------------------------------------------------------------ torch as the oracle


def real_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, reduce_range: bool
) -> Tensor:
    """With the scale and zero point that torch chooses, and exact sums."""
    x_scale, zero_point = torch._choose_qparams_per_tensor(x, reduce_range)
    q = torch.quantize_per_tensor(x, x_scale, zero_point, torch.quint8).int_repr()
    sums = (q.double() - zero_point) @ weight.double().t()
    return sums * (x_scale * scale.double()) + bias.double()


@given(
    seed=seeds,
    kind=st.sampled_from([kind for kind in dynamic_calls.KINDS if kind != "nonfinite"]),
    reduce_range=st.booleans(),
    rows=st.sampled_from([1, 2, 9]),
)
def test_scale_and_zero_point_are_torchs(
    seed: int, kind: str, reduce_range: bool, rows: int
) -> None:
    x = dynamic_calls.values((rows, 33), kind, torch.float32, seed)
    weight, scale, bias = random_weight((21, 33), seed), weight_scales(21, seed), torch.randn(21)
    y = ops.dynamic_linear(
        x, ops.pack_weight(weight, 1, False), scale, bias, 21, False, reduce_range
    )
    expected = real_linear(x, weight, scale, bias, reduce_range)
    # Another zero point would change each output by a whole step of the input.
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6 * float(x.abs().max()))


@given(seed=seeds, transposed=st.booleans())
def test_convolutions_are_within_the_steps_of_their_input(seed: int, transposed: bool) -> None:
    x = dynamic_calls.values((2, 6, 9, 9), "normal", torch.float32, seed)
    weight, scale = random_weight((6, 6, 3, 3), seed), torch.tensor([0.01])
    geometry = ([6, 6, 3, 3], [2, 2], [1, 1])
    packed = ops.pack_weight(weight, 1, transposed)
    real = weight.double() * 0.01
    if transposed:
        y = ops.dynamic_conv_transpose(x, packed, scale, None, *geometry, [1, 1], [1, 1], 1, False)
        expected = F.conv_transpose2d(x.double(), real, None, 2, 1, 1)
    else:
        y = ops.dynamic_conv(x, packed, scale, None, *geometry, [1, 1], 1, False)
        expected = F.conv2d(x.double(), real, None, 2, 1)
    step = float(x.max() - x.min().clamp(max=0)) / 255
    reach = 0.51 * step * float(real.abs().sum((0, 2, 3) if transposed else (1, 2, 3)).max())
    assert float((y.double() - expected).abs().max()) <= reach


# ----------------------------------------------------------------------------- NaN and infinities


def linear_args(x: Tensor, **changes: Any) -> tuple[Any, ...]:
    weight = random_weight((5, x.shape[-1]), 0)
    given = {
        "x": x,
        "packed": ops.pack_weight(weight, 1, False),
        "scale": torch.ones(1),
        "bias": torch.ones(5),
        "channels": 5,
    } | changes
    return *given.values(), False, True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_that_is_not_finite_gives_nan_and_no_other_row_changes(
    value: float, dtype: torch.dtype
) -> None:
    x = torch.randn(4, 8).to(dtype)
    x[2] = 0.0
    expected = ops.dynamic_linear(*linear_args(x))
    x[2, 3] = value
    y = ops.dynamic_linear(*linear_args(x))
    assert y[2].isnan().all()
    assert_equal(y[[0, 1, 3]], expected[[0, 1, 3]])


def test_only_a_sequence_that_is_not_finite_becomes_nan() -> None:
    x = torch.randn(5, 3, 4)
    x[2, 1, 0] = math.nan
    scales = ((torch.tensor([0.01]), None), (torch.tensor([0.01]), None))
    y, h, c = ops.dynamic_lstm(*dynamic_calls.recurrent_args(4, x, None, 3, 7, scales))
    assert y[2:, 1].isnan().all()
    assert h[1].isnan().all()
    assert c[1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()
    assert not y[:2].isnan().any()


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(3, 4, dtype=torch.int64)},
        {"packed": torch.zeros(3, dtype=torch.uint8)},
        {"scale": torch.ones(4)},
        {"bias": torch.ones(6)},
        {"channels": 6},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        ops.dynamic_linear(*linear_args(**({"x": torch.randn(3, 4)} | changes)))


@pytest.mark.parametrize("counts", [[2, 3], [4, 1], [3, 0], [2, 2]])
def test_batch_sizes_that_do_not_fit_are_refused(counts: list[int]) -> None:
    scales = ((torch.ones(1), None), (torch.ones(1), None))
    args = dynamic_calls.recurrent_args(3, torch.randn(5, 2), torch.tensor(counts), 3, 4, scales)
    with pytest.raises(RuntimeError, match="batch"):
        ops.dynamic_gru(*args)
