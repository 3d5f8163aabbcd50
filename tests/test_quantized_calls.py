"""Layers on quantized tensors without torch's dispatcher: the same integers as by the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastquant import _C
from fastquant._native import fast_calls
from fastquant._quantized import calls
from fastquant.nn import quantized as nnq
from fastquant.quantized_tensor import QuantizedTensor, quantize_per_channel, quantize_per_tensor

DTYPES = (torch.uint8, torch.int8)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensor(*shape: int, dtype: torch.dtype = torch.uint8, scale: float = 0.1) -> QuantizedTensor:
    x: Any = quantize_per_tensor(torch.randn(shape) * 3, scale, 7, dtype)
    if len(shape) == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[no-any-return]
    return x.contiguous(memory_format=LAST.get(len(shape), torch.contiguous_format))  # type: ignore[no-any-return]


def layer(cls: Any, *args: Any, axis: int = 0, **kwargs: Any) -> nn.Module:
    """A module with a random weight, whose output channels are along `axis`."""
    module = cls(*args, **kwargs)
    shape = module._weight_shape
    count = shape[axis]
    scales = torch.rand(count, dtype=torch.float64) * 0.02 + 0.01
    weight = quantize_per_channel(torch.randn(shape), scales, torch.zeros(count), axis)
    module.set_weight_bias(weight, torch.randn(count))
    module.scale, module.zero_point = 0.21, 11
    return module  # type: ignore[no-any-return]


def functional(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    module = nnq.QFunctional()
    module.scale, module.zero_point = 0.23, 9
    return lambda *tensors: getattr(module, name)(*tensors, *args, **kwargs)


# For each name: the function, and the shapes of its arguments.
CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "conv1d": (layer(nnq.Conv1d, 6, 10, 3, padding=1), ((2, 6, 9),)),
    "conv2d": (layer(nnq.Conv2d, 6, 10, 3, stride=2, padding=(1, 0)), ((2, 6, 9, 8),)),
    "conv2d_1x1": (layer(nnq.Conv2d, 16, 16, 1), ((1, 16, 4, 4),)),
    "conv2d_groups": (layer(nnq.Conv2d, 8, 12, 3, groups=4, dilation=2), ((2, 8, 9, 8),)),
    "conv2d_depthwise": (layer(nnq.Conv2d, 9, 9, 3, groups=9, padding=1), ((2, 9, 7, 8),)),
    "conv2d_no_bias": (layer(nnq.Conv2d, 3, 5, 3, padding="same"), ((2, 3, 7, 8),)),
    "conv3d": (layer(nnq.Conv3d, 4, 6, 2), ((1, 4, 5, 5, 5),)),
    "conv_transpose1d": (
        layer(nnq.ConvTranspose1d, 6, 10, 3, stride=2, output_padding=1, axis=1),
        ((2, 6, 9),),
    ),
    "conv_transpose2d": (
        layer(nnq.ConvTranspose2d, 6, 10, 3, stride=2, padding=1, axis=1),
        ((2, 6, 9, 8),),
    ),
    "conv_transpose3d": (layer(nnq.ConvTranspose3d, 4, 6, 2, axis=1), ((1, 4, 3, 5, 4),)),
    "linear": (layer(nnq.Linear, 12, 7), ((3, 12),)),
    "linear_3d": (layer(nnq.Linear, 12, 7), ((3, 4, 12),)),
    "add": (functional("add"), ((2, 5, 4, 4),) * 2),
    "add_relu": (functional("add_relu"), ((2, 5, 4, 4),) * 2),
    "mul": (functional("mul"), ((2, 5, 4, 4),) * 2),
    "mul_broadcast": (functional("mul"), ((2, 5, 4, 4), (2, 5, 1, 1))),
    "cat": (lambda *x: functional("cat")(x, 1), ((2, 5, 4, 4), (2, 3, 4, 4))),
    "cat_relu": (lambda *x: functional("cat_relu")(x, 2), ((2, 5, 4, 4), (2, 5, 3, 4))),
    "cat_2d": (lambda *x: torch.cat(x), ((2, 5), (3, 5))),
    "sigmoid": (torch.sigmoid, ((2, 5, 4, 4),)),
    "relu": (F.relu, ((2, 5, 4, 4),)),
    "relu_inplace": (nn.ReLU(inplace=True), ((2, 5, 4, 4),)),
    "hardtanh": (lambda x: F.hardtanh(x, -1.5, 0.5), ((2, 5),)),
    "dequantize": (lambda x: x.dequantize(), ((2, 5, 4, 4),)),
    "max_pool1d": (nn.MaxPool1d(2), ((2, 5, 7),)),
    "max_pool2d": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), ((2, 5, 8, 7),)),
    "max_pool2d_unbatched": (nn.MaxPool2d(2), ((5, 8, 7),)),
    "max_pool3d": (nn.MaxPool3d(2), ((1, 5, 4, 5, 6),)),
    "avg_pool2d": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), ((2, 5, 8, 7),)),
    "avg_pool2d_divisor": (nn.AvgPool2d(2, divisor_override=3), ((2, 5, 8, 7),)),
    "avg_pool3d": (nn.AvgPool3d((1, 2, 3)), ((1, 5, 4, 5, 6),)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d((None, 3)), ((2, 5, 8, 7),)),
    "global_avg_pool2d": (nn.AdaptiveAvgPool2d(1), ((2, 5, 8, 7),)),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d(3), ((2, 5, 8),)),
}


@pytest.fixture
def by_ops(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function without the short way."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(fast_calls, "fast_calls", False)
            return function(*args)

    return call


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert found.stride() == expected.stride()
    if isinstance(found, QuantizedTensor):
        assert found.equal(expected)
        assert type(found.q_scale()) is float
        assert type(found.q_zero_point()) is int
    else:
        assert torch.equal(found, expected)


@pytest.mark.skipif(not fast_calls.fast_calls, reason="this torch has no DLPack C exchange API")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_short_calls_give_what_ops_give(
    name: str, dtype: torch.dtype, by_ops: Callable[..., Any]
) -> None:
    function, shapes = CALLS[name]
    given: list[Any] = [
        tensor(*shape, dtype=dtype, scale=0.1 * (i + 1)) for i, shape in enumerate(shapes)
    ]
    plain = [x.contiguous().clone() for x in given]
    for args in (given, plain):  # channels_last, and contiguous
        copies = [x.clone() for x in args]
        assert_equal(function(*args), by_ops(function, *copies))
        for x, y in zip(args, copies, strict=True):
            assert x.equal(y)


@pytest.mark.skipif(not fast_calls.fast_calls, reason="this torch has no DLPack C exchange API")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("real", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 4, 5)])
def test_quantizing_gives_what_the_op_gives(
    shape: tuple[int, ...], real: torch.dtype, dtype: torch.dtype, by_ops: Callable[..., Any]
) -> None:
    module = nnq.Quantize(0.03, 5, dtype)
    x = torch.randn(shape).to(real)
    for each in (
        x,
        x.transpose(0, -1),
        x.contiguous(memory_format=LAST.get(x.dim()) or torch.contiguous_format),
    ):
        assert_equal(module(each), by_ops(module, each))


@pytest.mark.skipif(not fast_calls.fast_calls, reason="this torch has no DLPack C exchange API")
def test_common_layers_take_the_short_way() -> None:
    """So that the comparisons above compare two ways."""
    x, row = tensor(1, 16, 4, 4), tensor(3, 12)
    conv: Any = CALLS["conv2d_1x1"][0]
    linear: Any = CALLS["linear"][0]
    bounds = (-calls.UNBOUNDED, calls.UNBOUNDED)
    buffers = [conv._buffers[name] for name in ("_packed_weight", "weight_scale", "_bias")]
    shape = (conv._weight_shape, conv.stride, conv._padded_by_kernel, conv.dilation, conv.groups)
    assert calls.conv(x, *buffers, *shape, 0.1, 3, *bounds) is not None
    buffers = [linear._buffers[name] for name in ("_packed_weight", "weight_scale", "_bias")]
    assert calls.linear(row, 12, *buffers, 7, 0.1, 3, *bounds) is not None
    table = torch.arange(256, dtype=torch.uint8)
    for made in (
        _C.quantized_add(x, x, 0.1, 3, *bounds),
        _C.quantized_mul(x, x, 0.1, 3, *bounds),
        _C.quantized_cat([x, x], 1, 0.1, 3, *bounds),
        _C.lookup(x, table, 0.1, 3),
        _C.quantized_clamp(x, 0, 9, False),
        _C.quantize(torch.randn(2, 3, 4, 4), 0.1, 3, False),
        _C.dequantize(x),
        _C.quantized_max_pool(x, 2, 2, None, 0, (1,), False),
        _C.quantized_avg_pool(x, 2, [2, 2], [2], (0, 0), False, True, None),
        _C.quantized_adaptive_avg_pool(x, 2, [1, 1]),
    ):
        assert isinstance(made, Tensor)


@pytest.mark.skipif(not fast_calls.fast_calls, reason="this torch has no DLPack C exchange API")
@pytest.mark.parametrize(
    "call",
    [
        lambda x: _C.quantized_add(x, x.int_repr(), 0.1, 3, -1.0, 1.0),
        lambda x: _C.quantized_add(x, x, 0.0, 3, -1.0, 1.0),
        lambda x: _C.quantized_add(x, x[:, 1:], 0.1, 3, -1.0, 1.0),
        lambda x: _C.quantized_add(x, x, "0.1", 3, -1.0, 1.0),
        lambda x: _C.quantized_add(x, x),
        lambda x: _C.lookup(x, torch.zeros(255, dtype=torch.uint8), 0.1, 3),
        lambda x: _C.lookup(x, torch.zeros(256), 0.1, 3),
        lambda x: _C.quantize(x, 0.1, 3, False),
        lambda x: _C.quantize(torch.zeros(0), 0.1, 3, False),
        lambda x: _C.quantize(torch.zeros(3), 0.1, 300, False),
        lambda x: _C.dequantize(x.int_repr()),
        lambda x: _C.quantized_max_pool(x, [9, 9], [1, 1], [0, 0], [1, 1], False),
        lambda x: _C.quantized_max_pool(x, [2], [2], [0], [1], False),
        lambda x: _C.quantized_cat([], 0, 0.1, 3, -1.0, 1.0),
        lambda x: _C.quantized_cat([x, x], 4, 0.1, 3, -1.0, 1.0),
        lambda x: _C.quantized_cat([x, x.dequantize()], 1, 0.1, 3, -1.0, 1.0),
    ],
)
def test_what_is_not_supported_is_left_to_the_op(call: Callable[[Any], Any]) -> None:
    assert call(tensor(2, 3, 4, 4)) is None


def test_what_must_see_an_op_sees_it() -> None:
    x, seen = tensor(1, 16, 4, 4), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        CALLS["conv2d_1x1"][0](x)
    assert "fastquant.quantized_conv.default" in seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CALLS["conv2d_1x1"][0](x)
    assert "fastquant::quantized_conv" in {event.key for event in profile.key_averages()}
