"""Whether other work took the processors away while something was timed.

Two signs are read. The kernel counts how long each thread was ready to run and had to wait for a
processor: that is time lost to other processes on this machine. What shares a physical core from
outside (another virtual machine, another hyperthread) leaves no trace in that count, but makes the
core slower: the same short computation then takes longer than it has taken before.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

# A round counts as disturbed from this share of its time on. It is above what a kernel's own
# threads take on an idle machine (up to 1 %), and below what moves a comparison.
MOST_LOST = 0.02

# A core counts as slow from this multiple of its best time on. Clock speeds vary by a few percent;
# sharing a core costs half and more.
MOST_PACE = 1.15

_TASKS = Path("/proc/self/task")
_best_seconds: dict[int, float] = {}


class Watch:
    """Tells, round by round, whether other work disturbed it."""

    def __init__(self) -> None:
        self._pace = _pace()

    def start(self) -> None:
        """Begin a round."""
        self._start = time.perf_counter()
        self._waited = _seconds_waited()

    def undisturbed(self) -> bool:
        """End the round; whether it had the processors to itself."""
        elapsed = time.perf_counter() - self._start
        waited = _seconds_waited()
        # Threads work side by side: the one that lost most held the others up.
        lost = max((now - self._waited.get(task, 0.0) for task, now in waited.items()), default=0.0)
        before, self._pace = self._pace, _pace()
        return lost <= MOST_LOST * elapsed and max(before, self._pace) <= MOST_PACE


def _seconds_waited() -> dict[str, float]:
    """How long each thread of this process has waited for a processor since it began.

    Empty where the kernel keeps no such count.
    """
    waited = {}
    try:
        for task in _TASKS.iterdir():
            _, nanoseconds, _ = (task / "schedstat").read_text().split()
            waited[task.name] = int(nanoseconds) * 1e-9
    except (OSError, ValueError):  # not Linux, a kernel without the count, a thread that just ended
        pass
    return waited


def _pace() -> float:
    """Time of a fixed computation on all of torch's threads, over the least it took so far."""
    threads = torch.get_num_threads()
    x = torch.ones(threads * 32768)  # torch splits work into pieces of this size
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        x.exp()
        seconds = min(seconds, time.perf_counter() - start)
    best = _best_seconds[threads] = min(seconds, _best_seconds.get(threads, math.inf))
    return seconds / best
