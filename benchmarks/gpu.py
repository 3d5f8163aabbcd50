"""How fast are CUDA kernels, beside torch.ao's, torch.compile, and the memory bandwidth?

    python benchmarks/gpu.py --json benchmarks/results/gpu/NAME.json    # needs a CUDA GPU
    python benchmarks/gpu.py --rehearse    # whether all of it runs: tiny, and on the CPU

Whole models, then modules of all kinds for tensors of 128 elements to 2^30, then the ops that do
several steps of QAT. It ends in the time that --seconds gives, with as many rounds as fit into it.
"""

from __future__ import annotations

import functools

import torch

import fastquant
import gpu_fused_ops
import gpu_models
import gpu_sweep
from gpu_timing import Bench, Gpu, Rehearsal
from harness import Suite, parser, run_benchmarks

# What is measured, in this order, and how much of the time that is left each takes.
PARTS = {
    "models": (gpu_models.measure, 0.3),
    "sweep": (gpu_sweep.measure, 0.85),
    "fused ops": (gpu_fused_ops.measure, 1.0),
}


def why_not() -> str | None:
    """What is missing."""
    if not torch.cuda.is_available():
        return "gpu.py needs an NVIDIA GPU and a CUDA build of torch; nothing was measured"
    reason: str | None = fastquant.build_info()["cuda"]["why_not"]
    return reason and f"gpu.py measures CUDA kernels, and there are none: {reason}"


def measure(suite: Suite, part: str, bench: Bench) -> None:
    run, share = PARTS[part]
    with bench.part(share):
        run(suite, bench)


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--seconds", type=float, default=270.0, help="that all of it may take. Default: 270"
    )
    options_parser.add_argument(
        "--rehearse", action="store_true", help="run everything on the CPU, on tiny tensors"
    )
    options = options_parser.parse_args()
    gpu = Rehearsal() if options.rehearse else Gpu()
    reason = None if options.rehearse else why_not()
    if reason is not None:
        raise SystemExit(reason)
    options.threads = options.threads[:1]  # torch's threads make no difference to a GPU
    bench = Bench(gpu, options.seconds)
    benchmarks = {
        f"{part}, {gpu.name}": functools.partial(measure, part=part, bench=bench) for part in PARTS
    }
    run_benchmarks(benchmarks, options, options.json)


if __name__ == "__main__":
    main()
