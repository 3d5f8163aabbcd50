"""FloatFunctional's additions in QAT: one op, or torch.ao's own steps where somebody looks on."""

from __future__ import annotations

import copy
import pickle
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastquant as fq
import fastquant.nn.quantized as nnq
from oracle import assert_same, quiet
from processes import python
from strategies import FLOATS, LAYOUTS, random_values

NAMES = ("add", "add_relu")
OURS = "fastquant::add_observe_fake_quantize"


class Residual(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.functional = nnq.FloatFunctional()
        self.name = name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = getattr(self.functional, self.name)(x, y)
        return result


def prepared(name: str = "add_relu", qconfig: Any = None) -> Any:
    model = Residual(name).train()
    model.qconfig = qconfig or fq.get_default_qat_qconfig("x86")
    return fq.prepare_qat(model)


@contextmanager
def torchs_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            theirs = getattr(nnq.FloatFunctional, name)
            patch.setattr(nnq.FloatFunctional, name, getattr(theirs, "__wrapped__", theirs))
        yield


def is_one_op(call: Callable[[], Any]) -> bool:
    with torch.profiler.profile() as profile:
        call()
    names = {event.name for event in profile.events()}
    assert (OURS in names) != ("aten::add" in names), names
    return OURS in names


def pair(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    values = (random_values((2, 6, 5, 7), dtype, seed, "outliers") for seed in range(2))
    return [LAYOUTS[layout](v, 1) for v in values]


def step(model: Any, tensors: list[Tensor], needing: tuple[bool, ...] = (True, True)) -> list[Any]:
    """Result, buffers and gradients of a training step."""
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needing, strict=True)]
    result = model(*leaves)
    gradients = []
    if result.requires_grad:
        grad = torch.empty_like(result).copy_(result.detach().square().cos())
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = list(torch.autograd.grad(result, wanted, grad))
    return [result.detach(), *gradients, *(b.clone() for b in model.buffers())]


def assert_as_torchs(model: Any, steps: Callable[[Any], list[Any]]) -> None:
    other = copy.deepcopy(model)
    ours = steps(model)
    with torchs_way():
        theirs = steps(other)
    assert_same(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_results_ranges_and_gradients_are_torchs(
    name: str, dtype: torch.dtype, layout: str
) -> None:
    tensors = pair(dtype, layout)
    for needing in ((True, True), (True, False), (False, True), (False, False)):
        assert_as_torchs(
            prepared(name),
            lambda m, needing=needing: step(m, tensors, needing) + step(m, tensors[::-1], needing),
        )


@pytest.mark.parametrize("name", NAMES)
def test_an_addition_is_one_op(name: str) -> None:
    model = prepared(name)
    x, y = pair()
    assert is_one_op(lambda: model(x, y))
    assert is_one_op(lambda: model(x.requires_grad_(), y).sum().backward())
    with torch.no_grad():
        assert is_one_op(lambda: model(x, nn.Parameter(y)))
    with torch.inference_mode():
        assert is_one_op(lambda: model(x, y))
    model.apply(fq.disable_observer)
    assert is_one_op(lambda: model.eval()(x, y))


@pytest.mark.parametrize(("module", "name"), [(torch, "add"), (torch.nn.functional, "relu")])
def test_a_replaced_function_of_torch_is_called(module: Any, name: str, monkeypatch: Any) -> None:
    model, calls = prepared("add_relu"), []
    function = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    model(*pair())
    assert calls == [name]


@pytest.mark.parametrize("name", NAMES)
def test_switches_are_heeded_in_the_middle_of_training(name: str) -> None:
    def steps(model: Any) -> list[Any]:
        results = []
        for switch in (
            fq.disable_fake_quant,
            fq.enable_fake_quant,
            fq.disable_observer,
            tq.disable_fake_quant,
            tq.enable_observer,
            lambda m: m.eval(),
        ):
            results += step(model.apply(switch), pair())
        return results

    assert_as_torchs(prepared(name), steps)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.randn(3, 1), torch.randn(4)),
        (torch.randn(3, 4), torch.randn(3, 4, dtype=torch.double)),
        (torch.randn(3, 4), torch.randn(4, 3).t()),
        (torch.randn(0, 4), torch.randn(0, 4)),
        (torch.randn(()), torch.randn(())),
        (torch.full((3, 4), torch.nan), torch.randn(3, 4)),
        (torch.full((3, 4), torch.inf), torch.full((3, 4), -torch.inf)),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_any_tensors_are_added_as_torch_does(name: str, x: Tensor, y: Tensor) -> None:
    assert_as_torchs(prepared(name), lambda m: step(m, [x, y]))


def test_a_number_is_added_as_torch_does() -> None:
    def steps(model: Any) -> list[Any]:
        return [model(torch.ones(3), 1.5), model(2, torch.ones(3)), *model.buffers()]

    assert_as_torchs(prepared(), steps)


def test_what_cannot_be_added_gets_torchs_error() -> None:
    model = prepared()
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(RuntimeError, match="must match the size"):
        model(torch.randn(3), torch.randn(4))
    with pytest.raises(TypeError):
        model(torch.randn(3), None)
    assert_same(list(model.buffers()), before)


def test_a_refused_sum_names_its_layer_and_changes_nothing() -> None:
    fake = fq.FakeQuantize.with_args(observer=fq.MinMaxObserver, nonfinite="raise")
    model = prepared(qconfig=fq.QConfig(activation=fake, weight=fq.default_weight_fake_quant))
    before = [b.clone() for b in model.buffers()]
    x = torch.tensor([1.0, torch.inf, 2.0])
    errors = []
    for way in (torchs_way, torch.no_grad):
        with way(), pytest.raises(ValueError, match="1 non-finite") as caught:
            model(x, torch.ones(3))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert_same(list(model.buffers()), before)
    assert is_one_op(lambda: model(-x, torch.ones(3))), "ReLU makes 0 of -inf"


# -------------------------------------------------------------- whatever somebody can replace


def hook(module: Any, *_: Any) -> None:
    pass


def as_property(model: Any) -> None:
    fake = model.functional.activation_post_process

    class Own(nnq.FloatFunctional):
        @property
        def activation_post_process(self) -> Any:
            return lambda r: fake(r) * 2

    del model.functional.activation_post_process
    model.functional.__class__ = Own


class Doubling(fq.FakeQuantize):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def of(model: Any) -> Any:
    return model.functional.activation_post_process


def replace(make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.functional.activation_post_process = make()

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: of(m).register_forward_hook(hook),
    "forward pre-hook": lambda m: of(m).register_forward_pre_hook(hook),
    "backward hook": lambda m: of(m).register_full_backward_hook(hook),
    "observer's hook": lambda m: of(m).activation_post_process.register_forward_hook(hook),
    "forward": lambda m: setattr(of(m), "forward", lambda r: r * 2),
    "observer's forward": lambda m: setattr(
        of(m).activation_post_process, "forward", lambda r: r * 2
    ),
    "subclass": replace(Doubling),
    "identity": replace(nn.Identity),
    "observer": replace(fq.MinMaxObserver),
    "histogram": replace(fq.default_histogram_fake_quant),
    "fixed": replace(fq.default_fixed_qparams_range_0to1_fake_quant),
    "per channel": replace(fq.default_per_channel_weight_fake_quant),
    "torch.ao's": replace(tq.default_fake_quant),
    "property": as_property,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_what_somebody_changed_is_called(name: str, change: str) -> None:
    model = prepared(name)
    with quiet():
        CHANGES[change](model)
    assert not is_one_op(lambda: model(*pair()))
    if change != "per channel":  # of which sizes change
        other = prepared(name)
        with quiet():
            CHANGES[change](other)
        ours = step(model, pair()) + step(model, pair())
        with torchs_way():
            step(other, pair())  # by the profiled call above
            assert_same(ours, step(other, pair()) + step(other, pair()))


def test_hooks_see_the_sum() -> None:
    seen: list[Tensor] = []
    model, (x, y) = prepared(), pair()
    of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x, y)
    assert_same(seen, [torch.relu(x + y)])
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _: seen.append(inputs[0]) if module is of(model) else None
    )
    of(model)._forward_pre_hooks.clear()
    model(x, y)
    handle.remove()
    assert len(seen) == 2


def test_methods_that_somebody_set_run() -> None:
    model, (x, y) = prepared(), pair()
    model.functional.add_relu = lambda x, y: x * y
    assert_same(model(x, y), x * y)
    del model.functional.add_relu
    assert is_one_op(lambda: model(x, y))


def test_a_method_set_on_the_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = prepared(), pair()
    monkeypatch.setattr(nnq.FloatFunctional, "add_relu", lambda self, x, y: x * y)
    assert_same(model(x, y), x * y)


def test_a_subclass_reaches_torchs_method_by_super() -> None:
    class Doubled(nnq.FloatFunctional):
        def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = super().add_relu(x, y)
            return result * 2

    model, (x, y) = prepared(), pair()
    expected = copy.deepcopy(model)(x, y) * 2
    model.functional.__class__ = Doubled
    assert_same(model(x, y), expected)


@pytest.mark.torch_ao
def test_methods_are_replaced_by_prepare_qat_where_they_are_torchs() -> None:
    code = """
        import torch
        from torch import nn
        import fastquant as fq
        import fastquant.nn.quantized as nnq

        theirs = nnq.FloatFunctional.add_relu, nnq.FloatFunctional.cat
        nnq.FloatFunctional.add = mine = lambda self, x, y: x * y
        model = nn.Sequential(nn.Linear(2, 2)).train()
        model.qconfig = fq.get_default_qat_qconfig()
        fq.prepare(model.eval())
        assert nnq.FloatFunctional.add_relu is theirs[0]
        fq.prepare_qat(model.train())
        assert nnq.FloatFunctional.add is mine
        assert nnq.FloatFunctional.add_relu is not theirs[0]
        assert nnq.FloatFunctional.cat is theirs[1]
    """
    run = python(textwrap.dedent(code))
    assert run.returncode == 0, run.stderr


# -------------------------------------------------------------------------- whoever looks on


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class SeesOps(TorchDispatchMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeesFunctions, SeesOps])
def test_modes_see_the_single_steps(mode: Any) -> None:
    model = prepared()
    with mode() as looking:
        model(*pair())
    assert "add" in looking.seen
    assert "relu" in looking.seen


class Named(Tensor):
    pass


def test_subclasses_of_tensor_stay_what_they_are() -> None:
    x, y = pair()
    assert type(prepared()(x.as_subclass(Named), y)) is Named
    assert type(prepared()(x, y.as_subclass(Named))) is Named


def test_transforms() -> None:
    model, (x, y) = prepared(), pair()
    model(x, y)
    model.apply(fq.disable_observer)
    leaf = x.clone().requires_grad_()
    model(leaf, y).sum().backward()
    of_x = torch.func.grad(lambda x: model(x, y).sum())(x)
    assert_same(of_x, leaf.grad)


def test_tracers_record_the_single_steps() -> None:
    model, (x, y) = prepared(), pair()
    model(x, y)
    model.apply(fq.disable_observer)
    expected = model(x, y)
    assert_same(torch.jit.trace(model, (x, y))(x, y), expected)
    nodes = torch.fx.symbolic_trace(model).graph.nodes
    assert any(node.target is torch.add for node in nodes)


@pytest.mark.parametrize("name", NAMES)
def test_scripted_models_add_as_before(name: str) -> None:
    prepared(name)
    x, y = pair()

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.functional = nnq.FloatFunctional()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.functional.add(x, y), self.functional.add_relu(x, y)

    assert_same(torch.jit.script(Scripted())(x, y), (x + y, torch.relu(x + y)))


def test_compiled_models_are_one_graph_with_the_same_results() -> None:
    model = prepared()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, y = (t.requires_grad_() for t in pair())
        ours, theirs = compiled(x, y), other(x, y)
        assert_same(ours.detach(), theirs.detach())
        assert_same(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))
    assert_same(list(model.buffers()), list(other.buffers()))


# ------------------------------------------------------------------------------- gradients


def test_gradients_of_gradients() -> None:
    def steps(model: Any) -> list[Any]:
        x, y = (t.requires_grad_() for t in pair(torch.double))
        first = torch.autograd.grad(model(x, y).pow(2).sum(), (x, y), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, y))]

    def detached(model: Any) -> list[Any]:
        return [t.detach() for t in steps(model)]

    assert_as_torchs(prepared(), detached)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_additions(reentrant: bool) -> None:
    def steps(model: Any) -> list[Any]:
        x, y = (t.requires_grad_() for t in pair())
        result = checkpoint(model, x * 1, y * 1, use_reentrant=reentrant)
        result.square().sum().backward()
        return [result.detach(), x.grad, y.grad, *model.buffers()]

    assert_as_torchs(prepared(), steps)


def test_a_tensor_added_to_itself_gets_both_gradients() -> None:
    def steps(model: Any) -> list[Any]:
        x, _ = pair()
        x.requires_grad_()
        model(x, x).square().sum().backward()
        return [x.grad, *model.buffers()]

    assert_as_torchs(prepared(), steps)


def test_gradients_of_leaves_are_tensors_of_their_own() -> None:
    x, y = (t.requires_grad_() for t in pair())
    prepared()(x, y).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert_same(x.grad, y.grad)
    x.grad.zero_()
    assert y.grad.any()


def test_results_may_be_changed_in_place() -> None:
    def steps(model: Any) -> list[Any]:
        x, y = (t.requires_grad_() for t in pair())
        result = model(x, y)
        result.mul_(2).square().sum().backward()
        return [result.detach(), x.grad]

    assert_as_torchs(prepared(), steps)


def test_copies_and_pickles_go_on_alike() -> None:
    model = prepared()
    step(model, pair())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = step(model, pair())
    for again in copies:
        assert is_one_op(lambda again=again: copy.deepcopy(again)(*pair()))
        assert_same(step(again, pair()), expected)


def test_trained_models_are_converted() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = fq.QuantStub(), fq.DeQuantStub()
            self.functional = nnq.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            result: Tensor = self.dequant(self.functional.add_relu(x, x))
            return result

    model: Any = Block().train()
    model.qconfig = fq.get_default_qat_qconfig("x86", version=0)
    model = fq.prepare_qat(model)
    x = torch.randn(4, 5)
    expected = model(x)
    with quiet():
        converted = fq.convert(model.eval())
    scale = float(of(model).scale)
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1.01 * scale)
