"""torch.compile of prepared models: one graph, forward and backward, statistics and all."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from oracle import assert_same, assert_unchanged, quiet, snapshot
from zoo import prepared

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_classes_that_no_call_has_seen_are_compiled_once() -> None:
    class Observer(fq.MovingAverageMinMaxObserver):
        pass

    class FakeQuantize(fq.FakeQuantize):
        pass

    module, expected = FakeQuantize(Observer), fq.FakeQuantize(fq.MovingAverageMinMaxObserver)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in batches():
        assert_same(compiled(x), expected(x))
    assert_unchanged(module, snapshot(expected))
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


PER_CHANNEL = {
    "observer": fq.PerChannelMinMaxObserver,
    "moving average": fq.MovingAveragePerChannelMinMaxObserver,
    "fake-quantizer": fq.default_per_channel_weight_fake_quant,
    "fused": fq.default_fused_per_channel_wt_fake_quant,
    "user's": lambda: fq.FakeQuantize(OwnPerChannel, qscheme=torch.per_channel_affine),
}


class OwnPerChannel(fq.PerChannelMinMaxObserver):
    def forward(self, x_orig: Tensor) -> Tensor:
        return super().forward(x_orig * 2)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("kind", PER_CHANNEL)
def test_a_graph_may_give_a_per_channel_module_its_size(kind: str, fullgraph: bool) -> None:
    module, expected = PER_CHANNEL[kind](), PER_CHANNEL[kind]()
    compiled = torch.compile(module, fullgraph=fullgraph, backend="aot_eager")
    for factor in (1, 2, 0.5):
        x = (torch.randn(3, 4) * factor).requires_grad_("fake" in kind)
        y, z = compiled(x), expected(x)
        assert_same(y.detach(), z.detach())
        assert_unchanged(module, snapshot(expected))
        if x.requires_grad:
            assert_same(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, z)))


def fresh_qat(ns: ModuleType = fq) -> nn.Module:
    """A QAT model that has seen no batch, with per-channel weights, fused with batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        fq.QuantStub(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 5), fq.DeQuantStub(),
    ).train()  # fmt: skip
    with quiet():
        ns.fuse_modules_qat(model, [["1", "2", "3"]], inplace=True)
        model.qconfig = ns.get_default_qat_qconfig("x86")
        ns.prepare_qat(model, inplace=True)
    return model


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_qat_model_trains_compiled_from_its_first_batch_on(fullgraph: bool) -> None:
    model, expected = fresh_qat(), fresh_qat()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for x in batches():
        y, z = compiled(x), expected(x)
        assert_near(y, z)
        y.square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            p.grad = None
    assert graphs() == 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_qat_model_is_exported_before_its_first_batch(strict: bool) -> None:
    x = torch.randn(4, 3, 8, 8)
    exported = torch.export.export(fresh_qat(), (x,), strict=strict).module()
    assert_near(exported(x), fresh_qat()(x))


def test_averages_of_a_qat_model_begin_before_its_first_batch() -> None:
    model = fresh_qat()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for x in batches():
        model(x)
        average.update_parameters(model)
    average(torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize(("source", "target"), [(fq, tq), (tq, fq), (fq, fq)])
@pytest.mark.parametrize("onto", ["a fresh model", "a trained one"])
def test_states_of_qat_models_load_both_ways(
    source: ModuleType, target: ModuleType, observed: bool, onto: str
) -> None:
    written, read = fresh_qat(source), fresh_qat(target)
    for model, trained in ((written, observed), (read, onto == "a trained one")):
        if trained:
            model(torch.randn(4, 3, 8, 8))
    state = written.state_dict()
    with quiet():
        expected = {k: (v.shape, v.dtype) for k, v in fresh_qat(tq).state_dict().items()}
    if not observed:
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == expected
    read.load_state_dict(copy.deepcopy(state), strict=True)
    for key, value in read.state_dict().items():
        assert_same(value, state[key], key)
    x = torch.randn(4, 3, 8, 8)
    y = read(x)
    assert y.isfinite().all()
    if source is target:
        assert_same(y, written(x))


def test_a_state_from_before_the_first_batch_leaves_the_sizes() -> None:
    model = fresh_qat()
    sizes = {name: buffer.shape for name, buffer in model.named_buffers()}
    model.load_state_dict(fresh_qat(tq).state_dict())
    assert {name: buffer.shape for name, buffer in model.named_buffers()} == sizes


class Doubling(fq.MovingAverageMinMaxObserver):
    """A user's observer, with buffers of its own that it replaces, and Python state."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("seen", torch.zeros(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + float(x.max())
        return super().forward(x * 2)


IN_STEPS = {
    "histogram": fq.HistogramObserver,
    "user's": Doubling,
    "torch.ao's": tq.HistogramObserver,
    "hooked": fq.MinMaxObserver,
}


def in_steps(kind: str) -> nn.Module:
    """A network with fake-quantizers that do what no single op does."""
    torch.manual_seed(0)
    with quiet():
        a, b = (fq.FakeQuantize(IN_STEPS[kind]) for _ in range(2))
    if kind == "hooked":
        for module in (a, b):
            module.activation_post_process.register_forward_hook(lambda *_: None)
    return nn.Sequential(nn.Linear(6, 5), a, nn.ReLU(), nn.Linear(5, 4), b)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "aot_eager") for kind in IN_STEPS),
        pytest.param("histogram", "inductor", marks=needs_a_compiler),
    ],
)
def test_any_observer_may_be_in_a_fake_quantizer_of_a_graph(kind: str, backend: str) -> None:
    model, expected = in_steps(kind), in_steps(kind)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    same = assert_same if backend == "aot_eager" else assert_near
    switches = (
        fq.disable_observer,
        fq.disable_fake_quant,
        fq.enable_observer,
        fq.enable_fake_quant,
    )
    for i in range(6):
        x = torch.randn(8 + i, 6) * (1 + i)
        with quiet():
            y, z = compiled(x), expected(x)
        same(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            same(p.grad, q.grad)
        if backend == "aot_eager":
            assert_unchanged(model, snapshot(expected))
        for m in (model, expected):
            m.apply(switches[i % 4])
    assert graphs() == 1
    if kind == "user's":
        for a, b in zip(model.modules(), expected.modules(), strict=True):
            assert getattr(a, "calls", 0) == getattr(b, "calls", 0)


def test_graphs_of_two_modules_of_a_kind_observe_each_its_own() -> None:
    modules = [fq.FakeQuantize(fq.HistogramObserver) for _ in range(2)]
    modules.append(copy.deepcopy(modules[0]))
    modules.append(pickle.loads(pickle.dumps(modules[0])))
    for i, module in enumerate(modules):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        compiled(torch.full((3,), float(i)))
    for i, module in enumerate(modules):
        assert float(module.activation_post_process.max_val) == i


def test_an_error_in_a_graph_leaves_the_statistics() -> None:
    module = fq.FakeQuantize(fq.HistogramObserver, nonfinite="raise")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(20))
    before = snapshot(module)
    tensors = dict(module.named_buffers())
    with pytest.raises(ValueError, match="1 non-finite"):
        compiled(torch.tensor([1.0, float("nan")]))
    assert_unchanged(module, before)
    assert all(dict(module.named_buffers())[name] is t for name, t in tensors.items())


def test_a_graph_in_several_threads_leaves_the_module_its_buffers() -> None:
    module = fq.FakeQuantize(fq.HistogramObserver)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(torch.linspace(-1, 1, 100))
    tensors = list(module.buffers())

    def work() -> None:
        for _ in range(20):
            compiled(torch.linspace(-1, 1, 100))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(a is b for a, b in zip(module.buffers(), tensors, strict=True))


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
