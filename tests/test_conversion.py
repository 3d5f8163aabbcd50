"""Converting: what is swapped, what is refused and warned of, and short cuts that do not show."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import types
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantizable as nnquantizable
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from fastquant._conversion import quick
from oracle import assert_same, quiet
from zoo import STATIC_CASES, Case, Residual, Stubbed, tree

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[True, False], ids=["shortcuts", "plain"])
def shortcuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether convert trusts torch to be built as it knows it."""
    if not request.param:
        monkeypatch.setattr(quick, "is_trusted", lambda: False)
    return bool(request.param)


def fused(case: Case, training: bool) -> nn.Module:
    model = case.make(fq)
    if case.fusable:
        fuse = fq.fuse_modules_qat if training else fq.fuse_modules
        model = fuse(model.train(training), [list(names) for names in case.fusable])
    return model.train(training)


def calibrated(name: str) -> nn.Module:
    case = STATIC_CASES[name]
    model = fused(case, training=False)
    model.qconfig = fq.default_qconfig if case.per_tensor_only else fq.get_default_qconfig("x86")
    model = fq.prepare(model)
    model(*case.inputs(0))
    return model


def trained(name: str, qconfig: Any = None) -> nn.Module:
    """Trained for two steps, so moving averages and batch norms have moved."""
    case = STATIC_CASES[name]
    model = fused(case, training=True)
    model.qconfig = qconfig or fq.get_default_qat_qconfig("x86")
    model = fq.prepare_qat(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(2):
        optimizer.zero_grad()
        model(*case.inputs(seed)).square().mean().backward()
        optimizer.step()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"{name}, calibrated": lambda name=name: calibrated(name) for name in STATIC_CASES},
    **{
        f"{name}, trained": lambda name=name: trained(name)
        for name, case in STATIC_CASES.items()
        if case.trains
    },
}


def assert_same_models(ours: nn.Module, theirs: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert tree(ours) == tree(theirs)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    with quiet():
        assert_same(ours.eval()(*inputs), theirs.eval()(*inputs))


# ------------------------------------------------------------------------------ the same models


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_the_one_that_torch_makes(
    name: str, inplace: bool, shortcuts: bool
) -> None:
    model = MODELS[name]()
    with quiet():
        expected = tq.convert(copy.deepcopy(model))
    converted = fq.convert(model, inplace=inplace)
    assert (converted is model) == inplace
    assert_same_models(converted, expected, STATIC_CASES[name.split(",")[0]].inputs(7))


class Linears(nn.Module):
    """Linear layers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.fused = nni.LinearReLU(nn.Linear(8, 8), nn.ReLU())
        self.last = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fused(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_quantization_leads_to_torchs_model(dtype: torch.dtype, shortcuts: bool) -> None:
    model = Linears()
    kinds = {nn.Linear, nni.LinearReLU, type(model.last)}
    ours = fq.quantize_dynamic(model, kinds, dtype)
    with quiet():
        theirs = tq.quantize_dynamic(model, kinds, dtype)
    assert vars(ours.first).keys() == vars(theirs.first).keys()
    assert str(ours) == str(theirs)
    assert_same_models(ours, theirs, (torch.randn(3, 2, 8),))


QAT_QCONFIGS: dict[str, Callable[[], Any]] = {
    "x86, two steps": lambda: fq.get_default_qat_qconfig("x86", 0),
    "qnnpack": lambda: fq.get_default_qat_qconfig("qnnpack"),
    "torch.ao's": lambda: tq.get_default_qat_qconfig("x86"),
    "minmax": lambda: fq.QConfig(
        fq.default_fake_quant,
        fq.FakeQuantize.with_args(observer=fq.default_per_channel_weight_observer),
    ),
    "-8 to 7": lambda: fq.QConfig(
        fq.default_fake_quant,
        fq.FusedMovingAvgObsFakeQuantize.with_args(
            observer=fq.MovingAveragePerChannelMinMaxObserver,
            quant_min=-8,
            quant_max=7,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    ),
}


@pytest.mark.parametrize("qconfig", QAT_QCONFIGS)
@pytest.mark.parametrize("name", ["conv_net", "linear_bn"])
def test_training_leads_to_torchs_model_by_any_qconfig(name: str, qconfig: str) -> None:
    with quiet():
        model = trained(name, QAT_QCONFIGS[qconfig]())
        expected = tq.convert(copy.deepcopy(model))
        converted = fq.convert(model)
    assert_same_models(converted, expected, STATIC_CASES[name].inputs(7))


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("name", ["conv_net", "linears"])
def test_frozen_and_precomputed_weight_ranges_are_torchs(name: str, precomputed: bool) -> None:
    model = trained(name)
    model.apply(fq.disable_observer)
    expected = tq.convert(copy.deepcopy(model), use_precomputed_fake_quant=precomputed)
    converted = fq.convert(model, use_precomputed_fake_quant=precomputed)
    assert_same_models(converted, expected, STATIC_CASES[name].inputs(7))


@pytest.mark.parametrize("name", MODELS)
def test_converting_a_copy_leaves_the_original_as_it_was(name: str, shortcuts: bool) -> None:
    model = MODELS[name]()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    first, second = fq.convert(model), fq.convert(model)
    assert_same(dict(model.state_dict()), dict(before))
    assert dict(model.named_modules()) == modules
    assert all(m.fake_quant_enabled.item() == 1 for m in modules.values() if is_fake_quant(m))
    assert_same(dict(first.state_dict()), dict(second.state_dict()))


def is_fake_quant(module: nn.Module) -> bool:
    return isinstance(module, fq.FakeQuantizeBase)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "groups": 2}, {"padding_mode": "reflect"}])
@pytest.mark.parametrize("bias", [True, False])
def test_settings_of_convolutions_are_kept(
    settings: dict[str, Any], bias: bool, shortcuts: bool
) -> None:
    conv = nn.Conv2d(4, 6, (3, 2), padding=(1, 2), dilation=(1, 2), bias=bias, **settings)
    model = Stubbed(fq, conv).eval()
    model.qconfig = fq.get_default_qconfig("x86")
    x = torch.randn(2, 4, 9, 9)
    prepared = fq.prepare(model)
    prepared(x)
    expected = tq.convert(copy.deepcopy(prepared))
    converted = fq.convert(prepared)
    assert str(converted) == str(expected)
    assert vars(converted.body).keys() == vars(expected.body).keys()
    assert_same_models(converted, expected, (x,))
    assert_same_models(copy.deepcopy(converted), expected, (x,))
    assert_same_models(torch.jit.script(converted), torch.jit.script(expected), (x,))


# ------------------------------------------------------------- what users replace is not overlooked


@pytest.mark.parametrize("name", ["from_float", "set_weight_bias", "get_qconv"])
def test_replaced_methods_of_torchs_modules_are_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = calibrated("conv_net"), []
    original = getattr(nnq.Conv2d, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        bound = original if name == "set_weight_bias" else original.__func__
        return bound(*args, **kwargs)

    is_class_method = name != "set_weight_bias"
    monkeypatch.setattr(nnq.Conv2d, name, classmethod(method) if is_class_method else method)
    fq.convert(model)
    assert calls


def test_a_torch_whose_modules_have_more_attributes_gets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = nnq.Conv2d.__mro__[1]
    original = base._init

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.novelty = 1

    model = calibrated("conv_net")
    monkeypatch.setattr(base, "_init", init)
    converted = fq.convert(model)
    assert converted.body.conv1.novelty == 1
    assert_same(
        converted(*STATIC_CASES["conv_net"].inputs(7)),
        fq.convert(model)(*STATIC_CASES["conv_net"].inputs(7)),
    )


class Stateful(fq.MinMaxObserver):
    """Counts how often its qparams are asked for."""

    calls = 0

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().calculate_qparams()


def test_observers_that_change_when_asked_for_qparams_are_copied() -> None:
    model = Stubbed(fq, nn.Linear(4, 4)).eval()
    model.qconfig = fq.QConfig(Stateful, fq.default_weight_observer)
    model = fq.prepare(model)
    model(torch.randn(2, 4))
    fq.convert(model)
    assert [m.calls for m in model.modules() if isinstance(m, Stateful)] == [0, 0]
    observer = model.body.activation_post_process

    def ten_times(self: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        scale, zero_point = super(Stateful, self).calculate_qparams()
        return scale * 10, zero_point

    scale = observer.calculate_qparams()[0]
    observer.calculate_qparams = types.MethodType(ten_times, observer)
    observer.calls = 0
    assert fq.convert(model).body.scale == pytest.approx(10 * scale.item())
    assert observer.calls == 0


def test_a_weight_fake_quant_in_two_layers_stays_one() -> None:
    model = trained("linears")
    layers = [m for m in model.modules() if hasattr(m, "weight_fake_quant")]
    assert len(layers) == 2
    with torch.no_grad():
        for layer in layers:
            layer.weight_fake_quant = fq.default_weight_fake_quant()
    layers[1].weight_fake_quant = layers[0].weight_fake_quant
    layers[0].weight_fake_quant(layers[0].weight * 3)
    expected = tq.convert(copy.deepcopy(model))
    assert_same_models(fq.convert(model), expected, STATIC_CASES["linears"].inputs(7))


def test_children_that_a_user_adds_to_a_layer_do_not_change_it() -> None:
    torch.manual_seed(1)
    for model in (calibrated("linears"), trained("linears"), calibrated("conv_net")):
        for layer in [m for m in model.modules() if hasattr(m, "in_features")]:
            layer.bn = nn.BatchNorm1d(layer.out_features)
            layer.add_module("0", nn.Dropout())
        x = STATIC_CASES["conv_net" if hasattr(model.body, "fc") else "linears"].inputs(7)
        assert_same_models(fq.convert(model), tq.convert(copy.deepcopy(model)), x)


def test_a_parametrization_inside_a_fused_layer_is_kept_up_with() -> None:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    model = Stubbed(fq, nni.ConvReLU2d(conv, nn.ReLU())).eval()
    model.qconfig = fq.get_default_qconfig("x86")
    prepared = fq.prepare(model)
    x = torch.randn(2, 3, 8, 8)
    prepared(x)
    prepared.body[0].train()  # where each look at the weight changes it
    before = copy.deepcopy(prepared.state_dict())
    expected = tq.convert(copy.deepcopy(prepared))
    assert_same_models(fq.convert(prepared), expected, (x,))
    assert_same(dict(prepared.state_dict()), dict(before))


def test_methods_bound_to_a_fake_quantizer_are_bound_to_its_copy() -> None:
    model = trained("linears")
    layer = model.body[0]
    quantizer = layer.weight_fake_quant
    for bind in (types.MethodType, functools.partial):
        quantizer.forward = bind(type(quantizer).forward, quantizer)
        before = copy.deepcopy(quantizer.state_dict())
        expected = tq.convert(copy.deepcopy(model))
        assert_same_models(fq.convert(model), expected, STATIC_CASES["linears"].inputs(7))
        assert_same(dict(quantizer.state_dict()), dict(before))


def test_global_hooks_see_what_torch_ao_would_show_them() -> None:
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if is_fake_quant(module):
            seen.append(output.detach().clone())

    def outputs(convert: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        model = trained("linears")
        seen.clear()
        with torch.nn.modules.module.register_module_forward_hook(look):
            convert(model)
        return list(seen)

    assert_same(tuple(outputs(fq.convert)), tuple(outputs(tq.convert)))


class Keeper(nn.Module):
    """Refers to a layer from outside the tree of modules, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.layers = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_a_list_refers_to_is_a_copy_that_shares_nothing(training: bool) -> None:
    layer = nn.Conv2d(3, 4, 1)
    layer.notes = ["mine"]
    model = Stubbed(fq, Keeper(nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU())))
    fuse = fq.fuse_modules_qat if training else fq.fuse_modules
    model = fuse(model.train(training), [["body.layer.0", "body.layer.1", "body.layer.2"]])
    model.body.layers = [model.body.layer[0]]
    model.body.layers[0].notes = ["mine"]
    if training:
        model.qconfig = fq.get_default_qat_qconfig("x86")
        model = fq.prepare_qat(model)
        model.body.layers = [model.body.layer[0]]
        model.body.layers[0].notes = ["mine"]
    else:
        model.qconfig = fq.get_default_qconfig("x86")
        model = fq.prepare(model)
    model(torch.randn(2, 3, 4, 4))
    converted = fq.convert(model)
    original, kept = model.body.layers[0], converted.body.layers[0]
    assert type(kept) is type(original)
    assert kept.notes == ["mine"]
    assert kept.notes is not original.notes
    ours, theirs = (
        {t.data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()}
        for m in (kept, original)
    )
    assert ours
    assert not ours & theirs


# --------------------------------------------------------------------- modules in several places


@pytest.mark.parametrize("training", [False, True])
def test_a_module_in_several_places_is_swapped_once_and_stays_one(
    training: bool, shortcuts: bool
) -> None:
    conv, linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 6)
    body = nn.Sequential(conv, nn.Sequential(conv, linear), conv, linear)
    model = Stubbed(fq, body).train(training)
    if training:
        model.qconfig = fq.get_default_qat_qconfig("x86")
        model = fq.prepare_qat(model)
    else:
        model.qconfig = fq.get_default_qconfig("x86")
        model = fq.prepare(model)
    x = torch.randn(2, 4, 6, 6)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = fq.convert(model.eval())
    body = converted.body
    assert type(body[0]) is nnq.Conv2d
    assert type(body[3]) is nnq.Linear
    assert body[0] is body[1][0] is body[2]
    assert body[3] is body[1][1]
    # The scale is one for all places, so the output comes only near what was observed.
    torch.testing.assert_close(converted(x), model(x), atol=0.2, rtol=0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "backend", [pytest.param("torch.ao", marks=pytest.mark.torch_ao), "native"]
)
def test_a_module_made_of_parts_stays_one_in_all_places(
    training: bool, batch_first: bool, backend: str
) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.first = self.second = attention
            self.inner = nn.ModuleList([attention])

        def forward(self, x: Tensor) -> Tensor:
            for module in (self.first, self.second, self.inner[0]):
                x = module(x, x, x)[0]
            return x

    torch.manual_seed(0)
    model = Stubbed(fq, Twice()).train(training)
    name = "native" if backend == "native" else "x86"
    x = torch.randn(3, 5, 8)
    if training:
        model.qconfig = fq.get_default_qat_qconfig(name)
        prepared = fq.prepare_qat(model)
    else:
        model.qconfig = fq.get_default_qconfig(name)
        prepared = fq.prepare(model)
    prepared(x)
    converted = fq.convert(prepared.eval(), backend=backend)
    for made in (prepared.body, converted.body):
        assert isinstance(made.first, fq.nn.quantizable.MultiheadAttention.__base__)
        assert made.first is made.second is made.inner[0]
    assert len(list(prepared.parameters())) == len({id(p) for p in prepared.parameters()})
    torch.testing.assert_close(converted(x), model.eval()(x), atol=0.1, rtol=0)


def test_messages_name_a_module_in_several_places_once() -> None:
    linear = nn.Linear(2, 2)
    model = Stubbed(fq, nn.Sequential(linear, linear, nn.Sequential(linear))).eval()
    model.qconfig = fq.default_qconfig
    with pytest.warns(UserWarning, match=r"seen no data: quant, body\.0\. They"):
        fq.convert(fq.prepare(model))


# -------------------------------------------------------------------------- parts of other kinds


class Peak(nn.Module):
    """An observer of a user's own that derives from nn.Module alone."""

    dtype = torch.quint8

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.peak = max(self.peak, x.abs().max().item())
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([self.peak / 127]), torch.tensor([128])


def test_plain_modules_can_be_observers_beside_layers_without_qconfig() -> None:
    def converted(ns: ModuleType) -> nn.Module:
        torch.manual_seed(0)
        layers = (ns.QuantStub(), nn.Linear(4, 4), ns.DeQuantStub(), nn.Linear(4, 2))
        model = nn.Sequential(*layers).eval()
        model.qconfig = ns.QConfig(activation=Peak, weight=ns.default_weight_observer)
        model[3].qconfig = None
        with quiet():
            model = ns.prepare(model)
            model(torch.randn(8, 4))
            return ns.convert(model)

    ours = converted(fq)
    assert type(ours[1]) is nnq.Linear
    assert type(ours[3]) is nn.Linear
    assert_same_models(ours, converted(tq), (torch.randn(3, 4),))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def loaded() -> Any:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Inner().eval()), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


SCRIPTED: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(Inner().eval()),
    "traced": lambda: torch.jit.trace(Inner().eval(), torch.randn(2, 4)),
    "loaded": loaded,
}


def static(ns: ModuleType, model: nn.Module) -> nn.Module:
    model.eval().qconfig = ns.get_default_qconfig("x86")
    prepared = ns.prepare(model)
    prepared(torch.randn(8, 4))
    return ns.convert(prepared)


def dynamic(ns: ModuleType, model: nn.Module) -> nn.Module:
    return ns.quantize_dynamic(model, {nn.Linear})


def qat(ns: ModuleType, model: nn.Module) -> nn.Module:
    model.train().qconfig = ns.get_default_qat_qconfig("x86", 0)
    model = ns.prepare_qat(model)
    model(torch.randn(8, 4))
    return ns.convert(model.eval())


@pytest.mark.parametrize("way", [static, dynamic, qat])
@pytest.mark.parametrize("kind", SCRIPTED)
def test_parts_in_torchscript_stay_as_they_are(
    kind: str, way: Callable[[ModuleType, nn.Module], nn.Module], shortcuts: bool
) -> None:
    def converted(ns: ModuleType) -> nn.Module:
        torch.manual_seed(0)
        part = SCRIPTED[kind]()
        model = nn.Sequential(
            part, ns.QuantStub(), nn.Linear(4, 4), ns.DeQuantStub(), nn.Sequential(part, nn.ReLU())
        )
        with quiet():
            return way(ns, model)

    ours, theirs = converted(fq), converted(tq)
    assert ours[0] is ours[4][0]
    assert_same_models(ours, theirs, (torch.randn(3, 4),))


# ---------------------------------------------------------------------- errors that name the layer


def quantized_weights(**kwargs: Any) -> Any:
    return fq.QConfig(fq.default_observer, fq.default_weight_observer.with_args(**kwargs))


FAILING: dict[str, tuple[nn.Module, tuple[int, ...], Any, type[Exception]]] = {
    "string padding": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 8, 8), None, RuntimeError),
    "circular padding": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (2, 3, 8, 8),
        None,
        ValueError,
    ),
    "PReLU per channel": (nn.PReLU(3), (2, 3, 8, 8), fq.default_per_channel_qconfig, Exception),
    "unsigned weights": (nn.Linear(4, 4), (2, 4), quantized_weights(dtype=torch.quint8), Exception),
}


@pytest.mark.parametrize("kind", FAILING)
def test_whatever_goes_wrong_the_layer_is_named(kind: str, shortcuts: bool) -> None:
    layer, shape, qconfig, raised = FAILING[kind]
    model = Stubbed(fq, nn.Sequential(nn.Sequential(layer))).eval()
    model.qconfig = qconfig or fq.get_default_qconfig("x86")
    model = fq.prepare(model)
    model(torch.randn(shape))
    with quiet(), pytest.raises(raised) as theirs:
        tq.convert(copy.deepcopy(model))
    with pytest.raises(
        fq.QuantizationError, match=r"(?s)convert: cannot convert body\.0\.0: .*qconfig = None"
    ) as ours:
        fq.convert(model)
    assert isinstance(ours.value.__cause__, type(theirs.value))
    if raised in (RuntimeError, ValueError, AssertionError):
        assert isinstance(ours.value, raised)


@pytest.mark.torch_ao
def test_the_error_can_be_pickled() -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Conv2d(3, 4, 3, padding="same")).eval()
    model.qconfig = fq.get_default_qconfig("x86")
    model = fq.prepare(model)
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError) as error:
        fq.convert(model)
    again = pickle.loads(pickle.dumps(error.value))
    assert type(again) is type(error.value)
    assert str(again) == str(error.value)


@pytest.mark.torch_ao
def test_transposed_convolutions_after_training_are_named() -> None:
    model = Stubbed(fq, nn.Sequential(nn.ConvTranspose2d(3, 4, 3))).train()
    model.qconfig = fq.get_default_qat_qconfig("x86")
    model = fq.prepare_qat(model)
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(fq.QuantizationError, match=r"cannot convert body\.0: "):
        fq.convert(model.eval())


class Unmade(nn.Module):
    """A target that cannot be made."""

    @classmethod
    def from_float(cls, module: nn.Module) -> nn.Module:
        raise KeyError("lost")

    from_observed = from_float


def configured(qconfig: Any) -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2))).train()
    model.qconfig = qconfig
    return model


CALLS: dict[str, Callable[[], Any]] = {
    "prepare_qat": lambda: fq.prepare_qat(
        configured(fq.get_default_qat_qconfig()), {nn.Linear: Unmade}
    ),
    "quantize_dynamic": lambda: fq.quantize_dynamic(
        configured(None), {nn.Linear: fq.default_dynamic_qconfig}, mapping={nn.Linear: Unmade}
    ),
    "convert": lambda: fq.convert(
        fq.prepare(configured(fq.default_qconfig).eval()), {nn.Linear: Unmade}
    ),
    "quantize": lambda: fq.quantize(
        configured(fq.default_qconfig), lambda model: None, (), {nn.Linear: Unmade}
    ),
}


@pytest.mark.parametrize("function", CALLS)
def test_messages_name_the_function_that_was_called(function: str) -> None:
    with pytest.raises(
        fq.QuantizationError, match=rf"^{function}: cannot convert 0\.0: KeyError: 'lost'"
    ):
        CALLS[function]()


def test_swap_module_names_itself() -> None:
    linear = nn.Linear(2, 2)
    linear.qconfig = fq.default_qconfig
    for mapping, custom in (({nn.Linear: Unmade}, {}), ({}, {nn.Linear: Unmade})):
        with pytest.raises(fq.QuantizationError, match=r"^swap_module: .*KeyError: 'lost'"):
            fq.swap_module(linear, mapping, custom)


def test_quantize_dynamic_names_itself_where_observers_are_missing() -> None:
    mapping = fq.get_default_static_quant_module_mappings()
    with pytest.raises(fq.QuantizationError, match=r"^quantize_dynamic: .* no observer: 0\.0"):
        fq.quantize_dynamic(configured(None), {nn.Linear}, mapping=mapping)


def test_warnings_point_at_the_users_line() -> None:
    def run(model: nn.Module) -> None:
        pass

    model = Stubbed(fq, nn.Linear(2, 2)).eval()
    model.qconfig = fq.default_qconfig
    with pytest.warns(UserWarning, match="^quantize: the observers of these layers") as record:
        fq.quantize(model, run, ())
    assert record[0].filename == __file__


# ------------------------------------------------------------------------------------- warnings


@pytest.mark.torch_ao
def test_averages_that_crossed_by_rounding_count_as_calibrated() -> None:
    model = Stubbed(fq, nn.Linear(2, 2)).eval()
    average = fq.MovingAverageMinMaxObserver.with_args(averaging_constant=0.01)
    model.qconfig = fq.QConfig(average, fq.default_weight_observer)
    model = fq.prepare(model)
    for module in model.modules():
        if isinstance(module, fq.MovingAverageMinMaxObserver):
            module.min_val.fill_(0.011340335011482239)
            module.max_val.fill_(0.011340334080159664)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = fq.convert(model)
    assert converted.quant.scale.item() < 1e-4


@pytest.fixture
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield record


def messages(recorded: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in recorded if "QuantStub" in str(w.message)]


@pytest.mark.torch_ao
@pytest.mark.parametrize("body", [nn.Linear(4, 4), Residual()])
def test_a_model_without_quantstub_is_warned_of(
    body: nn.Module, recorded: list[warnings.WarningMessage]
) -> None:
    model = nn.Sequential(nn.Identity(), body).eval()
    x = torch.randn(2, 4) if isinstance(body, nn.Linear) else torch.randn(2, 4, 6, 6)
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    model(x)
    converted = fq.convert(model)
    (message,) = messages(recorded)
    assert re.search(r", 1(\.\w+)? will fail\.", message)
    with pytest.raises(NotImplementedError, match="Could not run 'quantized::"):
        converted(x)


def wrapped(body: nn.Module) -> nn.Module:
    return fq.QuantWrapper(body)


def quantizing_part_kept(body: nn.Module) -> nn.Module:
    """A part that was converted before."""
    return nn.Sequential(nnq.Quantize(0.1, 0, torch.quint8), body)


@pytest.mark.parametrize("wrap", [wrapped, quantizing_part_kept])
def test_a_model_that_quantizes_is_not(
    wrap: Callable[[nn.Module], nn.Module], recorded: list[warnings.WarningMessage]
) -> None:
    model = wrap(nn.Linear(4, 4)).eval()
    model.qconfig = fq.default_qconfig
    fq.convert(fq.prepare(model))
    assert not messages(recorded)


class Quantizing(nn.Module):
    """A user's own module that quantizes, by from_float."""

    @classmethod
    def from_float(cls, module: nn.Module) -> Quantizing:
        return cls()


def test_a_users_own_targets_may_quantize(recorded: list[warnings.WarningMessage]) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4)).eval()
    model.qconfig = fq.default_qconfig
    mapping = {**fq.get_default_static_quant_module_mappings(), nn.Identity: Quantizing}
    fq.convert(fq.prepare(model), mapping)
    fq.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))
    assert not messages(recorded)


@pytest.mark.torch_ao
def test_torchs_own_converts_inside_a_patched_one_do_not_warn(
    recorded: list[warnings.WarningMessage],
) -> None:
    case = STATIC_CASES["lstm"]
    with fq.patch_torch_ao():
        model = case.make(fq)
        model.qconfig = fq.default_qconfig
        model = fq.prepare(model)
        model(*case.inputs(0))
        fq.convert(model)
    assert not messages(recorded)


# ------------------------------------------------- torch's modules that compute something else


class Attending(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.quant = fq.QuantStub()
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)
        self.dequant = fq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        return self.dequant(self.attention(x, x, x)[0])


@pytest.mark.parametrize("backend", ["torch.ao", "native"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_right_with_the_batch_first_too(batch_first: bool, backend: str) -> None:
    x = torch.randn(4, 3, 8)
    model = Attending(batch_first=batch_first).eval()
    expected = model(x)
    model.qconfig = fq.get_default_qconfig("x86")
    prepared = fq.prepare(model)
    assert isinstance(prepared.attention, nnquantizable.MultiheadAttention)
    torch.testing.assert_close(prepared(x), expected)
    converted = fq.convert(prepared, backend=backend)
    torch.testing.assert_close(converted(x), expected, atol=0.05, rtol=0)
    model.attention.qconfig = None
    prepared = fq.prepare(model)
    assert not isinstance(prepared.attention, nnquantizable.MultiheadAttention)


def test_attention_that_torch_ao_prepared_with_the_batch_first_is_refused() -> None:
    x = torch.randn(4, 3, 8)
    model = Attending(batch_first=True).eval()
    expected = model(x)
    model.qconfig = fq.get_default_qconfig("x86")
    with quiet():
        prepared = tq.prepare(model)
    prepared(x)
    with pytest.raises(fq.QuantizationError, match=r"attention \(batch_first=True"):
        fq.convert(prepared)
    converted = fq.convert(prepared, backend="native")
    torch.testing.assert_close(converted(x), expected, atol=0.05, rtol=0)


WRONG_BAGS: dict[str, dict[str, Any]] = {
    "mode='mean'": {"mode": "mean"},
    "mode='max'": {"mode": "max"},
    "max_norm=0.5": {"mode": "sum", "max_norm": 0.5},
    "padding_idx=2": {"mode": "sum", "padding_idx": 2},
}


@pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2])
@pytest.mark.parametrize("setting", WRONG_BAGS)
def test_embedding_bags_that_torch_would_sum_otherwise_are_refused(
    setting: str, dtype: torch.dtype
) -> None:
    bag = nn.EmbeddingBag(10, 8, _weight=torch.randn(10, 8), **WRONG_BAGS[setting])
    indices, offsets = torch.arange(10), torch.tensor([0, 3, 5])
    qconfig = (
        fq.float_qparams_weight_only_qconfig
        if dtype == torch.quint8
        else fq.float_qparams_weight_only_qconfig_4bit
    )
    with quiet():
        theirs = tq.quantize_dynamic(nn.Sequential(bag), {nn.EmbeddingBag: qconfig}, dtype=dtype)
        error = theirs[0](indices, offsets) - copy.deepcopy(bag)(indices, offsets)
    assert error.abs().max() > 0.5
    with pytest.raises(fq.QuantizationError, match=rf"^quantize_dynamic: .*0 \({setting}"):
        fq.quantize_dynamic(nn.Sequential(bag), {nn.EmbeddingBag: qconfig}, dtype=dtype)


@pytest.mark.parametrize("setting", ["max_norm=0.5", "padding_idx=2"])
def test_embedding_bags_whose_setting_makes_no_difference_are_quantized(setting: str) -> None:
    bag = nn.EmbeddingBag(10, 8, _weight=torch.randn(10, 8), **WRONG_BAGS[setting])
    indices, offsets = torch.arange(10), torch.tensor([0, 3, 5])
    with torch.no_grad():
        if bag.padding_idx is not None:
            bag.weight[bag.padding_idx] = 0
        expected = bag(indices, offsets)  # which shortens rows to max_norm
    spec = {nn.EmbeddingBag: fq.float_qparams_weight_only_qconfig}
    quantized = fq.quantize_dynamic(nn.Sequential(bag), spec)
    torch.testing.assert_close(quantized[0](indices, offsets), expected, atol=0.1, rtol=0)


@pytest.mark.torch_ao
def test_embeddings_with_rows_beyond_max_norm_are_refused() -> None:
    spec = {nn.Embedding: fq.float_qparams_weight_only_qconfig}
    with pytest.raises(fq.QuantizationError, match="max_norm"):
        fq.quantize_dynamic(nn.Sequential(nn.Embedding(10, 8, max_norm=0.5)), spec)
    quantized = fq.quantize_dynamic(nn.Sequential(nn.Embedding(10, 8, padding_idx=2)), spec)
    assert type(quantized[0]) is nnq.Embedding


@pytest.mark.torch_ao
@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def test_instance_norms_with_running_statistics_are_refused(kind: type[nn.Module]) -> None:
    dims = int(kind.__name__[-2])
    x = torch.randn(2, 3, *(5,) * dims)
    for tracks in (True, False):
        model = Stubbed(fq, kind(3, affine=True, track_running_stats=tracks)).eval()
        model.qconfig = fq.default_qconfig
        prepared = fq.prepare(model)
        prepared(x)
        if tracks:
            with pytest.raises(fq.QuantizationError, match=r"body \(track_running_stats=True"):
                fq.convert(prepared)
        else:
            torch.testing.assert_close(fq.convert(prepared)(x), model(x), atol=0.1, rtol=0)


@pytest.fixture(params=[e for e in torch.backends.quantized.supported_engines if e != "none"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("channels", [(4, 4), (4, 6), (6, 4)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_that_torch_computes_wrongly_are_named(
    engine: str,
    dims: int,
    channels: tuple[int, int],
    recorded: list[warnings.WarningMessage],
) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = Stubbed(fq, nn.Sequential(kind(*channels, 3, stride=2, padding=1))).eval()
    model.qconfig = fq.QConfig(
        fq.MinMaxObserver.with_args(reduce_range=True), fq.default_weight_observer
    )
    x = torch.randn(2, channels[0], *(5,) * dims)
    prepared = fq.prepare(model)
    expected = prepared(x)
    scales = {
        path: m.scale for path, m in fq.convert(prepared).named_modules() if hasattr(m, "scale")
    }
    try:
        converted = fq.convert(prepared)
        converted.body[0].weight()
        got = converted(x)
    except RuntimeError:
        pytest.skip(f"{engine} does not do this")
    assert {p: m.scale for p, m in converted.named_modules() if hasattr(m, "scale")} == scales
    is_right = (got - expected).abs().max() < 0.1 * expected.abs().max()
    warned = [w for w in recorded if "wrong numbers" in str(w.message)]
    assert bool(warned) == (not is_right)
    assert all(f"{engine!r} for body.0." in str(w.message) for w in warned)
    assert all(w.filename == __file__ for w in warned)


@pytest.mark.parametrize("on", ["instance", "class"])
def test_another_forward_of_a_weights_fake_quantizer_sees_it_fake_quantize(
    on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[ModuleType, list[tuple[int, bool]]] = {}
    for ns in (fq, tq):
        model = nn.Sequential(ns.QuantStub(), nn.Linear(4, 4), ns.DeQuantStub()).train()
        model.qconfig = ns.get_default_qat_qconfig("x86", 0)
        with quiet(), monkeypatch.context() as patch:
            prepared = ns.prepare_qat(model)
            prepared(torch.randn(8, 4))
            fake_quantizer: Any = prepared[1].weight_fake_quant
            forward, calls = type(fake_quantizer).forward, seen.setdefault(ns, [])

            def spy(self: Any, x: Tensor, forward: Any = forward, calls: Any = calls) -> Tensor:
                y = forward(self, x)
                if x.shape == (4, 4):
                    calls.append((int(self.fake_quant_enabled), torch.equal(x, y)))
                return y  # type: ignore[no-any-return]

            if on == "class":
                patch.setattr(type(fake_quantizer), "forward", spy)
            else:
                fake_quantizer.forward = functools.partial(spy, fake_quantizer)
            ns.convert(prepared.eval(), inplace=True)
    assert seen[fq] == seen[tq] == [(1, False)]
