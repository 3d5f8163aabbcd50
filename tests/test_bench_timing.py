"""How times are taken: interleaved rounds; disturbed rounds are found and repeated."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastquant
from fastquant.bench import disturbance, timing
from fastquant.bench.machine import machine
from fastquant.bench.timing import (
    Case,
    Rounds,
    Summary,
    readable_time,
    threads_set_to,
    time_rounds,
)


def test_rounds_are_interleaved_and_begin_with_each_case_in_turn() -> None:
    order: list[str] = []

    def case(name: str) -> Case:
        return Case(run=lambda: None, before=lambda: order.append(name))

    blocks = 0

    def on_block() -> None:
        nonlocal blocks
        if blocks == 0:
            del order[:-1]  # what came before was warming up
        blocks += 1

    timed = time_rounds({name: case(name) for name in "abc"}, rounds=4, on_block=on_block)
    seconds = timed.seconds
    # There may be more rounds, where others disturbed some.
    assert "".join(order[:12]) == "abcbcacababc"
    assert blocks == 12
    assert 0 <= timed.undisturbed <= 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(0 < value < 1 for values in seconds.values() for value in values)


class Clock:
    """A clock that only work moves, and a machine that nobody else uses unless told so.

    Args:
        disturbed: whether other work disturbs the round of this number.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        disturbed: Callable[[int], bool] = lambda number: False,
    ) -> None:
        clock = self
        self.now = 100.0
        self.disturbed = False

        class Watch:
            rounds = 0

            def start(self) -> None:
                clock.disturbed = disturbed(self.rounds)
                self.rounds += 1

            def undisturbed(self) -> bool:
                was, clock.disturbed = clock.disturbed, False
                return not was

        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "Watch", Watch)

    def work(self, seconds: float) -> None:
        self.now += seconds * (6 if self.disturbed else 1)


def test_times_are_per_piece_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cases = {
        "one": Case(lambda: clock.work(3e-4)),
        "four": Case(lambda: clock.work(8e-4), parts=4),
    }
    seconds = time_rounds(cases, rounds=9).seconds
    assert seconds["one"] == pytest.approx([3e-4] * 9)
    assert seconds["four"] == pytest.approx([2e-4] * 9)


def timed_with(
    disturbed: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch, patience: float
) -> Rounds:
    clock = Clock(monkeypatch, disturbed)
    return time_rounds({"a": Case(lambda: clock.work(0.0005))}, rounds=5, patience=patience)


def test_disturbed_rounds_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = timed_with(lambda number: number % 2 == 0, monkeypatch, patience=2)
    assert timed.undisturbed == 5
    assert timed.seconds["a"] == pytest.approx([0.0005] * 5)


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = timed_with(lambda number: number > 1, monkeypatch, patience=0.02)
    assert timed.undisturbed == 2
    assert sorted(timed.seconds["a"]) == pytest.approx([0.0005] * 2 + [0.003] * 3)


class Machine:
    """Stands for the kernel's count of waiting, and for the clock, of two threads."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slower = 1.0
        self._waited = {"1": 0.0, "2": 0.0}
        self._tasks = tmp_path / "task"
        self.passes(0, {})
        monkeypatch.setattr(disturbance, "_TASKS", self._tasks)
        monkeypatch.setattr(disturbance, "_best_seconds", {})
        monkeypatch.setattr(disturbance, "time", SimpleNamespace(perf_counter=self._clock))

    def _clock(self) -> float:
        self.now += 1e-5 * self.slower
        return self.now

    def passes(self, seconds: float, waited: dict[str, float]) -> None:
        """Time passes in which threads wait for a processor."""
        self.now += seconds
        for task, wait in waited.items():
            self._waited[task] += wait
        for task, wait in self._waited.items():
            (self._tasks / task).mkdir(parents=True, exist_ok=True)
            (self._tasks / task / "schedstat").write_text(f"1 {round(wait * 1e9)} 1\n")


@pytest.mark.parametrize(
    ("waited", "undisturbed"),
    [
        ({}, True),
        # What a kernel's own threads take in a long round, thread by thread.
        ({"1": 0.01, "2": 0.01}, True),
        ({"2": 0.5}, False),
    ],
)
def test_a_round_is_disturbed_by_the_time_that_its_threads_lose(
    waited: dict[str, float], undisturbed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    machine.passes(10, {"1": 5})  # what was lost before the round does not count
    watch = disturbance.Watch()
    watch.start()
    machine.passes(1, waited)
    assert watch.undisturbed() is undisturbed


def test_rounds_on_a_slow_processor_are_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    watch = disturbance.Watch()
    found = []
    for slower in (1.05, 2.0, 1.0, 1.1):
        watch.start()
        machine.passes(1, {})
        machine.slower = slower
        found.append(watch.undisturbed())
    # A slow processor at either end of a round disturbs it.
    assert found == [True, False, False, True]


def test_without_a_count_of_waiting_rounds_count_as_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    monkeypatch.setattr(disturbance, "_TASKS", tmp_path / "absent")
    watch = disturbance.Watch()
    watch.start()
    machine.passes(1, {"1": 0.5})
    assert watch.undisturbed()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs the kernel's count")
def test_another_process_on_the_same_core_disturbs_a_round() -> None:
    mine = os.sched_getaffinity(0)
    core = {min(mine)}
    os.sched_setaffinity(0, core)  # a child inherits it: both share one core
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = disturbance.Watch()
        watch.start()
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        assert not watch.undisturbed()
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, mine)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_waits_meanwhile(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    seen = []
    try:
        (gc.enable if enabled else gc.disable)()
        time_rounds({"a": Case(lambda: None)}, 2, on_block=lambda: seen.append(gc.isenabled()))
        assert seen == [False, False]
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            time_rounds({"a": Case(lambda: None)}, 2, on_block=lambda: 1 / 0)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_summary() -> None:
    assert Summary.of([5, 1, 3, 2, 4]) == Summary(median=3, low=2, high=4)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234e-7, "0.12 µs"),
        (9.999e-6, "10.0 µs"),
        (1.234e-5, "12.3 µs"),
        (2e-4, "200 µs"),
        (1.5e-3, "1.50 ms"),
        (2.25, "2.25 s"),
        (float("nan"), "-"),
    ],
)
def test_readable_time(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text


def test_threads_are_put_back(threads: None) -> None:
    torch.set_num_threads(2)
    seen = []

    def fails() -> None:
        with threads_set_to(1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == [1]
    assert torch.get_num_threads() == 2
    with threads_set_to(None):
        assert torch.get_num_threads() == 2


def test_machine_says_what_runs() -> None:
    about = machine()
    assert about["torch"] == torch.__version__
    assert about["fastquant"] == fastquant.__version__
    assert about["isa"] == fastquant.build_info()["isa"]
    assert about["cores"] >= 1
    assert about["cpu"]
