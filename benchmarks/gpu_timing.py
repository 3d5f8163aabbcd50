"""Timing on a GPU within the time there is, and a rehearsal of the same on the CPU.

Every time is taken by events on the device, around as many calls in a row as last a while, right
after another: for small tensors that is what Python, torch and the driver take to enqueue a call,
for large ones what the kernels take. The calls of a case all work on the same tensors, which stay
in the GPU's cache where they fit into it; inputs say so, and it helps all cases alike.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import Rounds, Run, describe

# How long the calls that are timed together take, unless one takes longer.
_BLOCK_SECONDS = 300e-6
_MOST_CALLS = 20
_FEWEST_ROUNDS = 3


class Gpu:
    """The GPU that is measured."""

    device = torch.device("cuda")
    rehearses = False

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    @property
    def cache_bytes(self) -> int:
        size: int = torch.cuda.get_device_properties(0).L2_cache_size
        return size

    def seconds(self, run: Run, calls: int) -> float:
        """Seconds that one call of several takes, after one that is not timed.

        Behind that, the GPU has the next one to do at once.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls

    def recorded(self, step: Run) -> Run:
        """The same work as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Run = graph.replay
        return replay

    def works(self) -> bool:
        """False once a kernel has gone astray: then the process can use the GPU no more."""
        try:
            return int(torch.ones(1, device=self.device).sum()) == 1
        except RuntimeError:
            return False

    def free(self) -> None:
        """Give back memory that is no longer in use."""
        gc.collect()
        torch.cuda.empty_cache()


class Rehearsal(Gpu):
    """Plays the GPU on the CPU: what is timed means nothing."""

    device = torch.device("cpu")
    rehearses = True
    name = "rehearsed on the CPU"
    cache_bytes = 1 << 14

    def seconds(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def recorded(self, step: Run) -> Run:
        return step

    def free(self) -> None:
        gc.collect()


class IncompleteError(Exception):
    """Something failed, or there was no time for it; the message says what."""


@dataclass
class Job:
    """What is measured in one go."""

    name: str
    run: Callable[[], None]


class Bench:
    """Times on a device, until the time is up."""

    def __init__(self, gpu: Gpu, seconds: float) -> None:
        self.gpu = gpu
        self._end = time.monotonic() + seconds
        self._row_seconds = 0.0

    @property
    def device(self) -> torch.device:
        return self.gpu.device

    def left(self) -> float:
        """Seconds until the time is up."""
        return self._end - time.monotonic()

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Have but this share of the time that is left."""
        end = self._end
        self._end = time.monotonic() + share * max(0.0, self.left())
        try:
            yield
        finally:
            self._end = end

    def run(self, jobs: Sequence[Job]) -> None:
        """Run jobs, one after the other, sharing the time out; one that fails stops no other.

        Raises:
            IncompleteError: not all could be run to their ends.
        """
        failed = []
        for number, job in enumerate(jobs):
            if self.left() <= 0:
                failed.append(f"no time left for {len(jobs) - number} of {len(jobs)}")
                break
            self._row_seconds = self.left() / (len(jobs) - number)
            try:
                job.run()
            except Exception:
                traceback.print_exc()
                failed.append(job.name)
                if not self.gpu.works():
                    failed.append(f"the GPU is lost to the rest of {len(jobs)}")
                    break
                self.gpu.free()
        if failed:
            raise IncompleteError("; ".join(failed))

    def timed(self, cases: Mapping[str, Run], most_rounds: int) -> Rounds:
        """Time all cases in interleaved rounds, as many as there is time for.

        Each round begins with another case.
        """
        for run in cases.values():
            run()
        once = {name: self.gpu.seconds(run, 1) for name, run in cases.items()}
        calls = {
            name: max(1, min(_MOST_CALLS, math.ceil(_BLOCK_SECONDS / max(seconds, 1e-9))))
            for name, seconds in once.items()
        }
        a_round = sum(once[name] * (calls[name] + 1) for name in cases)
        fitting = int(self._row_seconds / max(a_round, 1e-9))
        rounds = min(most_rounds, max(_FEWEST_ROUNDS, fitting))
        times: dict[str, list[float]] = {name: [] for name in cases}
        names = list(cases)
        gc.disable()
        try:
            for number in range(rounds):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    times[name].append(self.gpu.seconds(cases[name], calls[name]))
        finally:
            gc.enable()
        return Rounds(times, rounds)

    def describe(self, x: Tensor) -> str:
        """Dtype, shape and layout, and whether it and a tensor of its size fit into the cache."""
        cached = 2 * x.numel() * x.element_size() <= self.gpu.cache_bytes
        return describe(x) + (", cached" if cached else "")
