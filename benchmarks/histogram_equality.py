"""How often histograms and scales are torch.ao's bit for bit, on streams of tensors and on models.

    python benchmarks/histogram_equality.py [resnet18 mobilenet_v2 ...]

Models are torchvision's quantizable ones, with weights and images from a random generator. Counts
differ where torch.ao's sums of resampled counts, in fp32, are inexact; fastquant's are exact.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.ao.quantization as ao
from torch import nn

import fastquant as fq
from fastquant import bench

MODELS = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "shufflenet_v2_x1_0",
    "googlenet",
    "inception_v3",
    "resnet50",
)
BATCHES, IMAGES = 3, 8
STREAMS = 200


@dataclass
class Pair:
    """Observers of the same tensors."""

    theirs: Any
    ours: Any


def streams() -> Iterator[Pair]:
    """Three tensors each, of growing range."""
    for _ in range(STREAMS):
        pair = Pair(ao.HistogramObserver(), fq.HistogramObserver())
        for k in range(3):
            x = torch.randn(2000) * (1 + 0.3 * k) + torch.rand(()) - 0.5
            pair.theirs(x)
            pair.ours(x)
        yield pair


def quantizable(name: str) -> nn.Module:
    """A fused float model whose activations have the ranges that training leaves."""
    model: Any = bench.torchvision_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    model.fuse_model()
    return model  # type: ignore[no-any-return]


def prepared(ns: ModuleType, model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.qconfig = ns.get_default_qconfig("x86")  # type: ignore[assignment]
    return ns.prepare(model, inplace=True)  # type: ignore[no-any-return]


def observed(name: str) -> tuple[list[Pair], Callable[[], float]]:
    """Observers of a calibrated model, and how far its converted outputs are from torch.ao's."""
    model = quantizable(name)
    size = 299 if name.startswith("inception") else 224
    images = [torch.randn(IMAGES, 3, size, size) for _ in range(BATCHES)]
    theirs, ours = prepared(ao, model), prepared(fq, model)
    for batch in images:
        theirs(batch)
        ours(batch)
    named = dict(ours.named_modules())
    pairs = [
        Pair(module, named[path])
        for path, module in theirs.named_modules()
        if type(module) is ao.HistogramObserver
    ]

    def distance() -> float:
        expected, got = (ns.convert(model)(images[0]) for ns, model in ((ao, theirs), (fq, ours)))
        return float((got - expected).abs().max() / expected.abs().max())

    return pairs, distance


def qparams(observer: Any) -> list[float]:
    return [float(t) for t in observer.calculate_qparams()]


def report(name: str, pairs: list[Pair], distance: Callable[[], float] | None) -> None:
    counts = [torch.equal(p.theirs.histogram, p.ours.histogram) for p in pairs]
    scales = [qparams(p.theirs) == qparams(p.ours) for p in pairs]
    away = "" if distance is None else f"{distance():.1e}"
    columns = (len(pairs), counts.count(False), scales.count(False), away)
    print(f"{name:20}" + "".join(f"{column!s:>12}" for column in columns), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    titles = ("histograms", "counts off", "scales off", "outputs off")
    print(" " * 20 + "".join(f"{title:>12}" for title in titles))
    with torch.no_grad():
        report("streams", list(streams()), None)
        for name in sys.argv[1:] or MODELS:
            report(name, *observed(name))


if __name__ == "__main__":
    main()
