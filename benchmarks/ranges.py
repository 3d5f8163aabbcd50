"""How long does it take to choose a range from a histogram, by each method?

python benchmarks/ranges.py

Beside it, where they are installed: the calibrators of ONNX Runtime and of NVIDIA ModelOpt.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastquant
from harness import INPUT, OURS, Case, Run, Suite, Target, at_most, main, normal

BINS = 2048
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "after ReLU": torch.relu,
    "heavy tails": lambda x: x * x * x,
}
# µs for a histogram of 2048 bins.
TARGETS: dict[str, Target] = {
    "minmax": at_most(20),
    "l2": at_most(20),
    "mse": at_most(1000),
    "percentile": at_most(20),
    "entropy": at_most(1000),
}
# Others take up to seconds.
MOST_ROUNDS = 3


def microseconds(times: dict[str, float]) -> float:
    return times[OURS] * 1e6


def quietly(run: Run) -> Run:
    def quiet() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return run()

    return quiet


def of_onnxruntime(method: str, x: np.ndarray[Any, Any]) -> Run | None:
    """The same search by ONNX Runtime, for a histogram of the same values and number of bins."""
    try:
        from onnxruntime.quantization.calibrate import HistogramCollector
    except ImportError:
        return None
    collector = HistogramCollector(method, False, BINS, 256, 99.99, "same")
    quietly(partial(collector.collect, {"x": x.ravel()}))()
    return quietly(collector.compute_collection_result)


def of_modelopt(method: str, x: Tensor) -> Run | None:
    try:
        from modelopt.torch.quantization.calib import HistogramCalibrator
    except ImportError:
        return None
    calibrator = HistogramCalibrator(8, None, False, num_bins=BINS)
    calibrator.collect(x.abs())
    return partial(calibrator.compute_amax, method, **({"stride": 1} if method == "mse" else {}))


def others(method: str, x: Tensor) -> dict[str, Run]:
    cases: dict[str, Run | None] = {}
    if method in ("entropy", "percentile"):
        cases["onnxruntime"] = of_onnxruntime(method, x.numpy())
    if method in ("entropy", "mse"):
        cases["ModelOpt"] = of_modelopt(method, x)
    return {name: run for name, run in cases.items() if run is not None}


def measure(suite: Suite) -> None:
    for name, distribution in DISTRIBUTIONS.items():
        x = distribution(normal(*INPUT))
        observer = fastquant.HistogramObserver(bins=BINS)
        observer(x)
        for method, target in TARGETS.items():
            ours = partial(observer.calculate_range, method)
            work, of = f"range by {method}", f"{BINS} bins, {name}"
            suite.add(work, of, {OURS: ours}, microseconds, "µs", target)
            for other, run in others(method, x).items():
                cases: dict[str, Case | Run] = {OURS: ours, other: run}

                def faster(times: dict[str, float], other: str = other) -> float:
                    return times[other] / times[OURS]

                suite.add(
                    f"{work}, against {other}", of, cases, faster, "x", most_rounds=MOST_ROUNDS
                )
    weight = normal(256, 128, 3, 3)
    search = fastquant.PerChannelMSEObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    suite.add("range of a weight by mse", str(list(weight.shape)), {OURS: partial(search, weight)},
              microseconds, "µs")  # fmt: skip
    channels = fastquant.PerChannelHistogramObserver(ch_axis=1)
    suite.add("histograms of channels", str(list(INPUT)), {OURS: partial(channels, normal(*INPUT))},
              microseconds, "µs")  # fmt: skip


if __name__ == "__main__":
    main(measure)
