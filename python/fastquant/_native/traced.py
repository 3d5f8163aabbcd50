"""What torch.jit.trace records of the ops: torch's own, so that a saved trace needs no fastquant.

While it traces, torch's dispatcher calls these functions in the place of the kernels, before
autograd, and records the torch ops that they call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch.exporting import traced_fake_quantize, traces_for_onnx
from .._torch.private import learnable_per_channel, learnable_per_tensor
from .ops import Op
from .reference import basics, batch_norm
from .settings import FusedSettings


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """The ops that torch.ao's fake-quantizers call, which autograd and exporters know."""
    if traces_for_onnx():
        if enabled is not None and not enabled:
            return x
        return traced_fake_quantize(x, scale, zero_point, ch_axis, quant_min, quant_max)
    scale = scale.to(torch.float32)
    if not zero_point.is_floating_point():
        zero_point = zero_point.to(torch.int32)
    if ch_axis is None:
        y = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)
    else:
        axis = ch_axis % x.dim()
        y = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)
    return y if enabled is None else torch.where(enabled != 0, y, x)


def _fused_observe_fake_quantize(x: Tensor, *args: Any) -> Tensor:
    settings = FusedSettings(*args)
    # A trace reads flags when it runs; an ONNX model has them as they are now.
    _observing(basics.observe_qparams_)(x, *settings.to_observe())
    return _fake_quantize(x, *settings.to_fake_quantize())


def _batch_norm_fake_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Tensor,
    quantizer: Tensor,
    training: bool,
    low: float,
    high: float,
    *quant_range: int,
) -> Tensor:
    """The gradients of a trace take mean and variance for constants."""
    y = batch_norm.activation(x, norm, low, high).to(x.dtype)
    scale, zero_point, enabled = quantizer.unbind()
    return _fake_quantize(y, scale, zero_point.to(torch.int32), enabled, None, *quant_range)


def _learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> Tensor:
    if traces_for_onnx():
        whole = zero_point.detach().round().clamp(quant_min, quant_max).int()
        return traced_fake_quantize(x, scale, whole, ch_axis, quant_min, quant_max)
    axis = () if ch_axis is None else (ch_axis % x.dim(),)
    learnable = learnable_per_channel if axis else learnable_per_tensor
    y: Tensor = learnable(x, scale, zero_point, *axis, quant_min, quant_max, grad_factor)
    return y


def _observing(op: Op) -> Op:
    """An op of the reference that changes statistics, which an ONNX model does not have."""

    def observe(*args: Any) -> None:
        if not traces_for_onnx():
            with torch.no_grad():
                op(*args)

    return observe


_RECORDED: dict[str, Op] = {
    "observe_minmax_": _observing(basics.observe_minmax_),
    "observe_histogram_": _observing(basics.observe_histogram_),
    "observe_qparams_": _observing(basics.observe_qparams_),
    "search_histogram_range": basics.search_histogram_range,
    "choose_qparams": basics.choose_qparams,
    "fake_quantize": _fake_quantize,
    "fused_observe_fake_quantize": _fused_observe_fake_quantize,
    "observe_batch_norm_": torch.no_grad()(batch_norm.observe_batch_norm_),
    "batch_norm_fake_quantize": _batch_norm_fake_quantize,
    "learnable_fake_quantize": _learnable_fake_quantize,
}
_library: Any = torch.library.Library("fastquant", "IMPL")  # type: ignore[no-untyped-call]
for _name, _op in _RECORDED.items():
    _library.impl(_name, _op, "Tracer")
