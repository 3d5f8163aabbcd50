"""What each range method would clip a layer's values to, and the error that this would leave."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch

from .. import functional as F
from .._core.schemes import RangeMethodName
from .grids import Grid
from .result import Clipping
from .sums import decibels


def clippings(state: F.HistogramState, grid: Grid | None) -> tuple[Clipping, ...]:
    """What each method would choose for a grid like this one; nothing for constant values."""
    histogram, ends = state.histogram, (state.min_val, state.max_val)
    if grid is None or grid.ch_axis is not None or not bool(ends[0] < ends[1]):
        return ()
    quant_min, quant_max = grid.chosen_for
    integers: Any = {"quant_min": quant_min, "quant_max": quant_max}
    qscheme = torch.per_tensor_symmetric if grid.symmetric else torch.per_tensor_affine
    signal = _mean_square(state)
    found = []
    method: RangeMethodName
    for method in get_args(RangeMethodName):
        low, high = F.histogram_range(histogram, *ends, method=method, qscheme=qscheme, **integers)
        dtype = torch.int8 if quant_min < 0 else torch.uint8
        scale, zero_point = F.choose_qparams(low, high, dtype=dtype, qscheme=qscheme, **integers)
        noise = float(F.histogram_error(histogram, *ends, scale, zero_point, **integers))
        sqnr = decibels(noise / signal) if signal else math.inf
        found.append(Clipping(method, float(low), float(high), sqnr))
    return tuple(found)


def _mean_square(state: F.HistogramState) -> float:
    """Of the values, taken as spread evenly over their bins."""
    counts, low, high = state.histogram.double(), state.min_val.double(), state.max_val.double()
    width = (high - low) / counts.numel()
    index = torch.arange(counts.numel(), dtype=torch.float64, device=counts.device)
    centres = low + (index + 0.5) * width
    squares = centres.square() + width.square() / 12
    return float((counts * squares).sum() / counts.sum())
