"""`fastquant.bench`: its report, and the command `python -m fastquant.bench`."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant
from fastquant import bench
from fastquant.bench.machine import machine
from fastquant.bench.timing import (
    Summary,
)

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
    assert ("each observer runs alone" in table) == (mode == "qat")
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


class WithAffineWeights(nn.Module):
    """A layer that has no native form between two that have."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = fastquant.QuantStub(), fastquant.DeQuantStub()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.embedding = nn.Embedding(4, 8)

    def forward(self, indices: Tensor, values: Tensor) -> Tensor:
        hidden = self.quant(self.embedding(indices) + values)
        result: Tensor = self.dequant(self.last(self.first(hidden)))
        return result


@pytest.mark.parametrize("qconfig", ["x86", "native"])
def test_run_int8(qconfig: str, threads: None) -> None:
    model = bench.small_cnn().train()
    before = state(model)
    x = torch.randn(2, 3, 16, 16)
    torch.set_num_threads(2)
    report = bench.run_int8(model, x, qconfig=qconfig, rounds=3, threads=1)
    assert torch.get_num_threads() == 2
    assert model.training
    assert state(model).keys() == before.keys()
    assert list(report.seconds) == ["float", "fastquant", "torch.ao"]
    assert all(len(values) == 3 and min(values) > 0 for values in report.seconds.values())
    names = {"quant", "features.0.0", "features.1.0", "features.2.0", "classifier"}
    assert {layer.name for layer in report.layers} == names
    assert report.torch_ao_error is None
    assert report.floating == {}
    assert all(25 < value < 80 for value in report.signal_to_noise.values())
    speed = report.speed("fastquant", "float").median
    assert f"{speed:.2f}x float" in report.table()
    assert json.loads(json.dumps(report.as_dict()))["mode"] == "int8"


def test_run_int8_names_layers_that_stay_floating() -> None:
    inputs = {"indices": torch.tensor([0, 3]), "values": torch.randn(2, 8)}
    report = bench.run_int8(WithAffineWeights(), inputs, rounds=1, progress=False)
    assert list(report.floating) == ["embedding"]
    assert "embedding stays floating" in report.table()
    assert report.torch_ao_error is not None
    assert "torch.ao cannot do this" in report.table()
    assert list(report.seconds) == ["float", "fastquant"]


def test_run_int8_refuses_in_words() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="qconfig must be one of"):
        bench.run_int8(bench.small_cnn(), x, qconfig="cuda")
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        bench.run_int8(bench.small_cnn(), x, rounds=0)
    with pytest.raises(bench.BenchError, match="does not run on the input"):
        bench.run_int8(bench.small_cnn(), torch.randn(2, 4, 16, 16), progress=False)
    with pytest.raises(bench.BenchError, match="nothing in the model is quantized"):
        bench.run_int8(nn.Sequential(nn.ReLU()), x, progress=False)


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
