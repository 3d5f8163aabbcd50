"""The scripts in benchmarks/, and the tables made of their stored results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastquant.bench.machine import machine

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


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


def test_a_benchmark_that_fails_loses_no_rows(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    stored_meanwhile = []

    def fails_after_a_row(suite: Any) -> None:
        suite.add_value("first", "input", 1.0, "x")
        stored_meanwhile.append(path.exists())
        raise RuntimeError("no memory")

    def works(suite: Any) -> None:
        suite.add_value("second", "input", 2.0, "x")

    options = harness.parser(None).parse_args(["--threads", "1"])
    with pytest.raises(SystemExit, match="failed: fails"):
        harness.run_benchmarks({"fails": fails_after_a_row, "works": works}, options, path)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["benchmark"], row["work"]) for row in rows] == [
        ("fails", "first"),
        ("works", "second"),
    ]
    assert stored_meanwhile == [True]


def test_pages_with_measurements(
    stored: Path, scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, qat_page, tables = (tmp_path / name for name in ("README.md", "qat.md", "tables.md"))
    around = (
        "# Title\n\n<!-- headline:begin -->\n\n<!-- headline:end -->\n\n"
        "<!-- bench:begin -->{}<!-- bench:end -->\n\n## After\n"
    )
    readme.write_text(around.format("\n"))
    qat_page.write_text("# QAT\n\n<!-- bench:begin -->\n\n<!-- bench:end -->\n")
    readme_table = scripts.module("readme_table")
    monkeypatch.setattr(readme_table, "README", readme)
    monkeypatch.setattr(readme_table, "QAT_PAGE", qat_page)
    tables.write_text(
        "# Tables\n\n<!-- bench:begin -->\n\n<!-- bench:end -->\n\n"
        "<!-- others:begin -->\n\n<!-- others:end -->\n"
    )
    monkeypatch.setattr(readme_table, "TABLES_PAGE", tables)
    monkeypatch.setattr(readme_table, "TABLES", {"Search": ("histogram_search",)})

    with pytest.raises(SystemExit, match=r"README\.md is stale"):
        scripts.run("readme_table", stored, "--check")
    scripts.run("readme_table", stored)
    once = readme.read_text()
    section = once.split("<!-- bench:begin -->")[1].split("<!-- bench:end -->")[0]
    assert once == around.format(section)
    rows = [row for row in json.loads(stored.read_text())["rows"] if row["unit"] == "x"]
    lines = tables.read_text().splitlines()
    assert sum(line.startswith("| calculate_qparams") for line in lines) == len(rows)
    assert machine()["cpu"] in section
    scripts.run("readme_table", stored)
    assert readme.read_text() == once
    scripts.run("readme_table", stored, "--check")
    qat_page.write_text(qat_page.read_text().replace(":end", "|"))
    with pytest.raises(SystemExit, match=r"qat\.md must hold"):
        scripts.run("readme_table", stored)


def test_page_with_tables_shows_models_of_other_machines(
    scripts: Scripts, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme_table = scripts.module("readme_table")
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="make bench"):
        readme_table.stored_results()
    for name, steps in (("small", 1), ("large", 2)):
        suite = harness.Suite("whole_models", rounds=1, threads=1)
        for step in range(steps):
            suite.add_value(f"{name}: QAT step {step}", "x", -0.2, "more")
        result = {"format": 1, "date": "2026-01-01", "machine": {**machine(), "cpu": name}}
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "rows": suite.rows}))
    first, second = readme_table.stored_results()
    assert (first.name, second.name) == ("large.json", "small.json")
    text = readme_table.other_machines([second])
    assert text.startswith("small, ")
    assert "| small: QAT step 0 | -20% |" in text.splitlines()


def test_page_about_qat_shows_the_fused_ops(scripts: Scripts, harness: ModuleType) -> None:
    suite = harness.Suite("batch_norm", rounds=1, threads=1)
    for dtype in ("fp32", "bf16"):
        for what, value, unit in (
            ("", 9.0, "x"),
            (", against modules", 4.0, "x"),
            (", against float", 3.0, "x"),
            (", against memory", 1.25, "of limit"),
        ):
            if what or dtype == "fp32":
                timed = harness.Rounds({"fastquant": [0.002]}, 1)
                work = f"batch norm{what}"
                suite.add_rounds(work, dtype, timed, lambda _, value=value: value, unit)
    table = scripts.module("readme_table").fused_ops({"rows": suite.rows}).splitlines()
    assert table[2:] == [
        "| batch norm | fp32 | 1 | 2.00 ms | 9.00x | 4.00x | 3.00x | 1.25 |",
        "| batch norm | bf16 | 1 | 2.00 ms |  | 4.00x | 3.00x | 1.25 |",
    ]


def test_readme_begins_with_what_a_qat_step_costs(scripts: Scripts, harness: ModuleType) -> None:
    suite = harness.Suite("whole_models", rounds=1, threads=1)
    headline = scripts.module("readme_table").headline
    assert headline(suite.rows) == ""
    for model, ours, theirs in (("mobilenet_v2", -0.21, 1.6), ("resnet18", 0.04, 0.5)):
        suite.add_value(f"{model}: QAT step over float", "x", ours, "more")
        suite.add_value(f"{model}: QAT step, torch.ao's", "x", theirs, "more")
    sentence = " ".join(headline(suite.rows).split())
    assert "beyond that of a step in float: MobileNetV2 -21%, ResNet-18 +4%." in sentence
    assert "With torch.ao: MobileNetV2 +160%, ResNet-18 +50%." in sentence


def test_readme_shows_qat_steps_of_whole_models_first(
    scripts: Scripts, harness: ModuleType
) -> None:
    rows = []
    for threads in (1, 2):
        suite = harness.Suite("whole_models", rounds=1, threads=threads)
        suite.add_value("net: calibration forward over float", "x", 0.1 * threads, "more")
        suite.add_value("net: QAT step over float", "x", -0.2 * threads, "more")
        rows += suite.rows
    lines = scripts.module("readme_table").whole_models(rows)
    assert [line for line in lines if line.startswith("|")] == [
        "| model | 1 thread | 2 threads |",
        "|---|--:|--:|",
        "| net: QAT step over float | -20% | -40% |",
        "| net: calibration forward over float | +10% | +20% |",
    ]


def test_exported_models_have_a_row_for_each_number_of_threads(
    scripts: Scripts, harness: ModuleType
) -> None:
    rows = []
    for threads in (1, 2):
        suite = harness.Suite("onnx_models", rounds=1, threads=threads)
        suite.add_value("resnet18, QAT: int8 in onnxruntime", "x", 5000.0 / threads, "µs")
        suite.add_value("resnet18, QAT: native int8", "x", 4000.0 / threads, "µs")
        suite.add_value("resnet18, QAT, in onnxruntime: over float there", "x", 4.0, "x")
        rows += suite.rows
    result = {"rows": rows, "date": "2026-01-01", "machine": machine()}
    text = scripts.module("readme_table").exported_models(result, "onnx_models")
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| model | threads | int8 in onnxruntime | native int8 |",
        "|---|--:|--:|--:|",
        "| ResNet-18, QAT | 1 | 5.00 ms | 4.00 ms |",
        "| ResNet-18, QAT | 2 | 2.50 ms | 2.00 ms |",
    ]


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
@pytest.mark.filterwarnings("ignore")  # torch.ao's own
def test_qat_trains_as_well_as_with_torch_ao(scripts: Scripts) -> None:
    accuracy = scripts.module("accuracy")
    # Hardly trained in float: what is reached is what QAT has learned.
    study = accuracy.digits(epochs=1, qat_epochs=2)
    before = study.scores(study.trained)
    for result in accuracy.compare(study, runs=2):
        ours = result.values["fastquant"]
        if "accuracy" in result.measure:
            assert min(ours) > before[result.measure] + 2
            assert abs(result.difference) <= max(1.0, 3 * result.standard_error)
        else:
            assert max(ours) < 0.5 * before["test loss"]
            assert abs(result.difference) <= max(0.02, 3 * result.standard_error)
