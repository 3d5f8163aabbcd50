"""Batch norm, its activation, observing and fake-quantize as one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .basics import (
    _along_channels,
    _check,
    _check_input,
    _compute_dtype,
    _fake_quantized,
    _rows_of_channels,
    _widest_dtype,
    observe_qparams_,
)

# Batch norm has one mean and variance for each index of this axis.
_CHANNELS = 1


def _check_batch_norm_input(x: Tensor, **buffers: Tensor) -> None:
    _check(2 <= x.dim() <= 5, f"x must have 2 to 5 dimensions, got {x.dim()}")
    _check_input(x, _CHANNELS, **buffers)


def _channel_parameters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    bn_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm`, and what the running statistics become."""
    compute, wide = _compute_dtype(x), _widest_dtype(x.device)
    old_mean, old_var = running_mean.to(wide), running_var.to(wide)
    if training and x.numel() > 0:
        values = _rows_of_channels(x, _CHANNELS).to(wide)
        mean, var = values.mean(1), values.var(1, unbiased=False)
        unbiased = var * (values.shape[1] / (values.shape[1] - 1))
        new_mean = (1 - momentum) * old_mean + momentum * mean
        new_var = (1 - momentum) * old_var + momentum * unbiased
    else:
        mean, var, new_mean, new_var = old_mean, old_var, old_mean, old_var
    invstd = (1 / torch.sqrt(var + bn_eps)).to(compute)
    gain = weight.to(compute) * invstd
    return torch.stack([mean.to(compute), invstd, gain, bias.to(compute)]), new_mean, new_var


def activation(x: Tensor, norm: Tensor, low: float, high: float) -> Tensor:
    """The tensor that is quantized, in the dtype it is computed in."""
    mean, _, gain, bias = (_along_channels(row, x, _CHANNELS) for row in norm.unbind())
    return ((x.to(norm.dtype) - mean) * gain + bias).clamp(low, high)


def observe_batch_norm_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    bn_eps: float,
    low: float,
    high: float,
    observer_enabled: Tensor,
    fake_quant_enabled: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    nonfinite_count: Tensor,
    eps: Tensor,
    averaging_constant: float | None,
    *config: int,
) -> tuple[Tensor, Tensor]:
    channels = {"weight": weight, "bias": bias}
    running = {"running_mean": running_mean, "running_var": running_var}
    _check_batch_norm_input(x, **channels, **running)
    _check(not zero_point.is_floating_point(), "zero_point must have an integer dtype")
    few = training and 0 < x.numel() == x.shape[_CHANNELS]
    _check(not few, "batch statistics need more than one value per channel")
    norm, new_mean, new_var = _channel_parameters(
        x, weight, bias, running_mean, running_var, training, momentum, bn_eps
    )
    buffers = (min_val, max_val, scale, zero_point, nonfinite_count)
    # The last step that may refuse x, before anything has changed.
    observe_qparams_(
        activation(x, norm, low, high),
        observer_enabled,
        *buffers,
        eps,
        None,
        averaging_constant,
        *config,
    )
    running_mean.copy_(new_mean)
    running_var.copy_(new_var)
    enabled = fake_quant_enabled.reshape(()) != 0
    wide = _widest_dtype(x.device)
    quantizer = [t.reshape(()).to(wide) for t in (scale, zero_point, enabled)]
    return norm, torch.stack(quantizer)


def quantized(
    x: Tensor, norm: Tensor, quantizer: Tensor, low: float, high: float, *quant_range: int
) -> tuple[Tensor, Tensor]:
    """The result in the dtype it is computed in, and which elements gradients pass through."""
    _check_batch_norm_input(x)
    _check(norm.shape == (4, x.shape[_CHANNELS]), "norm must have four values per channel")
    scale, zero_point, enabled = quantizer.unbind()
    values = activation(x, norm, low, high)
    scale, zero_point = scale.to(norm.dtype), zero_point.to(torch.int64)
    y, passes = _fake_quantized(values, scale, zero_point, enabled, None, *quant_range)
    # As torch's ReLU and Hardtanh: not at the bounds, and where a value is NaN. Infinite bounds
    # clamp nothing.
    if low > -math.inf:
        passes = passes & ~(values <= low)
    if high < math.inf:
        passes = passes & ~(values >= high)
    return y, passes


def batch_norm_fake_quantize(
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
    y, _ = quantized(x, norm, quantizer, low, high, *quant_range)
    return torch.empty_like(x).copy_(y)


def gradients(
    grad: Tensor,
    passes: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    gain: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias: https://arxiv.org/abs/1502.03167, section 3.

    mean, invstd and gain have one value per channel, in the dtype that the gradients get, too.
    Everything is differentiable.
    """
    shape = [-1 if d == _CHANNELS else 1 for d in range(x.dim())]
    others = [d for d in range(x.dim()) if d != _CHANNELS]
    wide = _widest_dtype(x.device)
    centred = x.to(mean.dtype) - mean.reshape(shape)
    passed = torch.where(passes, grad.to(mean.dtype), 0.0)
    of_bias = passed.to(wide).sum(others)
    of_gain = (passed * centred).to(wide).sum(others)
    of_x = passed
    if training:
        count = max(x.numel() // max(x.shape[_CHANNELS], 1), 1)
        offset = (of_bias / count).to(mean.dtype)
        slope = (of_gain * invstd * invstd / count).to(mean.dtype)
        of_x = (passed - offset.reshape(shape)) - centred * slope.reshape(shape)
    of_x = gain.reshape(shape) * of_x
    return of_x, (of_gain * invstd).to(mean.dtype), of_bias.to(mean.dtype)


def differentiable_gradients(
    grad: Tensor,
    passes: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as functions of grad, x and weight, for gradients of gradients.

    In training, x also determines the mean and variance that it was normalized by.
    """
    mean, invstd, _, _ = norm.unbind()
    if training:
        others = [d for d in range(x.dim()) if d != _CHANNELS]
        values = x.to(norm.dtype)
        var, mean = torch.var_mean(values, others, correction=0)
        # Of the value that the forward pass used, to which it had added an epsilon.
        invstd = (var - var.detach() + invstd**-2) ** -0.5
    return gradients(grad, passes, x, mean, invstd, weight.to(norm.dtype) * invstd, training)


def batch_norm_fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    norm: Tensor,
    quantizer: Tensor,
    training: bool,
    low: float,
    high: float,
    *quant_range: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _, passes = quantized(x, norm, quantizer, low, high, *quant_range)
    mean, invstd, gain, _ = norm.unbind()
    of_x, of_weight, of_bias = gradients(grad, passes, x, mean, invstd, gain, training)
    return torch.empty_like(x).copy_(of_x), of_weight, of_bias
