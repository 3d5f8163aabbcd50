"""A small model, prepared in various ways, for the tests of analyses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastquant as fq
from fastquant.analysis import Analysis, analyze
from oracle import quiet


def of(float_model: nn.Module, quantized: nn.Module, data: Any, **options: Any) -> Analysis:
    with quiet():
        return analyze(float_model, quantized, data, progress=False, **options)


class Net(nn.Module):
    """Three convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = fq.QuantStub()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.dequant = fq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(self.quant(x)))
        x = self.conv3(self.relu2(self.conv2(x)))
        return self.dequant(self.fc(x.mean((2, 3))))


QCONFIG = fq.QConfig(fq.HistogramObserver, fq.default_per_channel_weight_observer)


def data(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def float_net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


def prepared_of(
    model: nn.Module, configure: Callable[[Any], object] = lambda model: None
) -> nn.Module:
    """A calibrated copy; `configure` may set configs of layers first."""
    model = copy.deepcopy(model)
    model.qconfig = QCONFIG
    configure(model)
    with quiet():
        prepared = fq.prepare(model)
        fq.calibrate(prepared, data(), progress=False)
    return prepared


def with_bits(bits: int) -> fq.QConfig:
    """Weights and activations of so many bits."""
    half = 2 ** (bits - 1)
    return fq.QConfig(
        fq.MinMaxObserver.with_args(quant_min=0, quant_max=2 * half - 1),
        fq.MinMaxObserver.with_args(
            quant_min=-half, quant_max=half - 1, dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        ),
    )  # fmt: skip
