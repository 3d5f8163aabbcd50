"""What modules and functions call: each call takes the cheapest way that nobody can tell."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _C
from .._core.qparams import zero_point_dtype
from .._torch.private import below_autograd, dispatch_modes, is_tracing
from .fast_calls import goes_fast, is_compiling, is_grad_enabled, is_transformed
from .gradients import (
    learnable_with_gradients,
    transformable_fake_quantize,
    transformable_learnable,
    with_straight_through,
)
from .ops import (
    Op,
    choose_qparams,
    fake_quantize,
    fake_quantize_with_mask,
    fused_observe_fake_quantize,
    fused_observe_fake_quantize_with_mask,
    learnable_fake_quantize,
    observe_histogram_,
    observe_minmax_,
    observe_qparams_,
    search_histogram_range,
)


def observe_minmax(*args: Any) -> None:
    """The op `observe_minmax_`."""
    if not (goes_fast() and _C.observe_minmax(*args)):
        observe_minmax_(*args)


def observe_histogram(*args: Any) -> None:
    """The op `observe_histogram_`."""
    if not (goes_fast() and _C.observe_histogram(*args)):
        observe_histogram_(*args)


def histogram_qparams(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    dst_nbins: int,
    *config: int,
) -> tuple[Tensor, Tensor]:
    """The op `choose_qparams` of what the op `search_histogram_range` finds; their arguments."""
    if min_val.is_cpu and goes_fast():
        scale = min_val.new_empty(1)
        zero_point = min_val.new_empty(1, dtype=zero_point_dtype(min_val, config[2]))
        observed = (histogram, min_val, max_val, eps, dst_nbins)
        if _C.histogram_qparams(*observed, *config, scale, zero_point):
            return scale, zero_point
    found = search_histogram_range(histogram, min_val, max_val, dst_nbins)
    qparams: tuple[Tensor, Tensor] = choose_qparams(*found, eps, *config)
    return qparams


def _attached(x: Tensor, made: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The result that was made of x; where it came with a mask, with the gradient of x."""
    if isinstance(made, Tensor):
        return made
    y: Tensor = with_straight_through(x, made)
    return y


def _made_by(op: Op, *args: Any) -> tuple[Tensor, Tensor]:
    """Result and mask, without the gradient that is registered with the op."""
    with below_autograd():
        made: tuple[Tensor, Tensor] = op(*args)
    return made


def may_be_read(x: Tensor) -> bool:
    """Whether Python may read `x`, or a flag beside it, instead of leaving that to an op.

    To read from another device would be to wait for it, what a mode makes out to be a fake tensor
    has no value, and in a graph a value may change from call to call.
    """
    return x.is_cpu and not is_compiling() and not is_tracing() and not dispatch_modes()


def apply_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    enabled: Tensor | None = None,
) -> Tensor:
    """Fake-quantize `x`; the straight-through gradient where one is needed.

    Args as the op `fake_quantize`. Where `enabled` says no on the CPU, `x` itself comes back.
    """
    needs_grad = x.requires_grad and is_grad_enabled()
    settings: tuple[Any, ...] = (scale, zero_point, enabled, ch_axis, quant_min, quant_max)
    y: Tensor
    if goes_fast():
        made = _C.fake_quantize(x, *settings, needs_grad)
        if made is not None:
            return _attached(x, made)
    if enabled is not None and may_be_read(x):
        if not enabled.item():
            return x
        settings = (scale, zero_point, None, ch_axis, quant_min, quant_max)
    if is_compiling():
        y = fake_quantize_with_mask(x, *settings)[0] if needs_grad else fake_quantize(x, *settings)
    elif is_transformed() or (needs_grad and is_tracing()):
        y, _ = transformable_fake_quantize(x, *settings)
    elif needs_grad:
        y = _attached(x, _made_by(fake_quantize_with_mask, x, *settings))
    else:
        y = fake_quantize(x, *settings)
    return y


def apply_fused(
    x: Tensor, observer_enabled: Tensor, fake_quant_enabled: Tensor, *settings: Any
) -> Tensor:
    """Observe and fake-quantize `x`; the straight-through gradient where one is needed.

    Args as the op `fused_observe_fake_quantize`, all of them and in its order. Where
    `fake_quant_enabled` says no on the CPU, `x` itself comes back.
    """
    needs_grad = x.requires_grad and is_grad_enabled()
    args = (x, observer_enabled, fake_quant_enabled, *settings)
    if goes_fast():
        made = _C.observe_fake_quantize(*args, needs_grad)
        if made is not None:
            return _attached(x, made)
    # In two steps while compiling or tracing, since an op that changes its arguments can have no
    # gradient, and under transforms.
    if (needs_grad and (is_compiling() or is_tracing())) or (
        not is_compiling() and is_transformed()
    ):
        observe_qparams_(x, observer_enabled, *settings)
        _, _, scale, zero_point, _, _, ch_axis, _, quant_min, quant_max, *_ = settings
        return apply_fake_quantize(
            x, scale, zero_point, ch_axis, quant_min, quant_max, fake_quant_enabled
        )
    if may_be_read(x) and not fake_quant_enabled.item():
        observe_qparams_(x, observer_enabled, *settings)
        return x
    if needs_grad:
        return _attached(x, _made_by(fused_observe_fake_quantize_with_mask, *args))
    y: Tensor = fused_observe_fake_quantize(*args)
    return y


def apply_learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> Tensor:
    """Fake-quantize `x` with a scale and zero point that have gradients; args as the op's."""
    if is_compiling():
        op = learnable_fake_quantize
    else:
        op = transformable_learnable if is_transformed() else learnable_with_gradients
    y: Tensor = op(x, scale, zero_point, ch_axis, quant_min, quant_max, grad_factor)
    return y
