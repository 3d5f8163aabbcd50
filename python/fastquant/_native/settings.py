"""What the fused op needs beside x."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class FusedSettings(NamedTuple):
    """The arguments of `fused_observe_fake_quantize` after x, in the order of its schema.

    `csrc/python/fast_calls.cpp` has a struct of the same name, which reads them in this order.
    """

    observer_enabled: Tensor
    fake_quant_enabled: Tensor
    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor
    nonfinite_count: Tensor
    eps: Tensor
    ch_axis: int | None
    averaging_constant: float | None
    quant_min: int
    quant_max: int
    scheme: int
    symmetric_zero_point: int
    nonfinite: int

    def to_observe(self) -> tuple[Any, ...]:
        """The arguments of `observe_qparams_` after x: the first half of the fused op."""
        return (self.observer_enabled, *self[2:])

    def per_tensor(self) -> tuple[Any, ...]:
        """All but ch_axis, for the ops that quantize per tensor only."""
        return (*self[:8], *self[9:])

    @classmethod
    def of_tensor(cls, *args: Any) -> FusedSettings:
        """The inverse of `per_tensor`."""
        return cls._make((*args[:8], None, *args[8:]))

    def to_fake_quantize(self) -> tuple[Any, ...]:
        """The arguments of `fake_quantize` after x: the second half."""
        return (
            self.scale,
            self.zero_point,
            self.fake_quant_enabled,
            self.ch_axis,
            self.quant_min,
            self.quant_max,
        )
