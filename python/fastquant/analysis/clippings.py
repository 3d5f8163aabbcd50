"""What each range method would clip a layer's values to, and the error that this would leave."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import functional as F
from .grids import Grid
from .result import Clipping
from .sums import decibels

# Each bin of the histogram is taken as this many values, evenly spread.
_PER_BIN = 4


def clippings(state: F.HistogramState, grid: Grid | None) -> tuple[Clipping, ...]:
    """What each method would choose for a grid of as many levels as this one."""
    counts, low, high = state.histogram.double(), state.min_val.double(), state.max_val.double()
    if grid is None or grid.ch_axis is not None or not bool(low < high):
        return ()
    levels = grid.searched or grid.levels
    ranges = {
        "minmax": (low, high),
        "l2": F.histogram_range(state.histogram, state.min_val, state.max_val, levels=levels),
    }
    edges = torch.linspace(0, 1, counts.numel() * _PER_BIN + 1, dtype=torch.float64)[:-1]
    points = low + (edges + edges[1] / 2) * (high - low)
    weights = (counts / _PER_BIN).repeat_interleave(_PER_BIN)
    return tuple(
        Clipping(method, float(a), float(b), _sqnr(points, weights, a, b, levels))
        for method, (a, b) in ranges.items()
    )


def _sqnr(points: Tensor, weights: Tensor, low: Tensor, high: Tensor, levels: int) -> float:
    """Of values that are quantized to a range."""
    scale, zero_point = F.choose_qparams(
        low.reshape(1).float(), high.reshape(1).float(), quant_min=0, quant_max=levels - 1
    )
    quantized = Grid(scale, zero_point, 0, levels - 1).quantized(points.float())
    noise = float((weights * (points - quantized).square()).sum())
    signal = float((weights * points.square()).sum())
    return decibels(noise / signal) if signal else math.inf
