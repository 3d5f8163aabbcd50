"""What does an analysis of a model cost, in calibration passes and in forwards?

    python benchmarks/analysis.py

torchvision's MobileNetV2 and ResNet-18, batch 8 at 224 x 224, the x86 qconfig. Needs torchvision;
`pip install --no-deps torchvision` is enough.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import fastquant
from fastquant import bench
from fastquant.analysis import analyze
from harness import OURS, Suite, at_most, main, normal
from whole_models import BATCH

# The float model and its calibrated copy.
Models = tuple[nn.Module, nn.Module]

# A multiple of three: errors are measured on every third batch.
BATCHES = 12
# A call takes seconds, with sensitivity up to half a minute.
MOST_ROUNDS, MOST_ROUNDS_OF_SENSITIVITY = 5, 3


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def calibrated(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """A copy, fused, prepared and calibrated."""
    fused = bench.fused(model, "calibrate")
    fused.qconfig = fastquant.get_default_qconfig("x86")
    prepared: nn.Module = fastquant.prepare(fused, inplace=True)
    fastquant.calibrate(prepared, data, progress=False)
    return prepared


def measures(suite: Suite, name: str, models: Models, data: list[Tensor]) -> None:
    """All that is measured of the layers but sensitivity and times, over a calibration."""
    options = {"sensitivity": False, "timing": False, "progress": False}
    suite.add(
        f"{name}: analysis without sensitivity",
        f"{len(data)} batches of {list(BATCH)}",
        {
            OURS: functools.partial(analyze, *models, data, **options),
            "calibration": functools.partial(fastquant.calibrate, models[1], data, progress=False),
        },
        lambda t: t[OURS] / t["calibration"],
        "calibrations",
        at_most(2),
        MOST_ROUNDS,
    )


def sensitivity(suite: Suite, name: str, models: Models, data: list[Tensor]) -> None:
    """What sensitivity adds for each layer, over a forward in float."""
    run = functools.partial(analyze, *models, data[:1], timing=False, progress=False)
    layers = len(run(sensitivity=False).layers)
    suite.add(
        f"{name}: sensitivity of a layer",
        str(list(BATCH)),
        {
            OURS: run,
            "without": functools.partial(run, sensitivity=False),
            "float": functools.partial(forward, models[0], data[0]),
        },
        lambda t: (t[OURS] - t["without"]) / layers / t["float"],
        "forwards",
        at_most(2),
        MOST_ROUNDS_OF_SENSITIVITY,
    )


def measure(suite: Suite) -> None:
    data = [normal(*BATCH) for _ in range(BATCHES)]
    pairs: dict[str, Models] = {}
    for name in ("mobilenet_v2", "resnet18"):
        try:
            model = bench.torchvision_model(name).eval()
        except ImportError as error:
            raise SystemExit(f"analysis.py: {error}") from None
        pairs[name] = model, calibrated(model, data)
    for add in (measures, sensitivity):
        for name, models in pairs.items():
            add(suite, name, models, data)


if __name__ == "__main__":
    main(measure)
