"""python -m fastquant.bench, the timing below it, and the benchmarks' harness."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant
from fastquant import bench
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

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# ------------------------------------------------------------------------------------- timing


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


def test_rounds_beside_a_slow_processor_are_disturbed(
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
def test_work_beside_this_process_disturbs_it() -> None:
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


# ---------------------------------------------------------------------------------------- run


class TwoInputs(nn.Module):
    """Embeds indices, adds floats; takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.quant = fastquant.QuantStub()
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.head.qconfig = None  # type: ignore[assignment]  # stays in float
        self.embedding.qconfig = None  # type: ignore[assignment]

    def forward(self, indices: Tensor, values: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(self.quant(self.embedding(indices) + values))
        return {"logits": self.head(hidden), "hidden": hidden}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


LAYERS = {
    "calibrate": {"quant", "features.0.0", "features.1.0", "features.2.0", "classifier"},
    "qat": {
        "quant",
        *(f"features.{i}.0{part}" for i in range(3) for part in ("", ".weight")),
        "classifier",
        "classifier.weight",
    },
}


@pytest.mark.parametrize("mode", bench.MODES)
def test_run(mode: str, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    model = bench.small_cnn()
    before, was_training = state(model), model.training
    x = torch.randn(2, 3, 16, 16)
    torch.set_num_threads(2)
    report = bench.run(model, x, mode=mode, rounds=3, threads=1)

    assert report.same_ranges is True
    assert report.differences == []
    assert report.largest_difference is not None
    assert report.largest_difference <= (0 if mode == "calibrate" else 1e-4)
    assert report.torch_ao_error is None
    assert report.inputs == ["2x3x16x16:float32"]
    assert report.threads == 1
    assert torch.get_num_threads() == 2
    assert list(report.seconds) == ["float", "fastquant", "torch.ao"]
    assert all(len(values) == 3 and min(values) > 0 for values in report.seconds.values())
    assert {layer.name for layer in report.layers} == LAYERS[mode]
    for layer in report.layers:
        assert layer.seconds.keys() == {"fastquant", "torch.ao"}
        assert layer.calls >= 1
    shapes = {layer.name: layer.shape for layer in report.layers}
    assert shapes["quant"] == (2, 3, 16, 16)
    assert shapes["features.0.0"] == (2, 32, 8, 8)

    # The model is as it was.
    assert model.training is was_training
    assert state(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert "layer by layer" in capsys.readouterr().err  # progress

    written = json.loads(json.dumps(report.as_dict()))
    assert written["same_ranges"] is True
    assert written["machine"]["isa"] == machine()["isa"]
    assert set(written["overhead"]) == {"fastquant", "torch.ao"}
    table = report.table(top=2)
    assert "same ranges" in table
    # Two layers and the total.
    assert sum(name in table for name in LAYERS[mode]) < len(LAYERS[mode])
    assert f"all {len(LAYERS[mode])}" in table


def test_the_costliest_layers_come_first() -> None:
    report = bench.run(
        bench.small_cnn(), torch.randn(8, 3, 64, 64), rounds=3, threads=1, progress=False
    )
    costs = [layer.seconds["torch.ao"].median for layer in report.layers]
    assert costs == sorted(costs, reverse=True)


def test_keyword_arguments_and_parts_left_in_float() -> None:
    inputs = {"indices": torch.tensor([0, 3]), "values": torch.randn(2, 8)}
    for mode in bench.MODES:
        report = bench.run(TwoInputs(), inputs, mode=mode, rounds=1, progress=False)
        assert report.same_ranges is True
        assert report.inputs == ["2:int64", "2x8:float32"]
        names = {layer.name.removesuffix(".weight") for layer in report.layers}
        assert names == {"quant", "linear"}


@pytest.fixture
def wrong_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fastquant's histogram observer sees values a little too large."""
    right = fastquant.HistogramObserver.forward

    def wrong(self: fastquant.HistogramObserver, x: Tensor) -> Tensor:
        right(self, x * 1.0001)
        return x

    monkeypatch.setattr(fastquant.HistogramObserver, "forward", wrong)


@pytest.mark.usefixtures("wrong_histogram")
def test_a_range_that_differs_is_found() -> None:
    report = bench.run(bench.small_cnn(), torch.randn(1, 3, 16, 16), rounds=1, progress=False)
    assert report.same_ranges is False
    assert set(report.differences) == LAYERS["calibrate"]
    assert report.largest_difference == pytest.approx(1e-4, rel=0.1)
    assert "RANGES DIFFER" in report.table()


def test_an_observer_that_is_missing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = fastquant.prepare

    def prepare_too_little(model: nn.Module, **kwargs: Any) -> nn.Module:
        model.classifier.qconfig = None  # type: ignore[union-attr, assignment]
        return prepare(model, **kwargs)

    monkeypatch.setattr(fastquant, "prepare", prepare_too_little)
    report = bench.run(bench.small_cnn(), torch.randn(1, 3, 16, 16), rounds=1, progress=False)
    assert report.differences == ["classifier"]
    assert report.largest_difference == math.inf


def report_of(seconds: dict[str, list[float]], undisturbed: int) -> bench.Report:
    summary = Summary(1e-4, 1e-4, 1e-4)
    return bench.Report(
        model="toy",
        mode="calibrate",
        qconfig="x86",
        inputs=["3x4:float32"],
        threads=1,
        rounds=4,
        undisturbed=undisturbed,
        seconds=seconds,
        layers=[bench.Layer("fc", "Linear", (3, 4), 1, dict.fromkeys(list(seconds)[1:], summary))],
        same_ranges=True,
        largest_difference=0.0,
        differences=[],
        torch_ao_error=None,
    )


STEADY = {"float": [0.01] * 4, "fastquant": [0.011] * 4, "torch.ao": [0.03, 0.031, 0.03, 0.029]}


@pytest.mark.parametrize(
    ("seconds", "undisturbed", "says"),
    [
        (STEADY, 4, []),
        (STEADY, 2, []),
        (STEADY, 1, ["during 3 of 4 rounds"]),
        ({**STEADY, "float": [0.01, 0.03, 0.01, 0.05]}, 4, ["times of float vary much"]),
        (
            {**STEADY, "torch.ao": [0.03, 0.09, 0.03, 0.06]},
            0,
            ["during 4 of 4 rounds", "times of torch.ao vary much"],
        ),
    ],
)
def test_doubtful_times_come_with_a_warning(
    seconds: dict[str, list[float]], undisturbed: int, says: list[str]
) -> None:
    report = report_of(seconds, undisturbed)
    warnings = [line for line in report.table().splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == len(says)
    assert all(words in warning for words, warning in zip(says, warnings, strict=True))
    assert report.as_dict()["caveats"] == report.caveats()
    assert len(report.caveats()) == len(says)


def test_where_torch_ao_fails_fastquant_is_measured_alone() -> None:
    x = torch.randn(1, 3, 16, 16)
    x[0, 0, 0, 0] = float("nan")  # torch.ao's histogram observer raises
    report = bench.run(bench.small_cnn(), x, rounds=2, progress=False)
    assert report.same_ranges is None
    assert report.torch_ao_error is not None
    assert list(report.seconds) == ["float", "fastquant"]
    assert {layer.name for layer in report.layers} == LAYERS["calibrate"]
    assert report.torch_ao_error in report.table()


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"mode": "train"}, "mode"),
        ({"qconfig": "arm"}, "qconfig"),
        ({"rounds": 0}, "rounds"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        bench.run(bench.small_cnn(), torch.randn(1, 3, 16, 16), progress=False, **kwargs)


def test_there_is_nothing_to_compare_with_under_a_patch() -> None:
    with fastquant.patch_torch_ao(), pytest.raises(RuntimeError, match="undo"):
        bench.run(bench.small_cnn(), torch.randn(1, 3, 16, 16), progress=False)


def test_torchvision_models() -> None:
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ImportError, match="pip install"):
            bench.torchvision_model("resnet18")
        return
    model = bench.torchvision_model("resnet18").eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


# -------------------------------------------------------------------------------- command line


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_models.py").write_text(
        """
import torch
from torch import nn

import fastquant


def build():
    return nn.Sequential(fastquant.QuantStub(), nn.Linear(4, 4), fastquant.DeQuantStub())


class Holder:
    build = staticmethod(build)


def inputs():
    return (torch.randn(3, 4),)


def fails():
    raise OSError("no\\nweights")


built = build()
no_model = dict
number = 3
no_layers = nn.Identity
"""
    )
    (tmp_path / "broken_module.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("their_models", "broken_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)


QUICK = ("--rounds", "1", "--threads", "1", "--quiet")


@pytest.mark.parametrize("model", ["build", "Holder.build", "built"])
@pytest.mark.parametrize("given", [("--input", "3x4"), ("--inputs", "their_models:inputs")])
@pytest.mark.usefixtures("user_module")
def test_a_model_of_the_users(
    model: str, given: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([f"their_models:{model}", *given, *QUICK]) == 0
    output = capsys.readouterr()
    assert "same ranges" in output.out
    assert output.err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "module:callable or one of small_cnn, mobilenet_v2, resnet18"),
        (["not_a_module:build", "--input", "3x4"], "No module named 'not_a_module'"),
        (["broken_module:build", "--input", "3x4"], "No module named 'not_there_at_all'"),
        (["their_models:nothing", "--input", "3x4"], "no attribute 'nothing'"),
        (["their_models:number", "--input", "3x4"], "neither a module nor callable"),
        (["their_models:fails", "--input", "3x4"], "cannot be built: OSError: no weights"),
        (
            ["their_models:no_model", "--input", "3x4"],
            "a torch.nn.Module, returned dict",
        ),
        (["their_models:no_layers", "--input", "3x4"], "no layer to quantize"),
        (["their_models:build"], "needs --input or --inputs"),
        (["their_models:build", "--input", "3x5"], "does not run on the input"),
        (["their_models:build", "--input", "3x4", "--input", "3x4"], "does not run on the input"),
        (["their_models:build", "--input", "3,4"], "as in 8x3x224x224"),
        (["their_models:build", "--input", "3x4:float99"], "as in 8x3x224x224"),
        (["their_models:build", "--inputs", "their_models:fails"], "no weights"),
        (["their_models:build", "--inputs", "their_models:number"], "not callable"),
        (["their_models:build", "--input", "3x4", "--inputs", "a:b"], "not allowed with"),
        (["--mode", "train"], "--mode"),
        (["--qconfig", "arm"], "--qconfig"),
        (["--rounds", "0"], "at least 1"),
        (["--threads", "many"], "at least 1"),
        (["--json", "/not/there/x.json", "--rounds", "1", "--input", "1x3x8x8"], "cannot write"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_errors_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.main([*arguments, "--quiet"])
    assert raised.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert says in output.err
    assert output.err.count("\n") == 1


@pytest.mark.usefixtures("wrong_histogram")
def test_ranges_that_differ_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--input", "1x3x16x16", *QUICK]) == 1
    assert "RANGES DIFFER" in capsys.readouterr().out


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastquant.bench", "--rounds", "2", "--threads", "1"]
    command += ["--input", "1x3x16x16"]
    done = subprocess.run(
        [*command, "--json", "-"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same_ranges"] is True
    assert result["model"] == "small_cnn"
    assert result["command"].endswith("--input 1x3x16x16 --json -")
    assert "layer by layer" in done.stderr  # progress
    assert "same ranges" in done.stderr  # the table, out of the JSON's way


# ---------------------------------------------------------------------------------- benchmarks


class Scripts:
    """Runs files of benchmarks/ as commands, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(BENCHMARKS)
        self._monkeypatch = monkeypatch

    def module(self, name: str) -> Any:
        return importlib.import_module(name)

    def run(self, name: str, *arguments: str | Path) -> None:
        self._monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        self.module(name).main()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return Scripts(monkeypatch)


@pytest.fixture
def harness(scripts: Scripts) -> ModuleType:
    module: ModuleType = scripts.module("harness")
    return module


def test_rows(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    suite = harness.Suite("toy", rounds=3, threads=1)
    timed = harness.Rounds({"fastquant": [1.0, 2.0, 4.0], "torch.ao": [8.0, 8.0, 8.0]}, 1)

    def ratio(times: dict[str, float]) -> float:
        return times["torch.ao"] / times["fastquant"]

    for target in (harness.at_least(4), harness.at_least(4.1), harness.at_most(4), None):
        suite.add_rounds("work", "input", timed, ratio, "x", target)
    # The median of the rounds' ratios, 8, 4 and 2.
    assert [row["value"]["median"] for row in suite.rows] == [4.0] * 4
    assert [row["met"] for row in suite.rows] == [True, False, True, None]
    assert suite.rows[0]["seconds"]["fastquant"] == {
        "median": 2.0,
        "low": 1.5,
        "high": 3.0,
        "best": 1.0,
    }
    printed = capsys.readouterr().out.splitlines()
    assert [line.endswith("NOT MET") for line in printed] == [False, True, False, False]
    summary = harness.targets_of(suite.rows)
    assert summary.startswith("2 of 3 targets met")
    assert "in 4 of 4 rows, other processes disturbed most of the rounds" in summary


def test_work_that_torch_ao_cannot_do_has_no_ratio(harness: ModuleType) -> None:
    suite = harness.Suite("toy", rounds=2, threads=1)
    suite.compare("work", "input", lambda: None, None, harness.at_least(3))
    (row,) = suite.rows
    assert row["unit"] == "µs"
    assert row["met"] is None


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the quickest benchmarks."""
    path = tmp_path_factory.mktemp("results") / "result.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = ("--only", "histogram_search,memory", "--rounds", "2", "--threads", "1")
        Scripts(monkeypatch).run("run_all", *options, "--json", path)
    return path


def test_stored_result(stored: Path) -> None:
    result = json.loads(stored.read_text())
    assert result["machine"] == machine()
    assert "run_all.py" in result["command"]
    assert {row["benchmark"] for row in result["rows"]} == {"histogram_search", "memory"}
    for row in result["rows"]:
        assert row["threads"] == 1
        assert row["target"] is None or row["met"] in (True, False)
    # What fake-quantize keeps for backward, and what a histogram takes as it grows.
    memory = [row for row in result["rows"] if row["benchmark"] == "memory"]
    assert all(row["met"] for row in memory)
    assert {row["unit"] for row in memory} >= {"bits/element"}


def test_compare(
    stored: Path, scripts: Scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = json.loads(stored.read_text())
    timed = [row for row in slower["rows"] if row["seconds"]]
    for summary in (row["seconds"]["fastquant"] for row in timed):
        summary.update({key: 100 * value for key, value in summary.items()})
    other = tmp_path / "other.json"
    other.write_text(json.dumps(slower))

    def compared(before: Path, after: Path) -> str:
        scripts.run("compare", before, after)
        return capsys.readouterr().out

    same = compared(stored, stored)
    assert "slower" not in same
    assert "faster" not in same
    worse = compared(stored, other)
    assert worse.count("slower") == worse.count("100.00x") == len(timed)
    assert compared(other, stored).count("faster") == len(timed)
    with pytest.raises(SystemExit, match=r"absent\.json"):
        compared(stored, tmp_path / "absent.json")


def test_readme_section(
    stored: Path, scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    around = "# Title\n\n<!-- bench:begin -->{}<!-- bench:end -->\n\n## After\n"
    readme.write_text(around.format("\n"))
    readme_table = scripts.module("readme_table")
    monkeypatch.setattr(readme_table, "README", readme)
    monkeypatch.setattr(readme_table, "IN_README", ("histogram_search",))

    with pytest.raises(SystemExit, match="stale"):
        scripts.run("readme_table", stored, "--check")
    scripts.run("readme_table", stored)
    once = readme.read_text()
    section = once.removeprefix("# Title\n\n<!-- bench:begin -->").split("<!-- bench:end -->")[0]
    assert once == around.format(section)
    rows = [row for row in json.loads(stored.read_text())["rows"] if row["unit"] == "x"]
    lines = section.splitlines()
    assert sum(line.startswith("| calculate_qparams") for line in lines) == len(rows)
    assert machine()["cpu"] in section
    scripts.run("readme_table", stored)
    assert readme.read_text() == once
    with pytest.raises(SystemExit) as raised:
        scripts.run("readme_table", stored, "--check")
    assert raised.value.code == 0
