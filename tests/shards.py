"""A model of every kind of observer, and data for several processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastquant as fq
from fastquant import observer as ob


class Model(nn.Module):
    """One observer of each kind that keeps statistics, and a fake-quantizer of each."""

    def __init__(self, bins: int = 64) -> None:
        super().__init__()
        self.minmax = ob.MinMaxObserver()
        self.channels = ob.PerChannelMinMaxObserver(ch_axis=1)
        self.histogram = ob.HistogramObserver(bins=bins)
        self.channel_histogram = ob.PerChannelHistogramObserver(bins=bins, ch_axis=1)
        self.average = ob.MovingAverageMinMaxObserver(averaging_constant=0.25)
        self.channel_average = ob.MovingAveragePerChannelMinMaxObserver(
            averaging_constant=0.25, ch_axis=1
        )
        self.fused = fq.default_fused_act_fake_quant()
        self.fake = fq.FakeQuantize(ob.MinMaxObserver)
        self.fixed = fq.default_fixed_qparams_range_0to1_fake_quant()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            module(x)
        return x


EXACT = ("minmax", "channels", "histogram", "channel_histogram", "fake")


def shards(ranks: int, *, alike: bool) -> list[list[Tensor]]:
    """Two tensors a rank; `alike` gives each the same extremes, first of all."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for rank in range(ranks):
        tensors = [torch.randn(300, 4, generator=generator).clamp(-3, 3) for _ in range(2)]
        if alike:
            tensors[0][0], tensors[0][1] = -3, 3
        else:
            tensors = [t * (1 + rank) + rank for t in tensors]
        result.append(tensors)
    return result


def observe(model: nn.Module, tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for x in tensors:
            model(x)


def one_process(ranks: int, *, alike: bool) -> Model:
    model = Model()
    for tensors in shards(ranks, alike=alike):
        observe(model, tensors)
    return model
