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
from ..._torch.private import sees_autograd_nodes
from .plain import is_fused_for

__all__ = ["convolve", "layer_called_alone"]

# The methods and functions of torch that a layer with one weight calls, to notice others in their
# place.
_CONVOLUTIONS = {
    nn.Conv1d._conv_forward: ("conv1d", F.conv1d),
    nn.Conv2d._conv_forward: ("conv2d", F.conv2d),
    nn.Conv3d._conv_forward: ("conv3d", F.conv3d),
}
_LINEAR = F.linear
_NARROW = (torch.bfloat16, torch.float16)

# For inputs with fewer elements, an autograd node in Python takes longer than native kernels save.
_FEW_ELEMENTS = 1 << 14


def _dtype_of_layer(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What a layer computes in, its weight's dtype or autocast's; None where it is another."""
    if not is_fused_for(x):
        return None
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return weight.dtype if x.dtype == weight.dtype else None
    dtype = torch.get_autocast_dtype(device)
    casts = weight.dtype == torch.float32 and x.dtype in (torch.float32, *_NARROW)
    return dtype if casts and dtype in _NARROW else None


def _layer_of(module: Any, x: Tensor, weight: Tensor) -> Layer | None:
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
    ):
        return None
    geometry = module.stride, module.padding, module.dilation
    # F.conv2d also takes numbers, one for all dimensions, and the names of paddings.
    if not all(type(value) is tuple and len(value) == x.dim() - 2 for value in geometry):
        return None
    return Convolution(*geometry, module.groups)


def _are_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer of x takes weight and bias, and both are plain tensors."""
    if type(weight) is not Tensor and type(weight) is not Parameter:
        return False
    if bias is None:
        return weight.device == x.device
    return (
        (type(bias) is Tensor or type(bias) is Parameter)
        and weight.device == bias.device == x.device
        and bias.dtype in (weight.dtype, x.dtype)
        and bias.shape == weight.shape[:1]
    )


def _layer_and_dtype(
    module: Any, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Layer, torch.dtype] | tuple[None, None]:
    """What the module does with x and these parameters, and in which dtype, if that is known."""
    dtype = _dtype_of_layer(x, weight) if _are_plain(x, weight, bias) else None
    layer = None if dtype is None else _layer_of(module, x, weight)
    return (None, None) if layer is None or dtype is None else (layer, dtype)


def layer_called_alone(
    module: Any, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Layer, torch.dtype] | tuple[None, None]:
    """What the module does with x and these parameters, and in which dtype.

    None where something could tell it from the module's own way.
    """
    if is_called_alone() and type(x) is Tensor:
        return _layer_and_dtype(module, x, weight, bias)
    return None, None


def _in_graph(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The convolution by an op of native kernels; None where torch is to compute it."""
    if not torch.is_grad_enabled():
        return None
    layer, dtype = _layer_and_dtype(module, x, weight, bias)
    if not isinstance(layer, Convolution) or dtype is None:
        return None
    return layer.in_graph(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def convolve(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `module._conv_forward` returns, computed by the fastest way that nobody can notice."""
    y = None
    if torch.compiler.is_dynamo_compiling():
        y = _in_graph(module, x, weight, bias)
    # Only images have native kernels.
    elif (
        is_called_alone()
        and type(x) is Tensor
        and x.numel() >= _FEW_ELEMENTS
        and isinstance(module, nn.Conv2d)
        and not sees_autograd_nodes(module)
    ):
        layer, dtype = _layer_and_dtype(module, x, weight, bias)
        if (
            isinstance(layer, Convolution)
            and dtype is not None
            and not layer.is_left_to_torch(x, weight, dtype)  # which has an autograd node in C++
        ):
            y = with_weight(layer, x, weight, bias, dtype)
    if y is None:
        y = module._conv_forward(x, weight, bias)
    return y
