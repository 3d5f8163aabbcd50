"""benchmarks/gpu.py, rehearsed on the CPU: what it would measure on a GPU, and in what time."""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fastquant

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(path: Path, *more: str) -> str | None:
    """Run the benchmark as a command; what it complains of at its end."""
    arguments = ["--rehearse", "--rounds", "1", "--threads", "1", "--json", str(path)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, *more])
        try:
            importlib.import_module("gpu").main()
        except SystemExit as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    path = tmp_path_factory.mktemp("gpu") / "result.json"
    # What is compiled for one size must serve the others as it is.
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[no-untyped-call]
        assert run(path, "--seconds", "600") is None
    stored: list[Row] = json.loads(path.read_text())["rows"]
    return stored


def of_part(rows: list[Row], part: str) -> list[Row]:
    return [row for row in rows if row["benchmark"].startswith(part)]


def test_sweep_has_every_kind_dtype_layout_and_size(rows: list[Row]) -> None:
    sweep = importlib.import_module("gpu_sweep")
    sizes = sweep.REHEARSED
    found = collections.Counter()
    for row in of_part(rows, "sweep"):
        if "against" not in row["work"]:
            assert row["seconds"].keys() >= {"fastquant", "torch.ao"}
            found[row["work"], row["input"].split(" ")[0]] += 1
    kinds = ("observer", "fake-quantize, forward", "fake-quantize, forward + backward")
    kinds += ("fused, forward", "fused, forward + backward")
    for dtype in ("fp32", "fp16", "bf16"):
        for kind in kinds:
            for layout, layouts in (("per tensor", 1), ("axis 0", 1), ("axis 1", 2)):
                assert found[f"{kind}, {layout}", dtype] == layouts * len(sizes.shapes)
            assert found[f"{kind}, last axis", dtype] == len(sizes.shapes)
        assert found["histogram, per tensor", dtype] == len(sizes.shapes)


def test_sweep_compares_with_what_is_compiled(rows: list[Row]) -> None:
    sweep = of_part(rows, "sweep")
    works = {(row["work"], row["input"]) for row in sweep}
    for row in sweep:
        if "against" not in row["work"]:
            expected = "per tensor" in row["work"] or row["input"].startswith("fp32")
            against = (f"{row['work']}: against torch.compile", row["input"])
            assert (against in works) == expected, row


def targets(rows: list[Row], *words: str) -> set[tuple[float, bool]]:
    """The targets of rows whose work has all these words: bound, and whether that is the least."""
    return {
        (row["target"]["bound"], row["target"]["at_least"])
        for row in rows
        if all(word in row["work"] for word in words) and row["target"] is not None
    }


def test_targets_are_those_for_gpus(rows: list[Row]) -> None:
    sweep = of_part(rows, "sweep")
    assert targets(sweep, "copies") == {(1 / 0.85, False)}
    assert targets(sweep, "histogram, per tensor: against a read") == {(2, False)}
    assert targets(sweep, "against torch.compile") == {(1, True)}
    for row in sweep:
        if "against" not in row["work"]:
            usual = "[4, 8, 8, 8]" in row["input"] or "[8, 4, 8, 8]" in row["input"]
            assert row["target"] == {"bound": 2 if usual else 1, "at_least": True}
    models = of_part(rows, "models")
    assert targets(models, "resnet50: calibration") == {(0.15, False)}
    for dtype in ("float32", "float16 autocast", "bfloat16 autocast"):
        assert targets(models, "resnet50: QAT step,", dtype, "over float") == {(0.15, False)}
        assert targets(models, "resnet50: QAT step as a graph", dtype, "over float")
    assert of_part(rows, "fused ops")


def test_sizes_go_from_128_to_a_thousand_million() -> None:
    sizes = importlib.import_module("gpu_sweep").SIZES
    numbers = [torch.Size(shape).numel() for shape in sizes.shapes]
    assert numbers[0] == 128
    assert numbers[-1] == 1 << 30
    assert all(a < b <= 8 * a for a, b in itertools.pairwise(numbers))
    least, most = sizes.usual
    assert sum(least <= number <= most for number in numbers) >= 4
    # Few elements and more are compiled for sizes of their own.
    few, more = (torch.Size(shape).numel() for shape in sizes.compiled_for)
    assert few < sizes.few <= more


@pytest.mark.parametrize("layout", range(5))
def test_compiled_formulas_do_what_modules_do(layout: int) -> None:
    formulas, sweep = importlib.import_module("gpu_formulas"), importlib.import_module("gpu_sweep")
    where = sweep.LAYOUTS[layout]
    generator = torch.Generator().manual_seed(layout)
    first, x = (
        where.empty((3, 4, 5, 6), torch.float32, torch.device("cpu")).normal_(generator=generator)
        for _ in range(2)
    )
    view = formulas.View.of(x, where.axis)

    observer = sweep.observer(fastquant, where.axis)
    observer(first)
    low, high = observer.min_val.clone(), observer.max_val.clone()
    observer(x)
    formulas.observe(view.x, view.reduced, low, high)
    assert torch.equal(low, observer.min_val)
    assert torch.equal(high, observer.max_val)

    module = sweep.fake_quantizer(fastquant.FusedMovingAvgObsFakeQuantize, fastquant, where.axis)
    module(first)
    its = module.activation_post_process
    shape = low.shape
    names = (its.min_val, its.max_val, module.scale, module.zero_point)
    state = [value.clone().float().reshape(shape) for value in names]
    leaf, own = view.x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    levels = (its.quant_min, its.quant_max)
    y = formulas.fused(leaf, view.reduced, view.channels, *state, *levels)
    expected = module(own)
    for value, name in zip(state, names, strict=True):
        assert torch.allclose(value, name.float().reshape(shape), rtol=1e-5)
    # Whatever lies between two levels may become either, for want of a bit.
    unequal = (y - formulas.View.of(expected, where.axis).x).abs() > 1e-5
    assert unequal.sum() <= 1
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    (theirs,) = torch.autograd.grad(expected, own, torch.ones_like(expected))
    assert (gradient != formulas.View.of(theirs, where.axis).x).sum() <= 1


def test_time_that_is_up_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    said = run(path, "--seconds", "0")
    assert said is not None
    assert said.startswith("failed: models")
    assert not path.exists()


def test_a_job_that_fails_stops_no_other_unless_the_gpu_is_lost() -> None:
    timing = importlib.import_module("gpu_timing")
    ran = []

    def job(name: str) -> None:
        ran.append(name)
        if name == "bad":
            raise RuntimeError("out of memory")

    jobs = [timing.Job(name, functools.partial(job, name)) for name in ("bad", "good")]
    bench = timing.Bench(timing.Rehearsal(), 60)
    with pytest.raises(timing.IncompleteError, match="bad"):
        bench.run(jobs)
    assert ran == ["bad", "good"]
    with (
        mock.patch.object(timing.Rehearsal, "works", return_value=False),
        pytest.raises(timing.IncompleteError, match="the GPU is lost"),
    ):
        bench.run(jobs)
    assert ran == ["bad", "good", "bad"]


def test_rounds_fit_into_the_time_there_is() -> None:
    timing = importlib.import_module("gpu_timing")

    class Slow(timing.Rehearsal):  # type: ignore[misc, name-defined]
        def seconds(self, run: Any, calls: int) -> float:
            return 0.01

    counts = []
    bench = timing.Bench(Slow(), 2.0)
    cases = {name: lambda: None for name in ("a", "b")}

    def job() -> None:
        counts.append(bench.timed(cases, 20))

    for jobs in (1, 10, 100):
        bench.run([timing.Job("timed", job)] * jobs)
    first, tenth, hundredth = (counts[i].undisturbed for i in (0, 1, 11))
    assert first == 20
    assert 3 < tenth < 20
    assert hundredth == 3
    assert {name: len(times) for name, times in counts[0].seconds.items()} == {"a": 20, "b": 20}


def test_what_the_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = importlib.import_module("gpu_timing")
    for name in ("Event", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    for name in ("current_stream", "stream", "graph", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    torch.cuda.Event.return_value.elapsed_time.return_value = 6.0  # type: ignore[attr-defined]
    gpu, calls = timing.Gpu(), []
    assert gpu.seconds(lambda: calls.append(0), 3) == pytest.approx(0.002)
    assert len(calls) == 4  # one of them ahead, untimed
    assert callable(gpu.recorded(lambda: calls.append(1)))
    assert calls[4:] == [1] * 4  # three ahead, and the one that is recorded
    gpu.free()
