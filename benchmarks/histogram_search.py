"""How long does the search for the best clipping range take, by histogram and number of levels?

python benchmarks/histogram_search.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor

import fastquant
from harness import INPUT, Suite, at_least, main, normal

DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "after ReLU": torch.relu,
    "uniform": torch.special.ndtr,
    # Nearly all bins are empty.
    "one far outlier": lambda x: torch.cat([x.flatten(), torch.tensor([1e4])]),
}
SETTINGS = (
    (2048, torch.quint8),
    (256, torch.quint8),
    (8192, torch.quint8),
    (2048, torch.quint4x2),
)


def measure(suite: Suite) -> None:
    x = normal(*INPUT)
    for bins, dtype in SETTINGS:
        for name, distribution in DISTRIBUTIONS.items():
            if bins != 2048 and name != "normal":
                continue
            observers = [
                ns.HistogramObserver(bins=bins, dtype=dtype) for ns in (fastquant, torch_ao)
            ]
            for observer in observers:
                observer(distribution(x))
            ours, theirs = (observer.calculate_qparams for observer in observers)
            suite.compare(
                f"calculate_qparams, {str(dtype).removeprefix('torch.')}",
                f"{bins} bins, {name}",
                ours,
                theirs,
                at_least(100),
            )


if __name__ == "__main__":
    main(measure)
