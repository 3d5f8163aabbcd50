"""How often histograms and scales are torch.ao's bit for bit, on streams of tensors and on models.

    python benchmarks/histogram_equality.py [resnet18 mobilenet_v2 ...]

Models are torchvision's quantizable ones, with weights and images from a random generator. The
last two columns say how often torch.ao's own scales of the same histograms would be others on
processors with other vectors: its sums are rounded to fp32 in an order that depends on these.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
# Values of ATEN_CPU_CAPABILITY.
OTHER_VECTORS = ("avx2", "default")


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


def scales_on(vectors: str, pairs: list[Pair]) -> list[list[float]]:
    """What torch.ao makes of these histograms where torch uses other vectors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "observers.pt"
        torch.save([pair.theirs for pair in pairs], file)
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": vectors}
        command = [sys.executable, __file__, "--scales", str(file)]
        subprocess.run(command, check=True, env=environment)
        found: list[list[float]] = torch.load(file)
    return found


def write_scales(file: str) -> None:
    observers = torch.load(file, weights_only=False)
    torch.save([qparams(observer) for observer in observers], file)


def report(name: str, pairs: list[Pair], distance: Callable[[], float] | None) -> None:
    same_counts = [torch.equal(p.theirs.histogram, p.ours.histogram) for p in pairs]
    theirs, ours = [qparams(p.theirs) for p in pairs], [qparams(p.ours) for p in pairs]
    same_scales = [a == b for a, b in zip(theirs, ours, strict=True)]
    itself = [
        sum(a != b for a, b in zip(theirs, scales_on(vectors, pairs), strict=True))
        for vectors in OTHER_VECTORS
    ]
    by_search = sum(c and not s for c, s in zip(same_counts, same_scales, strict=True))
    away = "" if distance is None else f"{distance():.1e}"
    columns = (
        len(pairs),
        same_counts.count(False),
        same_scales.count(False),
        by_search,
        *itself,
        away,
    )
    print(f"{name:20}" + "".join(f"{column!s:>12}" for column in columns), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--scales"]:
        write_scales(sys.argv[2])
        return
    titles = ("histograms", "counts", "scales", "by search", *OTHER_VECTORS, "outputs")
    print(f"{'differing from torch.ao':20}"[:20] + "".join(f"{title:>12}" for title in titles))
    with torch.no_grad():
        report("streams", list(streams()), None)
        for name in sys.argv[1:] or MODELS:
            report(name, *observed(name))


if __name__ == "__main__":
    main()
