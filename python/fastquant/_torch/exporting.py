"""What torch.onnx's exporters get in place of ops that only fastquant defines."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .._core.errors import QuantizationError
from .private import is_tracing


def traces_for_onnx() -> bool:
    """Whether `torch.onnx.export(dynamo=False)` is tracing a model."""
    return (
        not torch.compiler.is_dynamo_compiling()  # first: Dynamo must not see what follows
        and is_tracing()
        and "torch.onnx" in sys.modules
        and torch.onnx.is_in_onnx_export()
    )


def onnx_dtype(what: str, quant_min: int, quant_max: int) -> torch.dtype:
    """The dtype of QuantizeLinear that holds [quant_min, quant_max].

    Raises:
        QuantizationError: no 8-bit dtype does; `what` names the fake-quantizer.
    """
    for dtype in (torch.uint8, torch.int8):
        limits = torch.iinfo(dtype)
        if limits.min <= quant_min <= quant_max <= limits.max:
            return dtype
    raise QuantizationError(
        f"{what} quantizes to {quant_min} … {quant_max}; ONNX export takes ranges within "
        "-128 … 127 or 0 … 255"
    )


def clamped_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    """x in fp32, clamped so that it quantizes to no value outside of the quantized range.

    QuantizeLinear saturates at the ends of its dtype. For a narrower range x is clamped first, to
    values that quantize to the ends exactly, so that QuantizeLinear and DequantizeLinear stay the
    pair that runtimes look for.
    """
    x = x.float()
    limits = torch.iinfo(dtype)
    if (limits.min, limits.max) == (quant_min, quant_max):
        return x
    zero_point = zero_point.to(torch.int32)
    low, high = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    if ch_axis is not None:
        along = (-1,) + (1,) * (x.dim() - ch_axis % x.dim() - 1)
        low, high = low.reshape(along), high.reshape(along)
    return torch.minimum(torch.maximum(x, low), high)


def traced_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Fake-quantize by ops that the TorchScript exporter translates to QuantizeLinear.

    Raises:
        QuantizationError: ONNX does not have such a range or zero point.
    """
    dtype = onnx_dtype("a fake-quantizer", quant_min, quant_max)
    if zero_point.is_floating_point():
        raise QuantizationError("a fake-quantizer has floating zero points, which ONNX has not")
    scale, zero_point = scale.detach().float(), zero_point.detach().to(torch.int32)
    clamped = clamped_to_grid(x, scale, zero_point, ch_axis, quant_min, quant_max, dtype)
    ends = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if ch_axis is None:
        y = torch.fake_quantize_per_tensor_affine(
            clamped, scale.reshape(()), zero_point.reshape(()), *ends
        )
    else:
        axis = ch_axis % x.dim()
        y = torch.fake_quantize_per_channel_affine(clamped, scale, zero_point, axis, *ends)
    return y.to(x.dtype)
