"""What modules and functions call: every op under its own name, each call by the cheapest way.

A call that nothing has to see goes to `_C` and skips torch's dispatcher. Any other goes to the op:
with the gradient that suits eager mode, torch.func or a compiler.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from .. import _C
from .._core.arguments import nonfinite_refusal
from .._core.qparams import zero_point_dtype
from .._torch.private import below_autograd, dispatch_modes, is_tracing
from . import gradients, ops
from .fake_kernels import empty_mask, empty_norm
from .fast_calls import (
    is_compiling,
    is_grad_enabled,
    is_transformed,
    may_skip_dispatcher,
)
from .gradients import (
    with_straight_through,
    with_straight_through_plain,
    with_straight_through_sum,
    with_straight_through_sum_plain,
)
from .ops import observe_channel_histograms_ as observe_channel_histograms_
from .settings import FusedSettings

_empty_like = torch.empty_like
_UNBOUNDED = (-math.inf, math.inf)


def observe_minmax_(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    ch_axis: int | None,
    averaging_constant: float | None,
    nonfinite: int,
) -> None:
    """The op."""
    if may_skip_dispatcher(x):
        done = _C.observe_minmax_(
            x, min_val, max_val, nonfinite_count, ch_axis, averaging_constant, nonfinite
        )
        if done is True:
            return
        if done:
            raise nonfinite_refusal(x, done)
    statistics = (min_val, max_val, nonfinite_count)
    ops.observe_minmax_(x, *statistics, ch_axis, averaging_constant, nonfinite)


def observe_histogram_(
    x: Tensor,
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    upsample_rate: int,
    nonfinite: int,
    times: int = 1,
) -> None:
    """The op."""
    if may_skip_dispatcher(x):
        done = _C.observe_histogram_(
            x, histogram, min_val, max_val, nonfinite_count, upsample_rate, nonfinite, times
        )
        if done is True:
            return
        if done:
            raise nonfinite_refusal(x, done)
    statistics = (histogram, min_val, max_val, nonfinite_count)
    ops.observe_histogram_(x, *statistics, upsample_rate, nonfinite, times)


def histogram_qparams(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    dst_nbins: int,
    *config: int,
) -> tuple[Tensor, Tensor]:
    """The op `choose_qparams` of what the op `search_histogram_range` finds.

    Args: those of `search_histogram_range`, with `eps` before the last; `config`: those of
    `choose_qparams` after its `eps`.
    """
    if may_skip_dispatcher(min_val) and min_val.is_cpu:
        scale = min_val.new_empty(1)
        zero_point = min_val.new_empty(1, dtype=zero_point_dtype(min_val, config[2]))
        args = (histogram, min_val, max_val, eps, dst_nbins, *config)
        if _C.histogram_qparams(*args, scale, zero_point):
            return scale, zero_point
    found = ops.search_histogram_range(histogram, min_val, max_val, dst_nbins)
    qparams: tuple[Tensor, Tensor] = ops.choose_qparams(*found, eps, *config)
    return qparams


def histogram_range(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, *settings: float
) -> tuple[Tensor, Tensor]:
    """The op, for a histogram on any device: it is small, and the search is for a CPU."""
    device = min_val.device
    found = ops.histogram_range(histogram.cpu(), min_val.cpu(), max_val.cpu(), *settings)
    low, high = found
    return low.to(device), high.to(device)


def least_error_range(x: Tensor, *settings: int | None) -> tuple[Tensor, Tensor]:
    """The op, for a tensor on any device: the search is for a CPU."""
    low, high = ops.least_error_range(x.detach().cpu(), *settings)
    return low.to(x.device), high.to(x.device)


def histogram_error(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """The op, for a histogram on any device."""
    tensors = (t.cpu() for t in (histogram, min_val, max_val, scale, zero_point))
    error: Tensor = ops.histogram_error(*tensors, quant_min, quant_max)
    return error.to(min_val.device)


def _needs_gradient(x: Tensor) -> bool:
    # Of a Proxy, attributes are proxies: what it stands for may need one.
    return x.requires_grad is not False and is_grad_enabled()


def _is_in_graph(x: Tensor) -> bool:
    """Whether a call becomes part of a graph, of a compiler or of torch.fx.symbolic_trace."""
    return is_compiling() or isinstance(x, Proxy)


def _is_recorded() -> bool:
    """Whether torch.jit.trace records the call, so that ops are to be torch's; see `traced`."""
    return is_tracing() and not is_compiling()


def _below_autograd(op: ops.Op, *args: Any) -> tuple[Tensor, Tensor]:
    """What the op returns, without the gradient that is registered with it for compilers."""
    with below_autograd():
        result: tuple[Tensor, Tensor] = op(*args)
    return result


def may_be_read(x: Tensor) -> bool:
    """Whether Python may read `x`, or a flag beside it, instead of leaving that to an op.

    To read from another device would be to wait for it, what a mode makes out to be a fake tensor
    has no value, and in a graph a value may change from call to call.
    """
    return x.is_cpu and not is_compiling() and not is_tracing() and not dispatch_modes()


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """The op, with the straight-through gradient where one is needed.

    Where `enabled` is off on the CPU, `x` itself is returned.
    """
    needs_grad = _needs_gradient(x)
    if may_skip_dispatcher(x, scale, zero_point):
        enabled_now = True if enabled is None else _C.is_on(enabled)
        if enabled_now is False:
            return x
        if enabled_now:
            y, mask = _empty_like(x), empty_mask(x) if needs_grad else None
            if _C.fake_quantize(x, scale, zero_point, ch_axis, quant_min, quant_max, y, mask):
                return y if mask is None else with_straight_through_plain(x, (y, mask))
    in_graph = _is_in_graph(x)
    if enabled is not None and not in_graph and may_be_read(x):
        if not enabled.item():
            return x
        enabled = None
    args = (x, scale, zero_point, enabled, ch_axis, quant_min, quant_max)
    if in_graph:
        y = ops.fake_quantize_with_mask(*args)[0] if needs_grad else ops.fake_quantize(*args)
    elif is_transformed():
        y, _ = gradients.fake_quantize_with_mask(*args)
    elif needs_grad and not _is_recorded():
        y = with_straight_through(x, _below_autograd(ops.fake_quantize_with_mask, *args))
    else:
        y = ops.fake_quantize(*args)
    return y


def fused_observe_fake_quantize(x: Tensor, settings: FusedSettings) -> Tensor:
    """The op, with the straight-through gradient where one is needed.

    Where `fake_quant_enabled` is off on the CPU, `x` itself is returned.
    """
    needs_grad = _needs_gradient(x)
    if may_skip_dispatcher(x):
        quantizes = _C.is_on(settings.fake_quant_enabled)
        if quantizes is not None:
            y = _empty_like(x) if quantizes else None
            mask = empty_mask(x) if quantizes and needs_grad else None
            done = _C.fused_observe_fake_quantize(x, settings, y, mask)
            if done is True:
                if y is None:
                    return x
                return y if mask is None else with_straight_through_plain(x, (y, mask))
            if done:
                raise nonfinite_refusal(x, done)
    # In two steps in graphs, since an op that changes its arguments can have no gradient, and under
    # transforms.
    in_graph = _is_in_graph(x)
    if (needs_grad and in_graph) or (not is_compiling() and is_transformed()):
        ops.observe_qparams_(x, *settings.to_observe())
        return fake_quantize(x, *settings.to_fake_quantize())
    if not in_graph and may_be_read(x) and not settings.fake_quant_enabled.item():
        ops.observe_qparams_(x, *settings.to_observe())
        return x
    if needs_grad and not _is_recorded():
        made = _below_autograd(ops.fused_observe_fake_quantize_with_mask, x, *settings)
        return with_straight_through(x, made)
    result: Tensor = ops.fused_observe_fake_quantize(x, *settings)
    return result


def batch_norm_observe_fake_quantize(
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
    settings: FusedSettings,
) -> Tensor:
    """The ops `observe_batch_norm_` and `batch_norm_fake_quantize`, with gradients where needed.

    `settings.ch_axis` must be None.
    """
    tensors = (x, weight, bias)
    needs_grad = any(map(_needs_gradient, tensors))
    statistics = (running_mean, running_var, training, momentum, bn_eps, low, high)
    clamping = (training, low, high, settings.quant_min, settings.quant_max)
    y: Tensor
    if may_skip_dispatcher(*tensors) and x.dim() > 1:
        y, made = _empty_like(x), empty_norm(x)
        done = _C.batch_norm_observe_fake_quantize(*tensors, *statistics, settings, *made, y)
        if done is True:
            attach = gradients.with_batch_norm_gradients_plain
            return attach(*tensors, (y,), (*made, *clamping)) if needs_grad else y
        if done:
            raise nonfinite_refusal(x, done)
    observing = (*statistics, *settings.per_tensor())
    in_graph = _is_in_graph(x)
    if in_graph or is_transformed():
        made = ops.observe_batch_norm_(*(t.detach() for t in tensors), *observing)
        op = ops.batch_norm_fake_quantize if in_graph else gradients.batch_norm_fake_quantize
        y = op(*tensors, *made, *clamping)
    elif _is_recorded() or not needs_grad:
        made = ops.observe_batch_norm_(*tensors, *observing)
        y = ops.batch_norm_fake_quantize(*tensors, *made, *clamping)
    else:
        with below_autograd():
            made = ops.observe_batch_norm_(*tensors, *observing)
            y = ops.batch_norm_fake_quantize(*tensors, *made, *clamping)
        y = gradients.with_batch_norm_gradients(*tensors, (y,), (*made, *clamping))
    return y


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """x between two bounds, infinite where there is none, with ReLU's and Hardtanh's gradient."""
    if (low, high) == _UNBOUNDED:
        return x
    # Not Hardtanh for both: the gradient of a NaN passes ReLU alone.
    return F.relu(x) if (low, high) == (0.0, math.inf) else F.hardtanh(x, low, high)


def _has_usual_strides(x: Tensor) -> bool:
    """Whether x has the strides of a new contiguous tensor, also where a size of 1 allows any."""
    expected = 1
    for size, stride in zip(reversed(x.size()), reversed(x.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


def _add_as_they_lie(a: Tensor, b: Tensor) -> bool:
    """Whether a, b and torch.add(a, b) have the same shape, dtype and strides."""
    return (
        a.stride() == b.stride()
        and a.size() == b.size()
        and a.dtype == b.dtype
        and a.device == b.device
        and (1 not in a.size() or _has_usual_strides(a))
    )


def add_observe_fake_quantize(
    a: Tensor, b: Tensor, low: float, high: float, settings: FusedSettings
) -> Tensor:
    """The op, with gradients of a and b; for tensors of different shapes or dtypes, its parts.

    `settings.ch_axis` must be None.
    """
    if (
        _is_in_graph(a)
        or _is_in_graph(b)
        or is_transformed()
        or _is_recorded()
        or not _add_as_they_lie(a, b)
        # Nothing is left to do with the sum, nor with its gradient, but to observe it.
        or ((low, high) == _UNBOUNDED and _C.is_on(settings.fake_quant_enabled) is False)
    ):
        return fused_observe_fake_quantize(clamped(a + b, low, high), settings)
    needs_grad = _needs_gradient(a) or _needs_gradient(b)
    if may_skip_dispatcher(a, b):
        y, mask = _empty_like(a), empty_mask(a) if needs_grad else None
        done = _C.add_observe_fake_quantize(a, b, low, high, settings, y, mask)
        if done is True:
            return y if mask is None else with_straight_through_sum_plain(a, b, (y, mask))
        if done:
            raise nonfinite_refusal(a, done)
    of_tensor = settings.per_tensor()
    made = _below_autograd(ops.add_observe_fake_quantize, a, b, low, high, *of_tensor)
    return with_straight_through_sum(a, b, made) if needs_grad else made[0]


def learnable_fake_quantize(x: Tensor, *args: Any) -> Tensor:
    """The op, with gradients of x, scale and zero point."""
    # With its registered gradient while compiling, which alone compilers trace.
    in_graph = is_compiling() or is_tracing()
    op = ops.learnable_fake_quantize if in_graph else gradients.learnable_fake_quantize
    y: Tensor = op(x, *args)
    return y
