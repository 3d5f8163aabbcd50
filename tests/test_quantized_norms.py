"""Norms and softmax of quantized tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import functional as F

import elementwise_calls
from elementwise_calls import DTYPES, INF, Quantized, random_bytes
from fastquant._native import ops
from strategies import random_values
from test_quantized_elementwise import assert_as_reference, steps_off


@given(elementwise_calls.norms)
def test_as_reference(every_isa: list[str], call: elementwise_calls.Call) -> None:
    assert_as_reference(every_isa, *call)


def images(dtype: torch.dtype, *shape: int) -> Quantized:
    values = random_bytes(shape, dtype, 0)
    return Quantized(values, 0.03, torch.iinfo(dtype).max - 101)


def parameters(*shape: int) -> tuple[Tensor, Tensor]:
    weight, bias = (random_values(shape, torch.float32, seed) for seed in (1, 2))
    return weight, bias


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.float64) for t in tensors)


OUTPUT = (0.04, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spatial", [(), (9,), (5, 6), (3, 4, 5)])
def test_norms_of_channels_are_within_half_a_step(
    dtype: torch.dtype, spatial: tuple[int, ...]
) -> None:
    x = images(dtype, 4, 12, *spatial)
    weight, bias = parameters(12)
    mean, var = random_values((12,), torch.float32, 3), random_values((12,), torch.float32, 4).abs()
    real = x.real()
    y = ops.quantized_batch_norm(*x, weight, bias, mean, var, 1e-5, *OUTPUT, -INF, INF)
    expected = F.batch_norm(real, *double(mean, var, weight, bias), False, 0.1, 1e-5)
    assert steps_off(y, expected, *OUTPUT) <= 0.5 + 2e-3
    y = ops.quantized_batch_norm(*x, weight, bias, mean, var, 1e-5, *OUTPUT, 0.0, INF)
    assert steps_off(y, F.relu(expected), *OUTPUT) <= 0.5 + 2e-3
    for groups in (1, 3, 12):
        y = ops.quantized_group_norm(*x, groups, weight, bias, 1e-5, *OUTPUT)
        if real[0, : 12 // groups].numel() > 1:
            expected = F.group_norm(real, groups, *double(weight, bias), 1e-5)
            assert steps_off(y, expected, *OUTPUT) <= 0.5 + 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_and_softmax_are_within_half_a_step(dtype: torch.dtype) -> None:
    x = images(dtype, 5, 7, 33)
    weight, bias = parameters(7, 33)
    y = ops.quantized_layer_norm(*x, [7, 33], weight, bias, 1e-5, *OUTPUT)
    expected = F.layer_norm(x.real(), [7, 33], *double(weight, bias), 1e-5)
    assert steps_off(y, expected, *OUTPUT) <= 0.5 + 2e-3
    for dim in (0, 1, 2):
        least = torch.iinfo(dtype).min
        y = ops.quantized_softmax(x.values, x.scale, dim, 1 / 256, least)
        assert steps_off(y, x.real().softmax(dim), 1 / 256, least) <= 0.5 + 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_as_torch(dtype: torch.dtype) -> None:
    theirs = torch.ops.quantized
    x = images(dtype, 3, 8, 6, 5)
    weight, bias = parameters(8)
    mean, var = random_values((8,), torch.float32, 3), random_values((8,), torch.float32, 4).abs()
    q = x.torchs()
    pairs = [
        (
            ops.quantized_group_norm(*x, 4, weight, bias, 1e-5, *OUTPUT),
            theirs.group_norm(q, 4, weight, bias, 1e-5, *OUTPUT),
        ),
        (
            ops.quantized_group_norm(*x, 8, weight, bias, 1e-5, *OUTPUT),
            theirs.instance_norm(q, weight, bias, 1e-5, *OUTPUT),
        ),
        (
            ops.quantized_layer_norm(*x, [6, 5], None, None, 1e-5, *OUTPUT),
            theirs.layer_norm(q, [6, 5], None, None, 1e-5, *OUTPUT),
        ),
        (
            ops.quantized_batch_norm(*x, weight, bias, mean, var, 1e-5, *OUTPUT, -INF, INF),
            theirs.batch_norm2d(q, weight, bias, mean, var, 1e-5, *OUTPUT),
        ),
        (
            ops.quantized_batch_norm(*x, weight, bias, mean, var, 1e-5, *OUTPUT, 0.0, INF),
            theirs.batch_norm2d_relu(q, weight, bias, mean, var, 1e-5, *OUTPUT),
        ),
    ]
    for ours, expected in pairs:
        assert (ours.int() - expected.int_repr().int()).abs().max().item() <= 1


def test_a_constant_channel_becomes_its_bias() -> None:
    x = torch.full((2, 3, 4, 4), 77, dtype=torch.uint8)
    bias = torch.tensor([0.0, 1.0, -1.0])
    y = ops.quantized_group_norm(x, 0.1, 5, 3, None, bias, 1e-5, 0.5, 10)
    assert y[1, :, 2, 3].tolist() == [10, 12, 8]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("quantized_group_norm", (3, None, None, 1e-5, *OUTPUT), "divided"),
        ("quantized_group_norm", (2, torch.ones(3), None, 1e-5, *OUTPUT), "weight must have 4"),
        ("quantized_layer_norm", ([4], None, None, 1e-5, *OUTPUT), "last sizes of x"),
        ("quantized_layer_norm", ([], None, None, 1e-5, *OUTPUT), "last sizes of x"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, args: tuple[Any, ...], message: str) -> None:
    x = torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(x, 1.0, 0, *args)
