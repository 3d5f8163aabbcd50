"""What torch.onnx's exporters get in place of ops that only fastquant defines."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .._core.errors import QuantizationError
from .compiling import constant_in_graphs
from .private import is_exporting, is_tracing


@constant_in_graphs  # Dynamo takes torch's own function to be False in all graphs
def _is_in_onnx_export() -> bool:
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def refuse_onnx_export() -> None:
    """Raise while torch.onnx.export reads a model of native quantized modules.

    It does not know their ops.
    """
    # In this order: in a graph that is not exported, Dynamo must see no more than the first two.
    traced = is_exporting() or (not torch.compiler.is_dynamo_compiling() and is_tracing())
    if traced and _is_in_onnx_export():
        raise QuantizationError(
            "torch.onnx.export does not know the ops of fastquant's quantized modules: call "
            "fastquant.onnx.export, which takes the same arguments"
        )


def traces_for_onnx() -> bool:
    """Whether `torch.onnx.export(dynamo=False)` is tracing a model."""
    return (
        not torch.compiler.is_dynamo_compiling()  # first: Dynamo must not see what follows
        and is_tracing()
        and "torch.onnx" in sys.modules
        and torch.onnx.is_in_onnx_export()
    )


INT16_OPSET = 21
"""The first opset whose QuantizeLinear has int4, uint4, int16 and uint16."""


def integer_limits(dtype: torch.dtype, four_bits: bool) -> tuple[int, int]:
    """The range of the integers that ONNX stores: of dtype, or of its four bits."""
    limits = torch.iinfo(dtype)
    return (limits.min >> 4, limits.max >> 4) if four_bits else (limits.min, limits.max)


def onnx_dtype(
    what: str, quant_min: int, quant_max: int, opset: int | None = None
) -> tuple[torch.dtype, bool]:
    """The dtype of QuantizeLinear that holds [quant_min, quant_max].

    Args:
        what: names the fake-quantizer in errors.
        quant_min: the least integer.
        quant_max: the greatest.
        opset: for which it is exported. None is for what the exporter chooses: four bits are then
            stored in eight, as more runtimes take them.

    Returns:
        The dtype, and whether four bits of it are enough and are to be stored as int4 or uint4.

    Raises:
        QuantizationError: no dtype of the opset does.
    """

    def holds(dtype: torch.dtype, four_bits: bool) -> bool:
        low, high = integer_limits(dtype, four_bits)
        return low <= quant_min <= quant_max <= high

    widths: list[tuple[torch.dtype, bool]] = [(torch.uint8, False), (torch.int8, False)]
    if opset is not None and opset >= INT16_OPSET:
        widths = [(torch.uint8, True), (torch.int8, True), *widths]
    if opset is None or opset >= INT16_OPSET:
        widths += [(torch.uint16, False), (torch.int16, False)]
    for dtype, four_bits in widths:
        if holds(dtype, four_bits):
            return dtype, four_bits
    accepted = "-128 … 127 or 0 … 255"
    if holds(torch.uint16, False) or holds(torch.int16, False):
        raise QuantizationError(
            f"{what} quantizes to {quant_min} … {quant_max}, which ONNX has from opset "
            f"{INT16_OPSET} on, and this export is for opset {opset}: give fastquant.onnx.export "
            f"opset_version={INT16_OPSET}, and not dynamo=False"
        )
    if opset is None or opset >= INT16_OPSET:
        accepted = "-32768 … 32767 or 0 … 65535"
    raise QuantizationError(
        f"{what} quantizes to {quant_min} … {quant_max}; ONNX export takes ranges within {accepted}"
    )


def clamped_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    limits: tuple[int, int],
) -> Tensor:
    """x in fp32, clamped so that it quantizes to no value outside of the quantized range.

    QuantizeLinear saturates at the limits of its dtype. For a narrower range x is clamped first, to
    values that quantize to the ends exactly, so that QuantizeLinear and DequantizeLinear stay the
    pair that runtimes look for.
    """
    x = x.float()
    if limits == (quant_min, quant_max):
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
    # The TorchScript exporter ends with opset 20.
    dtype, _ = onnx_dtype("a fake-quantizer", quant_min, quant_max, 20)
    if zero_point.is_floating_point():
        raise QuantizationError("a fake-quantizer has floating zero points, which ONNX has not")
    scale, zero_point = scale.detach().float(), zero_point.detach().to(torch.int32)
    ends = integer_limits(dtype, False)
    clamped = clamped_to_grid(x, scale, zero_point, ch_axis, quant_min, quant_max, ends)
    if ch_axis is None:
        y = torch.fake_quantize_per_tensor_affine(
            clamped, scale.reshape(()), zero_point.reshape(()), *ends
        )
    else:
        axis = ch_axis % x.dim()
        y = torch.fake_quantize_per_channel_affine(clamped, scale, zero_point, axis, *ends)
    return y.to(x.dtype)
