"""The values that a quantized tensor can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .._core.dtypes import RANGES, is_torch_quantized
from ..utils import is_per_channel, observes_no_range


@dataclass(frozen=True)
class Grid:
    """Equally spaced values: `(q - zero_point) * scale` for integers q.

    Attributes:
        scale: one element, or one per channel.
        zero_point: likewise; floating where the scheme has floating zero points.
        quant_min: smallest q.
        quant_max: largest q.
        ch_axis: channel axis; None per tensor.
        chosen_for: the smallest and largest q that the range was chosen for. With `reduce_range`
            these are half of the levels that the converted layer then has.
        symmetric: whether the range was to be symmetric.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    ch_axis: int | None = None
    chosen_for: tuple[int, int] = (0, 0)
    symmetric: bool = False

    @property
    def levels(self) -> int:
        """How many values there are for each element."""
        return self.quant_max - self.quant_min + 1

    @property
    def bits(self) -> int:
        """Bits that the integers need."""
        return (self.levels - 1).bit_length()

    @property
    def counts(self) -> bool:
        """Whether the integers are few enough, and of one ordinary scale, to be counted."""
        is_single = self.ch_axis is None and not self.zero_point.is_floating_point()
        normal = torch.finfo(torch.float32).tiny
        return is_single and self.levels <= 1 << 16 and bool(self.scale.float().abs() >= normal)

    @property
    def fills_a_byte(self) -> bool:
        """Whether int8 kernels have these integers, no fewer and no more."""
        return (self.quant_min, self.quant_max) in ((0, 255), (-128, 127), (-127, 127))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value, one element or one per channel."""
        scale, zero_point = self.scale.double(), self.zero_point.double()
        return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale

    def _shaped(self, x: Tensor, values: Tensor) -> Tensor:
        """One value per channel, to be combined with x."""
        if self.ch_axis is None:
            return values.reshape(())
        shape = [1] * x.dim()
        shape[self.ch_axis] = -1
        return values.reshape(shape)

    def integers(self, x: Tensor) -> Tensor:
        """The integers of x's elements, as floating numbers; beyond both ends where x is."""
        scale = self._shaped(x, self.scale.float())
        return (x.float() / scale + self._shaped(x, self.zero_point.float())).round()

    def quantized(self, x: Tensor) -> Tensor:
        """The value for each element of x that it is stored as."""
        if not self.zero_point.is_floating_point():
            return F.fake_quantize(
                x,
                self.scale.to(x.device),
                self.zero_point.to(x.device),
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                ch_axis=self.ch_axis,
            )
        integers = self.integers(x).clamp(self.quant_min, self.quant_max)
        zero_point = self._shaped(x, self.zero_point.float())
        return ((integers - zero_point) * self._shaped(x, self.scale.float())).to(x.dtype)


def grid_of(observer: Any) -> Grid | None:
    """What an observer or fake-quantizer quantizes to; None where that is no grid of integers."""
    inner = getattr(observer, "activation_post_process", observer)
    dtype = getattr(observer, "dtype", None)
    if (
        observes_no_range(observer)
        or not isinstance(dtype, torch.dtype)
        or dtype.is_floating_point
        or not hasattr(observer, "quant_min")
    ):
        return None
    scale, zero_point = observer.calculate_qparams()
    quant_min, quant_max = int(observer.quant_min), int(observer.quant_max)
    chosen_for = (quant_min, quant_max)
    # Seven bits are chosen for the sake of kernels whose sums could saturate (reduce_range).
    # Converted layers then use the eighth for values beyond the range.
    if (quant_min, quant_max) in ((0, 127), (-64, 63)) and dtype in RANGES:
        quant_min, quant_max = RANGES[dtype]
    qscheme = getattr(observer, "qscheme", torch.per_tensor_affine)
    axis = getattr(inner, "ch_axis", 0) if is_per_channel(qscheme) else None
    symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    integers = (quant_min, quant_max)
    return Grid(scale.detach(), zero_point.detach(), *integers, axis, chosen_for, symmetric)


def grid_of_tensor(x: Tensor) -> Grid | None:
    """What a quantized tensor is stored as; None for a tensor that is not quantized."""
    if not is_torch_quantized(x):
        return None
    low, high = RANGES.get(x.dtype, (-128, 127))
    if is_per_channel(x.qscheme()):
        scales, zero_points = x.q_per_channel_scales(), x.q_per_channel_zero_points()
        return Grid(scales, zero_points, low, high, x.q_per_channel_axis(), (low, high))
    scale, zero_point = torch.tensor([x.q_scale()]), torch.tensor([x.q_zero_point()])
    return Grid(scale, zero_point, low, high, None, (low, high))


def output_grid(scale: Any, zero_point: Any, dtype: torch.dtype) -> Grid:
    """The grid of a converted layer's output."""
    low, high = RANGES[dtype]
    return Grid(
        torch.as_tensor(scale).detach().reshape(1).float(),
        torch.as_tensor(zero_point).detach().reshape(1).long(),
        *(low, high, None, (low, high)),
    )
