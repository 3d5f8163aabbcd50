"""The convolution of a QAT layer by native kernels, where nothing could tell it from torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from ..._native.convolution import Convolution
from ..._native.fast_calls import is_called_alone
from ..._native.layers import Layer, Linear, with_weight
from .plain import is_fused_for

__all__ = ["convolve", "dtype_of_layer", "layer_of"]

# The methods and functions of torch that a layer with one weight calls, to notice others in their
# place.
_CONVOLUTIONS = {
    nn.Conv1d._conv_forward: ("conv1d", F.conv1d),
    nn.Conv2d._conv_forward: ("conv2d", F.conv2d),
    nn.Conv3d._conv_forward: ("conv3d", F.conv3d),
}
_LINEAR = F.linear
_NARROW = (torch.bfloat16, torch.float16)


def dtype_of_layer(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What a layer computes in, its weight's dtype or autocast's; None where it is another."""
    if not is_fused_for(x):
        return None
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return weight.dtype if x.dtype == weight.dtype else None
    dtype = torch.get_autocast_dtype(device)
    casts = weight.dtype == torch.float32 and x.dtype in (torch.float32, *_NARROW)
    return dtype if casts and dtype in _NARROW else None


def layer_of(module: Any, x: Tensor, weight: Tensor) -> Layer | None:
    """What the module does with x and its weight; None where this is not known in full."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.dim() != weight.dim():
        return None
    if isinstance(module, nn.Linear):
        return Linear() if F.linear is _LINEAR else None
    name, function = _CONVOLUTIONS.get(type(module)._conv_forward, ("", None))
    if (
        function is None
        or getattr(F, name) is not function
        or "_conv_forward" in module.__dict__
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
    ):
        return None
    return Convolution(module.stride, module.padding, module.dilation, module.groups)


def _are_plain(x: Tensor, *others: Tensor) -> bool:
    """Whether others are plain tensors of the same dtype, all on the device of x."""
    return all(
        (type(t) is Tensor or type(t) is Parameter)
        and t.device == x.device
        and t.dtype == others[0].dtype
        for t in others
    )


def _in_graph(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution by an op of native kernels; None where torch is to compute it."""
    dtype = dtype_of_layer(x, weight) if torch.is_grad_enabled() else None
    layer = None if dtype is None else layer_of(module, x, weight)
    if not isinstance(layer, Convolution):
        return None
    return layer.in_graph(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def convolve(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `module._conv_forward` returns, computed by the fastest way that nobody can notice."""
    y = None
    if torch.compiler.is_dynamo_compiling():
        y = _in_graph(module, x, weight, bias)
    elif is_called_alone() and type(x) is Tensor:
        parameters = (weight,) if bias is None else (weight, bias)
        dtype = dtype_of_layer(x, weight) if _are_plain(x, *parameters) else None
        layer = None if dtype is None else layer_of(module, x, weight)
        if dtype is not None and isinstance(layer, Convolution):
            y = with_weight(layer, x, weight, bias, dtype)
    if y is None:
        y = module._conv_forward(x, weight, bias)
    return y
