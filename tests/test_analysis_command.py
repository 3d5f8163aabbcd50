"""`python -m fastquant.analysis`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastquant.analysis.command_line import main

MODULE = """
import torch
from torch import nn
import fastquant as fq

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            fq.QuantStub(), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, 3), fq.DeQuantStub(),
        )

    def forward(self, x):
        return self.body(x)

    def fuse_model(self):
        fq.fuse_modules(self.body, ["1", "2", "3"], inplace=True)

def build():
    return Model()

def loader():
    for _ in range(3):
        yield torch.randn(2, 1, 8, 8), 0

BATCHES = [torch.randn(2, 1, 8, 8)]

def nothing():
    return []

def broken():
    raise RuntimeError("no file")

def metric(model):
    assert not model.training
    return 0.25

def no_number(model):
    return "good"
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = "models_of_the_analysis_command"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield name
    sys.modules.pop(name, None)
    torch.set_num_threads(threads)


def run(*words: str) -> int:
    return main([*words, "--quiet", "--threads", "1"])


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_the_report_is_printed_and_written(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--html", "a.html", "--json", "a.json", "--markdown", "a.md")
    status = run(
        f"{module}:build", "--data", f"{module}:loader", "--metric", f"{module}:metric", *files
    )
    shown = capsys.readouterr()
    assert status == 0
    assert "Most damage is done by body." in shown.out
    assert "6 samples in 3 batches" in shown.out
    assert "Metric: 0.25 in float" in shown.out
    assert shown.err == ""
    parsed = json.loads((tmp_path / "a.json").read_text())
    assert [layer["name"] for layer in parsed["layers"]] == ["body.0", "body.1", "body.5"]
    assert parsed["layers"][1]["kind"] == "ConvReLU2d"
    assert "<!DOCTYPE html>" in (tmp_path / "a.html").read_text()
    assert "| rank |" in (tmp_path / "a.md").read_text()


def test_options_reach_the_analysis(module: str, tmp_path: Path) -> None:
    def analysis(*words: str) -> Any:
        assert run(f"{module}:build", "--data", f"{module}:loader", "--json", "a.json", *words) == 0
        return json.loads((tmp_path / "a.json").read_text())

    plain = analysis()
    assert plain["layers"][0]["sensitivity"] is not None
    assert analysis("--no-sensitivity")["layers"][0]["sensitivity"] is None
    assert analysis("--batches", "2")["batches"] == 2
    assert analysis("--qconfig", "qnnpack")["layers"][1]["weight"]["ch_axis"] is None
    assert plain["layers"][1]["weight"]["ch_axis"] == 0
    narrow = analysis("--range-method", "percentile")["layers"][1]["output"]["scale"]
    assert narrow < analysis("--range-method", "minmax")["layers"][1]["output"]["scale"]


def test_a_ratio_that_is_too_low_is_status_1(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"{module}:build", "--data", f"{module}:BATCHES")
    assert run(*words, "--least", "10") == 0
    assert run(*words, "--least", "99") == 1
    assert "less than 99 dB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{0}:build",), "required: --data"),
        (("{0}:build", "--data", "{0}:nothing"), "data is empty"),
        (("{0}:build", "--data", "{0}:broken"), "fails: RuntimeError: no file"),
        (("{0}:build", "--data", "{0}:other"), "'{0}:other' does not exist"),
        (("{0}:nothing", "--data", "{0}:loader"), "must return a torch.nn.Module"),
        (("build", "--data", "{0}:loader"), "model must be module:callable"),
        (
            ("{0}:build", "--data", "{0}:loader", "--metric", "{0}:no_number"),
            "metric must return a number, and returned 'good'",
        ),
        (("{0}:build", "--data", "{0}:loader", "--html", "no/folder.html"), "no/folder.html"),
        (("{0}:build", "--data", "{0}:loader", "--batches", "0"), "invalid number, at least 1,"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    module: str, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failure(capsys, *(word.format(module) for word in words))
    assert message.format(module) in said


def test_the_module_runs(module: str, tmp_path: Path) -> None:
    words = ("-m", "fastquant.analysis", f"{module}:build", "--data", f"{module}:loader")
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "Most damage" in done.stdout
    assert "measuring" in done.stderr
