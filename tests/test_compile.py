"""torch.compile of prepared models: one graph, forward and backward, statistics and all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_same, assert_unchanged, snapshot
from zoo import one_thread, oracle  # noqa: F401  # one_thread is a fixture

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile's inductor backend needs a C++ compiler",
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_a_compiler)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        fq.QuantStub(), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    )


def prepared(kind: str, ns: ModuleType = fq) -> nn.Module:
    """A network that has seen a batch: prepared ("min_max", "histogram") or "qat"."""
    model = body()
    with oracle():
        if kind == "qat":
            model.train().qconfig = fq.get_default_qat_qconfig("x86")
            model = ns.prepare_qat(model)
        else:
            histogram = kind == "histogram"
            model.eval()
            model.qconfig = fq.get_default_qconfig("x86") if histogram else fq.default_qconfig
            model = ns.prepare(model)
        model(torch.randn(4, 3, 8, 8))
    return model


def batches(n: int = 3) -> list[Tensor]:
    # Each wider than the last: histograms are resampled, moving averages move.
    return [torch.randn(4, 3, 8, 8) * (1 + i) for i in range(n)]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    # Inductor sums and fuses in another order: some values land on the other side of a rounding.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["min_max", "histogram"])
def test_a_prepared_model_is_one_graph_that_observes(kind: str, backend: str) -> None:
    model, expected = prepared(kind), prepared(kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for x in batches():
        assert_same(compiled(x), expected(x))
        assert_unchanged(model, snapshot(expected))
    assert graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_qat_model_trains_in_one_graph(backend: str) -> None:
    model, expected = prepared("qat"), prepared("qat")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    same = assert_same if backend == "aot_eager" else assert_near
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, expected)]
    for x in batches():
        y, z = compiled(x), expected(x)
        same(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0
            same(p.grad, q.grad)
        after = snapshot(expected)
        for name, value in snapshot(model).items():
            if value.is_floating_point():
                same(value, after[name])
            else:
                assert_same(value, after[name], name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert graphs() == 1


def test_switches_and_new_statistics_do_not_recompile() -> None:
    model, expected = prepared("qat"), prepared("qat")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, *others = batches(5)
    switches = (
        fq.disable_observer,
        fq.disable_fake_quant,
        fq.enable_observer,
        fq.enable_fake_quant,
    )
    compiled(x)
    expected(x)
    for switch, y in zip(switches, others, strict=True):
        for m in (model, expected):
            m.apply(switch)
        assert_same(compiled(y), expected(y))
        assert_unchanged(model, snapshot(expected))
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["min_max", "histogram", "qat"])
def test_batch_sizes_share_a_dynamic_graph(kind: str) -> None:
    model, expected = prepared(kind), prepared(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5, 8, 13):
        x = torch.randn(n, 3, 8, 8)
        assert_same(compiled(x), expected(x))
    assert_unchanged(model, snapshot(expected))
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["min_max", "qat"])
def test_models_that_torch_ao_prepared_are_one_graph_too(kind: str) -> None:
    """The hooks that feed observers are torch.ao's in either case."""
    model, expected = prepared(kind, tq), prepared(kind, tq)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8) * 3
    assert_same(compiled(x), expected(x))
    assert_unchanged(model, snapshot(expected))


def test_the_first_call_of_a_per_channel_module_says_what_to_do() -> None:
    module = fq.PerChannelMinMaxObserver()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the module once before"):
        compiled(torch.randn(3, 4))
    # Without fullgraph it is a break in the graph, once.
    expected = fq.PerChannelMinMaxObserver()
    compiled = torch.compile(module, backend="aot_eager")
    for x in (torch.randn(3, 4), torch.randn(3, 4) * 2, torch.randn(3, 4) * 3):
        compiled(x)
        expected(x)
        assert_unchanged(module, snapshot(expected))


def test_learned_qparams_have_the_same_gradients() -> None:
    def make() -> Any:
        module = fq.LearnableFakeQuantize(fq.MovingAverageMinMaxObserver)
        module(torch.linspace(-1, 1, 50))
        return module.enable_param_learning()

    module, expected = make(), make()
    x = torch.randn(50)
    y = torch.compile(module, backend="aot_eager")(x)
    assert_same(y, expected(x))
    y.square().sum().backward()
    expected(x).square().sum().backward()
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        assert_same(p.grad, q.grad)


@needs_a_compiler
def test_inductor_keeps_the_order_of_two_calls_of_one_observer() -> None:
    module, expected = fq.MovingAverageMinMaxObserver(), fq.MovingAverageMinMaxObserver()

    def twice(observer: Any, x: Tensor) -> Tensor:
        return observer(x) * 2 + observer(x * 5)

    x = torch.randn(20)
    compiled = torch.compile(twice, fullgraph=True)
    for factor in (1.0, 4.0):
        assert_same(compiled(module, x * factor), twice(expected, x * factor))
        assert_unchanged(module, snapshot(expected))
