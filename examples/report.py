"""What quantization did to the demo's model, as a page to look at.

    python examples/report.py [report.html]    # or: make report

Trains the small residual CNN of demo.py on the handwritten digits, quantizes it statically, and
writes one self-contained HTML page; prints the summary.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import fastquant
from demo import FUSED, Settings, load, train_float
from fastquant.analysis import Analysis, analyze


def run(settings: Settings) -> Analysis:
    """Train, prepare, calibrate, analyse."""
    digits = load()
    trained = train_float(digits, settings).eval()
    model: Any = fastquant.fuse_modules(trained, FUSED)
    model.qconfig = fastquant.get_default_qconfig(torch.backends.quantized.engine)
    prepared = fastquant.prepare(model)
    batches = digits.batches(settings.batch, seed=0)
    fastquant.calibrate(prepared, batches, progress=False)
    return analyze(trained, prepared, batches, metric=digits.accuracy, name="Digits CNN")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", nargs="?", type=Path, default=Path("build/report.html"))
    path: Path = parser.parse_args().path
    torch.set_num_threads(1)
    analysis = run(Settings())
    path.parent.mkdir(parents=True, exist_ok=True)
    print(analysis)
    print(f"\nThe page: {analysis.to_html(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
