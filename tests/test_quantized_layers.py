"""Linear layers and convolutions on quantized tensors: the ops, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import layer_calls
from elementwise_calls import INF, Call, Quantized, random_bytes
from fastquant import _C
from fastquant._native import ops
from fastquant._native.reference import OPS
from layer_calls import random_weight, weight_scales
from test_quantized_elementwise import (
    assert_as_reference,
    assert_equal,
    assert_same_with_threads,
)


@given(layer_calls.layers)
def test_as_reference(every_isa: list[str], call: Call) -> None:
    assert_as_reference(every_isa, *call)


def test_large_layers_as_reference(every_isa: list[str]) -> None:
    for name, args in layer_calls.samples():
        assert_as_reference(every_isa, name, args)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(every_isa: list[str]) -> None:
    for name, args in layer_calls.samples():
        for isa in every_isa[:-1]:  # the last one is scalar, and slow
            _C.set_isa(isa)
            assert_same_with_threads(2, 3, 5, name=name, args=args)


@pytest.mark.parametrize("call", [layer_calls.linears(), layer_calls.convolutions()])
@given(data=st.data())
def test_compilers_know_the_results(call: st.SearchStrategy[Call], data: st.DataObject) -> None:
    name, args = data.draw(call)
    op = getattr(torch.ops.fastquant, name).default
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(op, args, test_utils=checks).values()) == {"SUCCESS"}


# ------------------------------------------------------------------------------------ weights


@given(data=st.data())
def test_weights_are_packed_as_by_the_reference_and_unpacked(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    groups = data.draw(st.sampled_from([1, 1, 2, 5]))
    sizes = [data.draw(st.sampled_from([1, 2, 3, 7])) for _ in range(dims)]
    first = groups * data.draw(st.sampled_from([1, 4, 17, 64, 70]))
    shape = (first, data.draw(st.sampled_from([1, 3, 4, 65])), *sizes)
    transposed = dims > 0 and data.draw(st.booleans())
    weight = random_weight(shape, 0)
    packed = ops.pack_weight(weight, groups, transposed)
    assert_equal(packed, OPS["pack_weight"](weight, groups, transposed))
    for unpack in (ops.unpack_weight, OPS["unpack_weight"]):
        assert_equal(unpack(packed, list(shape), groups, transposed), weight)


def test_packed_weights_may_lie_at_any_address(every_isa: list[str]) -> None:
    for name, args in itertools.islice(layer_calls.samples(), 5):
        packed = args[3]
        moved = torch.empty(len(packed) + 1, dtype=torch.uint8)[1:].copy_(packed)
        for isa in every_isa[:-1]:  # the last one is scalar, and slow
            _C.set_isa(isa)
            ours = getattr(ops, name)(*args[:3], moved, *args[4:])
            assert_equal(ours, getattr(ops, name)(*args))


# -------------------------------------------------------------------- float64, and torch's own


def conv_args(
    x: Quantized,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], int],
    *output: Any,
) -> tuple[Any, ...]:
    packed = ops.pack_weight(weight, geometry[-1], False)
    return (*x, packed, scale, bias, list(weight.shape), *geometry, *output)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("groups", [1, 4, 64])
def test_within_half_a_step_of_the_real_values(dtype: torch.dtype, groups: int) -> None:
    values = random_bytes((2, 64, 15, 15), dtype, 0)
    x = Quantized(values.to(memory_format=torch.channels_last), 0.013, 11)
    weight = random_weight((64, 64 // groups, 3, 3), 1)
    scale, bias = weight_scales(64, 2), torch.randn(64)
    real = F.conv2d(
        x.real(),
        weight.double() * scale.double().reshape(-1, 1, 1, 1),
        bias.double(),
        2,
        1,
        1,
        groups,
    )
    step = float(real.abs().max()) / 100
    args = conv_args(
        x, weight, scale, bias, ([2, 2], [1, 1], [1, 1], groups), step, 7, -INF, INF, dtype
    )
    y = (ops.quantized_conv(*args).double() - 7) * step
    info = torch.iinfo(dtype)
    expected = real.clamp((info.min - 7) * step, (info.max - 7) * step)
    assert float((y - expected).abs().max()) <= (0.5 + 1e-3) * step


@pytest.mark.parametrize("groups", [1, 4])
def test_as_torch_on_seven_bits(groups: int) -> None:
    values = random_bytes((2, 64, 15, 15), torch.uint8, 0) // 2
    x = Quantized(values, 0.05, 60)
    weight = random_weight((64, 64 // groups, 3, 3), 1).clamp(-127, 127)
    scale, bias = weight_scales(64, 2), torch.randn(64)
    of_torch = torch._make_per_channel_quantized_tensor(
        weight, scale.double(), torch.zeros(64, dtype=torch.int64), 0
    )
    prepared = torch.ops.quantized.conv2d_prepack(of_torch, bias, [1, 1], [1, 1], [1, 1], groups)
    expected = torch.ops.quantized.conv2d_relu(x.torchs(), prepared, 3.0, 5).int_repr()
    args = conv_args(
        x, weight, scale, bias, ([1, 1], [1, 1], [1, 1], groups), 3.0, 5, 0.0, INF, torch.uint8
    )
    difference = (ops.quantized_conv(*args).int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).double().mean()) < 1e-3


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("value", [127, 128, 255])
def test_the_greatest_sums_are_exact(value: int, rows: int, every_isa: list[str]) -> None:
    x = torch.full((rows, 1000), value, dtype=torch.uint8)
    weight = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, 1000).contiguous()
    packed = ops.pack_weight(weight, 1, False)
    for isa in every_isa:
        _C.set_isa(isa)
        output = (1.0, 0, -INF, INF, torch.float32)
        y = ops.quantized_linear(x, 1.0, 0, packed, torch.ones(1), None, 2, *output)
        assert y.tolist() == [[-128_000.0 * value, 127_000.0 * value]] * rows


@pytest.mark.parametrize("groups", [1, 4, 8, 16])
@pytest.mark.parametrize("large", [(), (0,), (63,), (30, 31), range(24, 48), range(64)])
def test_rows_of_small_and_of_large_pairs_are_exact(
    large: Iterable[int], groups: int, every_isa: list[str]
) -> None:
    """AVX2 multiplies pairs that add up to 256 at most as bytes, and others as words."""
    channels = 64
    first = torch.randint(0, 257, (64, channels // 2), generator=torch.Generator().manual_seed(0))
    pairs = torch.stack((first, 256 - first), -1).clamp(0, 255)
    for row in large:
        pairs[row, row % (channels // 2)] = torch.tensor([255, 2])
    x = pairs.to(torch.uint8).reshape(1, 64, 1, channels).permute(0, 3, 1, 2)
    weight = random_weight((channels, channels // groups, 1, 1), 1)
    weight[::4], weight[1::4] = -128, 127
    exact = F.conv2d(x.double(), weight.double(), groups=groups)
    for isa in every_isa:
        _C.set_isa(isa)
        args = conv_args(
            Quantized(x, 1.0, 0),
            weight,
            torch.ones(1),
            None,
            ([1, 1], [0, 0], [1, 1], groups),
            *(1.0, 0, -INF, INF, torch.float32),
        )
        assert_equal(ops.quantized_conv(*args), exact.float())


def test_outputs_of_any_size_are_bounded(every_isa: list[str]) -> None:
    """Sums times factors that int32 cannot hold."""
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, 64).contiguous()
    packed = ops.pack_weight(weight, 1, False)
    for isa in every_isa:
        _C.set_isa(isa)
        for size in (1.0, 1e9, 1e20):
            args = (x, 1.0, 0, packed, torch.tensor([size]), None, 2, 1.0)
            y = ops.quantized_linear(*args, 10, -INF, INF, torch.uint8)
            assert y.tolist() == [[255, 0]]
            y = ops.quantized_linear(*args, -10, -20.0, 30.0, torch.int8)
            assert y.tolist() == [[20, -30]]


# -------------------------------------------------------------------------------------- errors


def linear_args(**changes: Any) -> tuple[Any, ...]:
    args = {
        "x": torch.zeros(2, 8, dtype=torch.uint8),
        "x_scale": 0.1,
        "x_zero_point": 0,
        "packed_weight": ops.pack_weight(torch.zeros(4, 8, dtype=torch.int8), 1, False),
        "weight_scale": torch.ones(4),
        "bias": None,
        "out_features": 4,
        "scale": 0.1,
        "zero_point": 0,
        "low": -INF,
        "high": INF,
        "dtype": torch.uint8,
    }
    return tuple((args | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "x must be uint8 or int8"),
        ({"x": torch.zeros(2, 12, dtype=torch.uint8)}, "packed_weight has"),
        ({"packed_weight": torch.zeros(3, dtype=torch.uint8)}, "packed_weight has 3 bytes"),
        ({"weight_scale": torch.ones(3)}, "weight_scale has 3 elements, needs 1 or 4"),
        ({"weight_scale": torch.ones(4).double()}, "weight_scale must be"),
        ({"bias": torch.ones(3)}, "bias has 3 elements, needs 4"),
        ({"dtype": torch.float64}, "dtype must be"),
    ],
)
def test_invariants_of_linear_layers(changes: dict[str, Any], message: str) -> None:
    ops.quantized_linear(*linear_args())
    with pytest.raises(RuntimeError, match=message):
        ops.quantized_linear(*linear_args(**changes))


@pytest.mark.parametrize(
    ("shape", "geometry", "message"),
    [
        ((4, 6, 3, 3), ([1, 1], [1, 1], [1, 1], 1), "x has 8 channels, the weight needs 6"),
        ((4, 8, 9, 9), ([1, 1], [1, 1], [1, 1], 1), "the kernel reaches over 9 positions"),
        ((4, 8, 3, 3), ([0, 1], [1, 1], [1, 1], 1), "must be positive"),
        ((4, 8, 3, 3), ([1], [1, 1], [1, 1], 1), "stride needs 2 values, has 1"),
        ((5, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 2), "5 channels cannot be split into 2 groups"),
    ],
)
def test_invariants_of_convolutions(
    shape: tuple[int, ...], geometry: tuple[list[int], list[int], list[int], int], message: str
) -> None:
    x = torch.zeros(1, 8, 5, 5, dtype=torch.uint8)
    packed = torch.zeros(100_000, dtype=torch.uint8)
    scale = torch.ones(1)
    output = (0.1, 0, -INF, INF, torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        ops.quantized_conv(x, 0.1, 0, packed, scale, None, list(shape), *geometry, *output)
