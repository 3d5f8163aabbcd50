"""Observers and fake-quantizers under what torch puts around a model: transforms, modes, tracing.

Observing a plain CPU tensor may go round the dispatcher; here are the circumstances in which it
must not, and the tensors that are not what their memory says.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastquant as fq
from oracle import assert_same, assert_same_state, assert_unchanged, quiet, snapshot
from zoo import prepared

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


OBSERVERS: dict[str, Callable[[], Any]] = {
    "min_max": fq.MinMaxObserver,
    "moving": fq.MovingAverageMinMaxObserver,
    "per_channel": fq.PerChannelMinMaxObserver,
    "moving_per_channel": fq.MovingAveragePerChannelMinMaxObserver,
    "histogram": fq.HistogramObserver,
    "fake_quantize": fq.FakeQuantize,
    "fused_per_channel": fq.default_fused_per_channel_wt_fake_quant,
}
QUANTIZERS = ("fake_quantize", "fused_per_channel")

every_observer = pytest.mark.parametrize("kind", OBSERVERS)


def observing(kind: str) -> tuple[Any, Any]:
    """Two of a kind that have seen the same tensor."""
    modules = OBSERVERS[kind](), OBSERVERS[kind]()
    x = torch.randn(4, 6)
    for module in modules:
        module(x)
    return modules


def network(kind: str, ns: Any = fq) -> nn.Module:
    torch.manual_seed(0)
    return prepared(kind, ns, (nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (4, 6))


# ---------------------------------------------------------------------------- unusual tensors


class Doubled(Tensor):
    """A subclass whose values are twice what its memory holds."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [a.as_subclass(Tensor) * 2 if isinstance(a, Doubled) else a for a in args]
        return func(*values, **(kwargs or {}))


@every_observer
@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
        nn.Parameter,
        torch._lazy_clone,
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: torch.randn(5).expand(4, 5).T[:0],  # empty
    ],
    ids=["negative_bit", "parameter", "copy_on_write", "in_a_graph", "empty"],
)
def test_unusual_tensors_are_observed_by_value(kind: str, made: Callable[[Tensor], Tensor]) -> None:
    ours, expected = observing(kind)
    x = made(torch.randn(4, 6) * 5)
    values = torch.tensor(x.tolist()).reshape(x.shape)
    ours(x)
    expected(values)
    assert_unchanged(ours, snapshot(expected))


@pytest.mark.parametrize("kind", [k for k in OBSERVERS if k not in QUANTIZERS])
def test_a_subclass_is_asked_for_its_values(kind: str) -> None:
    ours, expected = observing(kind)
    x = torch.randn(4, 6) * 5
    ours(x.as_subclass(Doubled))
    expected(x * 2)
    assert_unchanged(ours, snapshot(expected))


def test_observing_a_lazy_copy_leaves_both_copies_as_they_are() -> None:
    x = torch.randn(100)
    before = x.clone()
    lazy = torch._lazy_clone(x)
    observer = fq.MinMaxObserver()
    observer(lazy)
    lazy.add_(1)
    assert_same(x, before)
    assert_same(lazy, before + 1)
    assert_same(observer.max_val, before.max())


# ------------------------------------------------------------------------------------- modes


@every_observer
def test_a_fake_tensor_changes_no_statistic(kind: str) -> None:
    module, _ = observing(kind)
    before = snapshot(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(torch.randn(4, 6))).shape == (4, 6)
        # Nor does a real tensor where everything is pretended.
        module(torch.randn(4, 6))
    assert_unchanged(module, before)


@every_observer
def test_a_dispatch_mode_sees_the_op_and_decides(kind: str) -> None:
    class Scaled(TorchDispatchMode):
        """Every op of fastquant that observes gets ten times its tensor."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "observe" in str(func):
                args = (args[0] * 10, *args[1:])
            return func(*args, **(kwargs or {}))

    ours, expected = observing(kind)
    x = torch.randn(4, 6)
    with Scaled():
        ours(x)
    expected(x * 10)
    assert_unchanged(ours, snapshot(expected))


class Interrupted(TorchFunctionMode):
    """Somebody presses Ctrl-C whenever torch is asked for anything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise KeyboardInterrupt


@every_observer
def test_an_interruption_is_not_dropped(kind: str) -> None:
    module, _ = observing(kind)
    before = snapshot(module)
    x = torch.randn(4, 6)
    with Interrupted(), pytest.raises(KeyboardInterrupt):
        module(x)
    assert_unchanged(module, before)


class Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(str(func))
        return func(*args, **(kwargs or {}))


@every_observer
def test_modes_and_the_profiler_see_ops(kind: str) -> None:
    module, _ = observing(kind)
    x = torch.randn(4, 6)
    with torch.profiler.profile() as profile:
        module(x)
    assert any(e.name.startswith("fastquant::") for e in profile.events())
    with Names() as names:
        module(x)
    assert any(name.startswith("fastquant.") for name in names.called)


@every_observer
def test_meta_tensors_have_shapes_only(kind: str) -> None:
    modules = OBSERVERS[kind](), observing(kind)[0], fq.default_histogram_fake_quant()
    for module in (m.to("meta") for m in modules):
        y = module(torch.empty(4, 6, device="meta"))
        assert (y.device.type, y.shape) == ("meta", (4, 6))
        assert all(b.is_meta for b in module.buffers())


@every_observer
def test_inference_mode_observes_and_can_be_left(kind: str) -> None:
    ours, expected = OBSERVERS[kind](), OBSERVERS[kind]()
    x = torch.randn(4, 6)
    with torch.inference_mode():
        ours(x)
        ours(x * 2)
    y = (x * 3).requires_grad_()
    expected(x)
    expected(x * 2)
    assert_same(ours(y), expected(y))
    assert_unchanged(ours, snapshot(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["min_max", "histogram", "qat"])
def test_autocast_observes_what_the_layers_make_of_it(kind: str, dtype: torch.dtype) -> None:
    model = network(kind)
    ours: list[tuple[Tensor, Any, Any]] = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        ours.append((args[0].detach().clone(), module, before.pop(id(module))))

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        before[id(module)] = copy.deepcopy(module)

    watched = [m for m in model.modules() if isinstance(m, (fq.ObserverBase, fq.FakeQuantizeBase))]
    nested = {id(c) for m in watched for c in m.children()}
    before: dict[int, Any] = {}
    handles = [
        h
        for m in watched
        if id(m) not in nested
        for h in (m.register_forward_pre_hook(keep), m.register_forward_hook(note))
    ]
    with torch.autocast("cpu", dtype):
        y = model(torch.randn(4, 6))
    for handle in handles:
        handle.remove()
    assert y.dtype == dtype
    assert dtype in {x.dtype for x, _, _ in ours}
    for x, after, fresh in ours:
        fresh._forward_hooks.clear()
        fresh._forward_pre_hooks.clear()
        fresh(x)
        assert_unchanged(after, snapshot(fresh))
        assert all(b.dtype != dtype for b in after.buffers())
    if kind == "qat":
        y.float().sum().backward()
        for p in model.parameters():
            assert p.grad is not None
            assert p.grad.isfinite().all()
            assert p.grad.dtype == torch.float32


# -------------------------------------------------------------------------------- torch.func


def test_a_functional_call_updates_the_buffers_it_was_given() -> None:
    model, expected = network("qat"), network("qat")
    state = {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}
    hidden = {n: b.clone() for n, b in model.named_buffers()}
    before = snapshot(model)
    x = torch.randn(4, 6) * 5
    y = torch.func.functional_call(model, {**state, **hidden}, (x,))
    assert_same(y, expected(x))
    assert_unchanged(model, before)
    for name, buffer in expected.named_buffers():
        given = {**state, **hidden}[name]
        assert_same(given, buffer, name)


def test_func_grad_gives_autograds_gradients_and_observes() -> None:
    model, expected = network("qat"), network("qat")
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(4, 6) * 2

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    expected(x).square().sum().backward()
    for name, p in expected.named_parameters():
        assert_same(gradients[name], p.grad, name)
        assert p.grad.abs().sum() > 0
    assert_unchanged(model, snapshot(expected))


@every_observer
def test_observing_inside_a_transform(kind: str) -> None:
    ours, expected = observing(kind)
    x = torch.randn(4, 6) * 3
    gradient = torch.func.grad(lambda x: ours(x).sum())(x)
    y = x.clone().requires_grad_()
    expected(y).sum().backward()
    assert_same(gradient, y.grad)
    assert_unchanged(ours, snapshot(expected))


def test_gradients_of_gradients_in_transforms() -> None:
    module, _ = observing("fake_quantize")
    module.disable_observer()
    x = torch.randn(200) * 4

    def cubed(x: Tensor) -> Tensor:
        return (module(x) ** 3).sum()

    second = torch.func.grad(lambda x: torch.func.grad(cubed)(x).sum())(x)
    inside = torch.func.grad(lambda x: module(x).sum())(x)
    assert 0 < inside.mean() < 1
    assert_same(second, 6 * module(x) * inside)


def test_learned_qparams_have_gradients_in_transforms() -> None:
    module = fq.LearnableFakeQuantize(fq.MovingAverageMinMaxObserver)
    x = torch.randn(50)
    module(x)
    module.enable_param_learning()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())(
        parameters
    )
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        assert_same(found[name], p.grad, name)


def test_forward_mode_derivatives_are_refused_and_not_zero() -> None:
    module, _ = observing("fake_quantize")
    x = torch.randn(4, 6)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(module, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode"):
            module(dual)


@every_observer
def test_vmap_is_refused_and_statistics_stay(kind: str) -> None:
    module, _ = observing(kind)
    before = snapshot(module)
    with pytest.raises((RuntimeError, ValueError)):
        torch.func.vmap(module)(torch.randn(3, 4, 6))
    assert_unchanged(module, before)


# -------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_observes_at_each_of_its_two_forwards(use_reentrant: bool) -> None:
    model, expected = network("qat"), network("qat")
    x = torch.randn(4, 6) * 2
    y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=use_reentrant)
    assert_same(y, expected(x))
    assert_unchanged(model, snapshot(expected))
    y.sum().backward()
    expected(x)  # the recomputation is one more forward, as it is with torch.ao
    assert_unchanged(model, snapshot(expected))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_no_longer_observes_gives_the_same_gradients(use_reentrant: bool) -> None:
    model, expected = network("qat"), network("qat")
    x = torch.randn(4, 6) * 2
    for m in (model, expected):
        m.apply(fq.disable_observer)
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    expected(x).sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same(p.grad, q.grad)


# ---------------------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize("kind", ["min_max", "histogram", "qat"])
def test_a_traced_model_observes_when_traced_and_when_run(kind: str) -> None:
    model, expected = network(kind), network(kind)
    x = torch.randn(4, 6)
    with quiet():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        expected(x)
        assert_unchanged(model, snapshot(expected))
        assert_same(traced(x * 9), expected(x * 9))
    found = dict(traced.named_buffers())
    for name, buffer in expected.named_buffers():
        assert_same(found[name], buffer, name)


def conv_bn(qconfig: Any = None) -> tuple[nn.Module, Tensor]:
    """A convolution with its batch norm, prepared for QAT, and a batch."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    model = nn.Sequential(fq.fuse_modules_qat(body, [["0", "1", "2"]]))
    model.qconfig = qconfig or fq.get_default_qat_qconfig("x86")
    fq.prepare_qat(model, inplace=True)
    x = torch.randn(2, 3, 6, 6)
    model(x)
    return model, x


def without_observing(model: nn.Module) -> nn.Module:
    model.apply(fq.disable_observer)
    return model.apply(fq.disable_fake_quant)


def test_a_traced_model_can_be_saved_and_its_flags_are_read_when_it_runs() -> None:
    model, x = conv_bn()
    model.eval()
    with quiet(), torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        # The trace holds torch's ops, one after the other; rounding may differ.
        y, expected = loaded(x * 3), model(x * 3)
        assert (y - expected).abs().max() <= 1.01 * model[0][0].activation_post_process.scale
        for name, buffer in loaded.named_buffers():
            torch.testing.assert_close(buffer, dict(model.named_buffers())[name])
            if name.endswith("_enabled"):
                buffer.zero_()
        torch.testing.assert_close(loaded(x), without_observing(model)(x))


def test_forward_mode_and_vmap_pass_modules_that_do_nothing() -> None:
    quantize = fq.default_histogram_fake_quant
    weight_quantize = fq.default_per_channel_weight_fake_quant
    model, x = conv_bn(fq.QConfig(activation=quantize, weight=weight_quantize))
    without_observing(model.eval())
    plain = without_observing(copy.deepcopy(model))
    plain.apply(lambda m: setattr(m, "weight_fake_quant", nn.Identity()))
    weight, tangent = model[0][0].weight.detach(), torch.randn(4, 3, 3, 3)

    def run(m: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(m, {"0.0.weight": weight}, (x,)).square().sum()

    for derive in (
        lambda m: torch.func.jvp(lambda w: run(m, w, x), (weight,), (tangent,))[1],
        lambda m: torch.func.vmap(
            torch.func.grad(lambda w, one: run(m, w, one[None])), in_dims=(None, 0)
        )(weight, x),
        lambda m: torch.func.hessian(lambda w: run(m, w, x))(weight),
    ):
        torch.testing.assert_close(derive(model), derive(plain))


def test_a_weight_may_change_before_backward_where_its_scale_is_frozen() -> None:
    model, x = conv_bn()
    layer: Any = model[0][0]
    layer.bn.requires_grad_(False)
    y = model(x.clone().requires_grad_())
    with torch.no_grad():
        layer.weight += 1
    y.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


SCRIPTED = {
    **OBSERVERS,
    "histogram_fake_quantize": fq.default_histogram_fake_quant,
    "fixed": fq.default_fixed_qparams_range_0to1_fake_quant,
    "float_qparams": fq.default_embedding_fake_quant,
    "fused": fq.default_fused_act_fake_quant,
    "symmetric": fq.default_fused_wt_fake_quant,
    "placeholder": fq.PlaceholderObserver,
}


@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.parametrize("seen", [False, True])
def test_a_scripted_module_goes_on_as_the_module_would(kind: str, seen: bool) -> None:
    module, expected = SCRIPTED[kind](), SCRIPTED[kind]()
    for x in (torch.randn(4, 6),) * seen:
        module(x)
        expected(x)
    with quiet():
        scripted: Any = torch.jit.script(module)
    for i in range(3):
        x = torch.randn(4, 6) * (i + 1)
        assert_same(scripted(x), expected(x))
        file = io.BytesIO()
        torch.jit.save(scripted, file)  # type: ignore[no-untyped-call]
        file.seek(0)
        with quiet():
            scripted = torch.jit.load(file)
    assert_same_state(scripted, expected)
    if kind != "placeholder":
        for ours, theirs in zip(
            scripted.calculate_qparams(), expected.calculate_qparams(), strict=True
        ):
            assert_same(ours, theirs)


class Watched(nn.Module):
    """A model that calls its observers itself: hooks cannot be scripted, torch.ao's neither."""

    def __init__(self, ns: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.before = ns.HistogramObserver()
        self.after = ns.FusedMovingAvgObsFakeQuantize(ns.MovingAverageMinMaxObserver)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.linear(self.before(x)))
        return y


def test_a_scripted_model_shares_its_statistics_with_the_model() -> None:
    torch.manual_seed(0)
    model = Watched(fq)
    torch.manual_seed(0)
    expected = Watched(fq)
    model(x := torch.randn(4, 6))
    expected(x)
    with quiet():
        scripted: Any = torch.jit.script(model)
        for i in range(3):
            x = torch.randn(4, 6) * (i + 1)
            assert_same(scripted(x), expected(x))
    assert_same_state(scripted, expected)
    # The model observes on, beside what was scripted.
    with quiet():
        assert_same(model(x * 9), expected(x * 9))
    assert_same_state(model, expected)


@pytest.mark.parametrize("kind", ["min_max", "histogram", "qat"])
def test_prepared_models_cannot_be_scripted_as_torchs_cannot(kind: str) -> None:
    for ns in (fq, tq):
        model = network(kind, ns)
        before = [type(module) for module in model.modules()]
        with quiet(), pytest.raises(RuntimeError):
            torch.jit.script(model)
        if ns is fq:
            assert [type(module) for module in model.modules()] == before


class Own(fq.MinMaxObserver):
    """A user's observer."""


def test_scripting_a_users_observer_is_refused_in_words() -> None:
    for model in (Own(), nn.Sequential(nn.Linear(2, 2), Own()), fq.FakeQuantize(Own)):
        with quiet(), pytest.raises(NotImplementedError, match=r"Own cannot.*jit\.trace"):
            torch.jit.script(model)


def test_what_convert_returns_can_be_scripted() -> None:
    model = fq.convert(network("min_max"))
    with quiet():
        scripted = torch.jit.script(model)
    x = torch.randn(4, 6)
    assert_same(scripted(x).dequantize(), model(x).dequantize())
