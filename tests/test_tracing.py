"""torch.jit.trace and torch.fx.symbolic_trace of prepared models."""

from __future__ import annotations

import copy
import io
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastquant as fq
from processes import python

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def linear(qconfig: Any, qat: bool) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(fq.QuantStub(), nn.Linear(4, 3), fq.DeQuantStub()).train(qat)
    model.qconfig = qconfig
    return (fq.prepare_qat if qat else fq.prepare)(model), torch.randn(8, 4)


def conv_bn(qconfig: Any) -> tuple[nn.Module, Tensor]:
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(fq.QuantStub(), *parts, fq.DeQuantStub()).train()
    model = fq.fuse_modules_qat(model, ["1", "2", "3"])
    model.qconfig = qconfig
    return fq.prepare_qat(model), torch.randn(2, 3, 6, 6)


def learnable() -> fq.QConfig:
    weight = fq.FakeQuantize.with_args(observer=fq.MinMaxObserver, dtype=torch.qint8)
    observer = fq.MinMaxObserver
    return fq.QConfig(fq.LearnableFakeQuantize.with_args(observer=observer), weight)


MODELS = {
    "QAT": lambda: linear(fq.get_default_qat_qconfig(), True),
    "QAT, version 0": lambda: linear(fq.get_default_qat_qconfig(version=0), True),
    "QAT, per tensor": lambda: linear(fq.get_default_qat_qconfig("qnnpack"), True),
    "QAT, histograms": lambda: linear(
        fq.QConfig(
            fq.default_histogram_fake_quant.with_args(bins=64), fq.default_weight_fake_quant
        ),
        True,
    ),
    "QAT, learnable": lambda: linear(learnable(), True),
    "QAT, batch norm": lambda: conv_bn(fq.get_default_qat_qconfig()),
    "QAT, batch norm, version 0": lambda: conv_bn(fq.get_default_qat_qconfig(version=0)),
    "min/max": lambda: linear(fq.default_qconfig, False),
    "histograms": lambda: linear(
        fq.QConfig(fq.HistogramObserver.with_args(bins=256), fq.default_weight_observer), False
    ),
    "per channel": lambda: linear(
        fq.QConfig(
            fq.PerChannelMinMaxObserver.with_args(ch_axis=-1),
            fq.default_per_channel_weight_observer,
        ),
        False,
    ),
    "moving averages": lambda: linear(
        fq.QConfig(fq.MovingAverageMinMaxObserver, fq.default_weight_observer), False
    ),
}
STATES = ("eval", "training", "frozen")


def in_state(name: str, state: str) -> tuple[nn.Module, Tensor]:
    model, x = MODELS[name]()
    model(x)
    if state == "frozen":
        model.apply(fq.disable_observer)
    return model.train(state == "training"), x


def traced(model: nn.Module, x: Tensor) -> Any:
    # A training batch norm changes between the calls that the check compares.
    return torch.jit.trace(copy.deepcopy(model), x, check_trace=not model.training)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
def test_traces_hold_ops_of_torch_alone_and_do_the_same(name: str, state: str) -> None:
    if "learnable" in name and state != "frozen":
        pytest.skip("scale and zero point are set by their `data`, which no trace records")
    model, x = in_state(name, state)
    trace = traced(model, x)
    graph = str(trace.inlined_graph)
    assert "fastquant::" not in graph
    assert "PythonOp" not in graph
    # Tracing has run the model, once or, to check, more often.
    model.load_state_dict(trace.state_dict(), strict=False)
    for factor in (1, 3, 0.1):
        torch.testing.assert_close(trace(factor * x), model(factor * x))
        ours = model.state_dict()
        for key, value in trace.state_dict().items():
            if key in ours:
                torch.testing.assert_close(value, ours[key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", [name for name in MODELS if "QAT" in name])
def test_traces_have_the_gradients(name: str) -> None:
    model, x = in_state(name, "frozen")
    trace = traced(model, x)
    if "learnable" in name:
        for part in (model, trace):
            for key, parameter in part.named_parameters():
                parameter.requires_grad_(True), key
    gradients = []
    for part in (model, trace):
        inputs = (3 * x).requires_grad_()
        part(inputs).square().sum().backward()
        gradients.append({"x": inputs.grad, **{k: p.grad for k, p in part.named_parameters()}})
    assert gradients[0]["x"].count_nonzero()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_a_saved_trace_runs_where_there_is_no_fastquant(tmp_path: Path) -> None:
    for i, name in enumerate(MODELS):
        model, x = in_state(name, "frozen" if "learnable" in name else "eval")
        trace = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)  # checked above
        torch.jit.save(trace, tmp_path / f"{i}.pt")
        torch.save((x, trace(x)), tmp_path / f"{i}.expected")
    code = f"""
        import pathlib, sys
        sys.modules["fastquant"] = None
        import torch
        paths = list(pathlib.Path({str(tmp_path)!r}).glob("*.pt"))
        assert len(paths) == {len(MODELS)}
        for path in paths:
            x, expected = torch.load(path.with_suffix(".expected"))
            torch.testing.assert_close(torch.jit.load(path)(x), expected, msg=str(path))
    """
    run = python(textwrap.dedent(code))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", [name for name in MODELS if "QAT" in name and "hist" not in name])
def test_a_model_that_saw_nothing_can_be_traced(name: str) -> None:
    model, x = MODELS[name]()
    trace = traced(model.train(), x)
    model(x)
    torch.testing.assert_close(trace(x), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ch_axis", [None, 0, -1])
def test_traced_fake_quantizers_take_every_dtype(dtype: torch.dtype, ch_axis: int | None) -> None:
    observer, qscheme = fq.MinMaxObserver, torch.per_tensor_affine
    kwargs = {}
    if ch_axis is not None:
        observer, qscheme = fq.PerChannelMinMaxObserver, torch.per_channel_affine
        kwargs["ch_axis"] = ch_axis
    module = fq.FakeQuantize(observer, qscheme=qscheme, **kwargs)
    x = torch.randn(4, 6).to(dtype)
    module(x)
    module.disable_observer()
    y = torch.jit.trace(module, x)(2 * x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, module(2 * x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fake_quantizes", [False, True])
def test_what_observes_channels_can_be_traced_before_its_first_tensor(fake_quantizes: bool) -> None:
    def fresh() -> nn.Module:
        if fake_quantizes:
            observer = fq.MovingAveragePerChannelMinMaxObserver
            return fq.FakeQuantize(observer, ch_axis=1, qscheme=torch.per_channel_affine)
        return fq.PerChannelMinMaxObserver(ch_axis=1)

    module, x = fresh(), torch.randn(4, 3, 2)
    trace = torch.jit.trace(fresh(), x, check_trace=False)
    module(x)
    for factor in (1, 3):
        torch.testing.assert_close(trace(factor * x), module(factor * x))
    expected = module.state_dict()
    for key, value in trace.state_dict().items():
        if key in expected:
            torch.testing.assert_close(value, expected[key])


def test_the_older_onnx_exporter_takes_a_trained_model() -> None:
    onnx = pytest.importorskip("onnx")
    model, x = in_state("QAT, version 0", "frozen")
    file = io.BytesIO()
    torch.onnx.export(model.eval(), (x,), file, dynamo=False, opset_version=17)
    kinds = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 3


# ------------------------------------------------------------------------- torch.fx.symbolic_trace


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["QAT", "QAT, version 0", "QAT, per tensor"])
def test_symbolic_traces_do_the_same(name: str, state: str) -> None:
    model, x = in_state(name, state)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    results = []
    for part in (model, graph):
        for factor in (1, 3):
            inputs = (factor * x).requires_grad_()
            y = part(inputs)
            y.square().sum().backward()
        results.append((y.detach(), inputs.grad, dict(part.named_parameters())["1.weight"].grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    ours = model.state_dict()
    shared = [key for key in graph.state_dict() if key in ours]
    assert any("min_val" in key for key in shared)
    for key in shared:
        assert torch.equal(graph.state_dict()[key], ours[key]), key


def test_symbolic_traces_of_other_observers_need_them_off() -> None:
    module = fq.default_histogram_fake_quant()
    x = torch.randn(100)
    module(x)
    with pytest.raises(TypeError, match=r"HistogramObserver: call disable_observer\(\) first"):
        torch.fx.symbolic_trace(module)
    module.disable_observer()
    assert torch.equal(torch.fx.symbolic_trace(module)(x), module(x))


def test_traces_of_converted_models_can_be_saved() -> None:
    model, x = in_state("QAT", "eval")
    converted = fq.convert(model)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(converted, x), buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), converted(x))
