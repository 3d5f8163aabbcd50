"""What an observed module says about its quantized form: layer, weight, integers, qparams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..._core.dtypes import INT8, UINT8
from ..._core.errors import QuantizationError
from ..._native.ops import quantize, quantize_per_channel
from ..._torch.overrides import Written
from ..._torch.private import is_called_plainly
from ...fake_quantize import FakeQuantize
from ..intrinsic import _FusedModule
from ..intrinsic.qat import FOLDING

INTEGERS = {**dict.fromkeys(UINT8, torch.uint8), **dict.fromkeys(INT8, torch.int8)}
"""The dtype of a tensor's integers, by the dtype that its observer is for."""


class NoNativeFormError(QuantizationError):
    """A layer that no quantized module here can stand for; `convert` keeps it floating."""


def layer_of(module: Any) -> Any:
    """What has the weight: a fused module's first part, or the module itself."""
    is_trained = "weight_fake_quant" in module._modules
    return module[0] if isinstance(module, _FusedModule) and not is_trained else module


def folded(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, with the batch norm of a training module folded in."""
    layer = layer_of(module)
    if not isinstance(module, FOLDING):
        return layer.weight, layer.bias
    bn = module.bn
    is_linear = isinstance(module, nn.Linear)
    fold: Any = fuse_linear_bn_weights if is_linear else fuse_conv_bn_weights
    with torch.no_grad():
        return fold(  # type: ignore[no-any-return]
            *(module.weight, module.bias, bn.running_mean, bn.running_var),
            *(bn.eps, bn.weight, bn.bias),
        )


# As FakeQuantize has it when fastquant is imported.
_forward = Written(FakeQuantize, "forward")


def observe(observer: Any, weight: Tensor) -> None:
    """Have a weight observed; a fake-quantizer of ours need not fake-quantize it, too."""
    if not is_called_plainly(observer) or _forward.is_replaced(observer):
        observer(weight)
        return
    flag = observer.fake_quant_enabled
    before = flag.clone()
    flag.zero_()
    try:
        observer(weight)
    finally:
        flag.copy_(before)


def weight_observer(module: Any, weight: Tensor, use_precomputed_fake_quant: bool) -> Any:
    """The observer of a module's weight, which has seen the weight."""
    observer = getattr(module, "weight_fake_quant", None)
    if observer is None:
        # AdaRound leaves a layer the fake-quantizer that it has optimized.
        layer = layer_of(module)
        observer = getattr(layer, "weight_fake_quant", None)
        if observer is None:
            observer = layer.qconfig.weight()
    # As in torch.ao, which observes the weights of convolutions in any case.
    if not (use_precomputed_fake_quant and isinstance(layer_of(module), nn.Linear)):
        observe(observer, weight)
    return observer


def limits_of(observer: Any) -> tuple[int, int]:
    """The least and the largest integer of an observed weight, within int8."""
    # A fake-quantizer has its range from its observer.
    limits = getattr(observer, "activation_post_process", observer)
    return max(getattr(limits, "quant_min", -128), -128), min(
        getattr(limits, "quant_max", 127), 127
    )


def symmetric_integers(weight: Tensor, observer: Any, axis: int) -> tuple[Tensor, Tensor]:
    """An observed weight's int8 values, and its fp32 scales: one, or one for each output channel.

    Args:
        weight: floating.
        observer: has seen it.
        axis: of the output channels.

    Raises:
        NoNativeFormError: the observer's parameters are not those of a symmetric int8 weight.
    """
    if INTEGERS.get(observer.dtype) is not torch.int8:
        raise NoNativeFormError(f"the observer of its weight is for {observer.dtype}, and not int8")
    scales, zero_points = observer.calculate_qparams()
    if zero_points.any():
        raise NoNativeFormError(
            f"the zero points of its weight are not 0, as {observer.qscheme} may choose them"
        )
    low, high = limits_of(observer)
    weight = weight.detach().float().contiguous()
    if observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine):
        if observer.ch_axis % weight.dim() != axis:
            raise NoNativeFormError(
                f"its weight has scales along axis {observer.ch_axis}, and output channels "
                f"along axis {axis}"
            )
        scales = scales.to(torch.float32)
        return quantize_per_channel(weight, scales, axis, low, high), scales
    values: Tensor = quantize(weight, float(scales), 0, torch.int8, False)
    return values.clamp_(low, high), scales.reshape(1).to(torch.float32)


def output_qparams(module: Any) -> tuple[float, int]:
    """The scale and zero point that a module's observer has chosen for its output.

    Raises:
        NoNativeFormError: the module has no observer, or one of a dtype other than 8 bits.
    """
    return qparams_and_dtype(module)[:2]


def qparams_and_dtype(module: Any) -> tuple[float, int, torch.dtype]:
    """`output_qparams`, and torch.uint8 or torch.int8."""
    observer = getattr(module, "activation_post_process", None)
    dtype = INTEGERS.get(getattr(observer, "dtype", None))  # type: ignore[arg-type]
    if dtype is None:
        raise NoNativeFormError(
            "its output has no observer"
            if observer is None
            else f"the observer of its output is for {getattr(observer, 'dtype', None)}, and "
            "native activations are uint8 or int8"
        )
    scale, zero_point = observer.calculate_qparams()  # type: ignore[union-attr]
    if scale.numel() != 1:
        raise NoNativeFormError(
            "its output has a scale for each channel, native activations have one"
        )
    return float(scale), int(zero_point), dtype
