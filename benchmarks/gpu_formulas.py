"""torch.ao's formulas as plain torch operations, for torch.compile: the rival of the sweep.

Tensors come as views in which the channels are one dimension, so that one compiled function serves
tensors of every size. Buffers change in place, as those of modules do.
"""

from __future__ import annotations

import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes_config

BINS = 2048
# After so many, torch.compile does not work here at all.
_MOST_FAILURES = 3
Formula = Callable[..., Any]


@dataclass(frozen=True)
class View:
    """A tensor as the formulas take it.

    Attributes:
        kind: tensors of one kind differ in their sizes alone.
        x: one dimension per tensor; two or three with channels.
        reduced: the dimensions that are none of channels.
        channels: the shape in which one value for each channel spreads over `x`.
    """

    kind: str
    x: Tensor
    reduced: tuple[int, ...]
    channels: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, axis: int | None) -> View:
        """A view of a dense tensor whose channels are first, last or second."""
        # Detached: what is compiled for a view is bound to the strides of its base.
        if axis is None:
            return cls("per tensor", x.reshape(-1).detach(), (0,), ())
        if axis == 0:
            return cls("first", x.flatten(1).detach(), (1,), (-1, 1))
        if axis == x.dim() - 1:
            return cls("last", x.flatten(0, -2).detach(), (0,), (-1,))
        if not x.is_contiguous():  # channels_last: in memory, channels are last
            return cls.of(x.movedim(axis, -1), x.dim() - 1)
        return cls("middle", x.flatten(axis + 1).detach(), (0, 2), (-1, 1))


def observe(x: Tensor, reduced: tuple[int, ...], low: Tensor, high: Tensor) -> None:
    """MinMaxObserver."""
    low.copy_(torch.minimum(low, torch.amin(x, reduced).float()))
    high.copy_(torch.maximum(high, torch.amax(x, reduced).float()))


def histogram(x: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> None:
    """HistogramObserver, of values that its range holds already."""
    low.copy_(torch.minimum(low, torch.amin(x).float()))
    high.copy_(torch.maximum(high, torch.amax(x).float()))
    counts.add_(torch.histc(x.float(), BINS, -8.0, 8.0))


class _StraightThrough(torch.autograd.Function):
    """Fake-quantize with the mask that torch's own op keeps for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int
    ) -> Tensor:
        quantized = torch.round(x.float() * (1.0 / scale)) + zero_point
        ctx.save_for_backward((quantized >= low) & (quantized <= high))
        return ((quantized.clamp(low, high) - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None, None, None, None


def fake_quantize(
    x: Tensor,
    channels: tuple[int, ...],
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    scale, zero_point = scale.reshape(channels), zero_point.reshape(channels)
    y: Tensor = _StraightThrough.apply(x, scale, zero_point, quant_min, quant_max)
    return y


def fused(
    x: Tensor,
    reduced: tuple[int, ...],
    channels: tuple[int, ...],
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """FusedMovingAvgObsFakeQuantize: affine per tensor, symmetric per channel."""
    with torch.no_grad():
        values = x.detach()
        low.add_(0.01 * (torch.amin(values, reduced).float() - low))
        high.add_(0.01 * (torch.amax(values, reduced).float() - high))
        smallest, largest = low.clamp(max=0.0), high.clamp(min=0.0)
        eps = torch.finfo(torch.float32).eps
        if channels:
            span = 2 * torch.maximum(-smallest, largest)
            scale.copy_((span / (quant_max - quant_min)).clamp(min=eps))
            zero_point.zero_()
        else:
            scale.copy_(((largest - smallest) / (quant_max - quant_min)).clamp(min=eps))
            zero = quant_min - torch.round(smallest / scale)
            zero_point.copy_(zero.clamp(quant_min, quant_max))
        # What the gradient is of must not change with the next call.
        now = scale.clone(), zero_point.clone()
    return fake_quantize(x, channels, *now, quant_min, quant_max)


class Compiler:
    """Compiles formulas, each for all sizes, as long as there is time for it."""

    def __init__(self, seconds: float, backend: str = "inductor") -> None:
        self.seconds_left = seconds
        self._backend = backend
        self._failures = 0
        self._made: dict[tuple[Any, ...], Formula | None] = {}

    def get(self, formula: Formula, key: tuple[Any, ...], run: Callable[[Formula], object]) -> Any:
        """A compiled formula; None where it cannot be compiled, or the time is up.

        Args:
            formula: what to compile.
            key: what else is compiled for itself.
            run: does all that shall be compiled, on tensors of a usual size: what is compiled
                gets its number of blocks from the first.
        """
        key = (formula.__name__, *key)
        if key not in self._made:
            self._made[key] = self._compiled(formula, key, run) if self._goes_on() else None
        return self._made[key]

    def _goes_on(self) -> bool:
        return self.seconds_left > 0 and self._failures < _MOST_FAILURES

    def _compiled(
        self, formula: Any, key: tuple[Any, ...], run: Callable[[Formula], object]
    ) -> Formula | None:
        # What is compiled belongs to the code; a copy keeps it apart from what other keys have.
        code = formula.__code__.replace(co_name="_".join(str(word) for word in key))
        copied = types.FunctionType(code, formula.__globals__, code.co_name)
        start = time.monotonic()
        try:
            # Sizes that happen to be equal are not bound to stay so.
            with shapes_config.patch(use_duck_shape=False):
                compiled: Formula = torch.compile(copied, dynamic=True, backend=self._backend)
                run(compiled)
        except Exception:
            traceback.print_exc()
            print(f"torch.compile fails for {key}: there is nothing to compare with", flush=True)
            self._failures += 1
            return None
        finally:
            self.seconds_left -= time.monotonic() - start
        return compiled
