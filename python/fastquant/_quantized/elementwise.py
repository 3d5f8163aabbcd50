"""Activation functions of quantized tensors.

Those whose results have a range of their own (sigmoid, tanh, hardsigmoid) give them the scale and
zero point of torch's quantized tensors. The others keep those of their input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import ops
from . import calls
from .rearranging import level
from .tables import applied
from .tensor import (
    QuantizedTensor,
    functions_named,
    handles,
    integers_of,
    is_quantized,
    like,
    not_supported,
)


@handles(Tensor.dequantize, torch.dequantize, plain_first=True)
def _dequantize(input: Any = None, *, tensors: Any = None) -> Any:
    if tensors is not None or isinstance(input, (list, tuple)):
        return tuple(x.dequantize() for x in (input if tensors is None else tensors))
    return calls.dequantize(input)


# --- bounds ---------------------------------------------------------------------------------


def _clamped(
    input: QuantizedTensor, low: float | None, high: float | None, inplace: bool = False
) -> QuantizedTensor:
    info = torch.iinfo(input.dtype)
    lowest = info.min if low is None else level(input, low)
    highest = info.max if high is None else level(input, high)
    return calls.clamp(input, lowest, highest, inplace)


@handles(*functions_named("relu"))
def _relu(input: QuantizedTensor, inplace: bool = False) -> QuantizedTensor:
    return calls.clamp(input, input._zero_point, 255, inplace)


@handles(*functions_named("relu_"))
def _relu_(input: QuantizedTensor) -> QuantizedTensor:
    return calls.clamp(input, input._zero_point, 255, True)


@handles(F.relu6)
def _relu6(input: QuantizedTensor, inplace: bool = False) -> QuantizedTensor:
    return _clamped(input, 0.0, 6.0, inplace)


@handles(F.hardtanh)
def _hardtanh(
    input: QuantizedTensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> QuantizedTensor:
    return _clamped(input, min_val, max_val, inplace)


@handles(F.hardtanh_)
def _hardtanh_(
    input: QuantizedTensor, min_val: float = -1.0, max_val: float = 1.0
) -> QuantizedTensor:
    return _clamped(input, min_val, max_val, inplace=True)


@handles(*functions_named("clamp"), *functions_named("clip"))
def _clamp(input: QuantizedTensor, min: Any = None, max: Any = None) -> QuantizedTensor:
    return _clamped(input, min, max)


@handles(*functions_named("clamp_"), *functions_named("clip_"))
def _clamp_(input: QuantizedTensor, min: Any = None, max: Any = None) -> QuantizedTensor:
    return _clamped(input, min, max, inplace=True)


@handles(*functions_named("clamp_min"))
def _clamp_min(input: QuantizedTensor, min: Any) -> QuantizedTensor:
    return _clamped(input, min, None)


@handles(*functions_named("clamp_max"))
def _clamp_max(input: QuantizedTensor, max: Any) -> QuantizedTensor:
    return _clamped(input, None, max)


# --- any function of one element ------------------------------------------------------------

# Scale and zero point (for uint8) of results between 0 and 1, and between -1 and 1.
_FROM_0_TO_1 = (1 / 256, 0)
_FROM_MINUS_1_TO_1 = (1 / 128, 128)


def _with_range(function: str, x: QuantizedTensor, qparams: tuple[float, int]) -> QuantizedTensor:
    scale, zero_point = qparams
    return applied(function, x, scale, zero_point, zero_point_of_int8=zero_point - 128)


def _with_own_scale(
    function: str, x: QuantizedTensor, *constants: Any, inplace: bool = False
) -> QuantizedTensor:
    y = applied(function, x, x._scale, x._zero_point, *constants)
    return _assigned(x, y) if inplace else y


def _assigned(x: QuantizedTensor, y: QuantizedTensor) -> QuantizedTensor:
    """x, made into y."""
    integers_of(x).copy_(integers_of(y))
    x._scale, x._zero_point = y._scale, y._zero_point
    return x


@handles(*functions_named("sigmoid"), torch.special.expit)
def _sigmoid(input: QuantizedTensor) -> QuantizedTensor:
    return _with_range("sigmoid", input, _FROM_0_TO_1)


@handles(*functions_named("tanh"))
def _tanh(input: QuantizedTensor) -> QuantizedTensor:
    return _with_range("tanh", input, _FROM_MINUS_1_TO_1)


@handles(F.hardsigmoid)
def _hardsigmoid(input: QuantizedTensor, inplace: bool = False) -> QuantizedTensor:
    y = _with_range("hardsigmoid", input, _FROM_0_TO_1)
    return _assigned(input, y) if inplace else y


@handles(F.leaky_relu)
def _leaky_relu(
    input: QuantizedTensor, negative_slope: float = 0.01, inplace: bool = False
) -> QuantizedTensor:
    return _with_own_scale("leaky_relu", input, negative_slope, inplace=inplace)


@handles(F.leaky_relu_)
def _leaky_relu_(input: QuantizedTensor, negative_slope: float = 0.01) -> QuantizedTensor:
    return _leaky_relu(input, negative_slope, inplace=True)


@handles(F.gelu)
def _gelu(input: QuantizedTensor, *, approximate: str = "none") -> QuantizedTensor:
    return _with_own_scale("gelu", input, approximate)


@handles(F.silu)
def _silu(input: QuantizedTensor, inplace: bool = False) -> QuantizedTensor:
    # Between 0 and the input, so whatever range this has is wide enough.
    return _with_own_scale("silu", input, inplace=inplace)


@handles(F.threshold, torch.threshold)
def _threshold(
    input: QuantizedTensor, threshold: float, value: float, inplace: bool = False
) -> QuantizedTensor:
    return _with_own_scale("threshold", input, threshold, value, inplace=inplace)


@handles(*functions_named("prelu"))
def _prelu(input: QuantizedTensor, weight: Any) -> QuantizedTensor:
    weight = weight.dequantize() if is_quantized(weight) else weight
    if not is_quantized(input):
        raise not_supported(F.prelu, " as weights of ordinary ones")
    if weight.numel() == 1:
        return _with_own_scale("leaky_relu", input, float(weight))
    y = F.prelu(input.dequantize(), weight)
    values = ops.quantize(y, input._scale, input._zero_point, input.dtype, False)
    return like(input, values)
