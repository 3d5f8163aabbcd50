"""prepare, convert and their kin, against torch.ao.quantization and by themselves."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from fastquant.quantize import (
    _add_observer_,
    _get_observer_dict,
    _observer_forward_pre_hook,
    _remove_qconfig,
)
from oracle import assert_same, beside_torch_ao, quiet, torch_ao_quantization
from zoo import (
    QAT_QCONFIGS,
    STATIC_CASES,
    STATIC_QCONFIGS,
    Case,
    ConvNet,
    Embedded,
    Nested,
    QConfigOf,
    Residual,
    Stubbed,
    Zoo,
    tree,
)

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


INF, NAN = float("inf"), float("nan")

PER_CHANNEL = ("x86", "per_channel")


def observers(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _get_observer_dict(model, found)
    return found


def qparams(model: nn.Module) -> dict[str, Any]:
    """Scale and zero point of each observer that has seen something."""
    return {
        path: tuple(part.float() for part in observer.calculate_qparams())
        for path, observer in observers(model).items()
        if observer.state_dict() and hasattr(observer, "calculate_qparams")
    }


def layout(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


# ------------------------------------------------------------------ against torch.ao.quantization


def combinations(static: bool) -> list[Any]:
    return list(_combinations(static))


def _combinations(static: bool) -> Iterator[Any]:
    for name, case in STATIC_CASES.items():
        if not static and not case.trains:
            continue
        for qconfig in STATIC_QCONFIGS if static else QAT_QCONFIGS:
            if case.per_tensor_only and qconfig in PER_CHANNEL:
                continue
            # torch.ao takes seconds for the histograms of an LSTM.
            if name == "lstm_deep" and qconfig != "minmax":
                continue
            for fuse in (False, True):
                if (fuse and not case.fusable) or (case.must_fuse and not fuse):
                    continue
                yield pytest.param(
                    case, qconfig, fuse, id=f"{name}-{qconfig}{'-fused' if fuse else ''}"
                )


# torch's own two-layer LSTM concatenates tensors of different scales.
@pytest.mark.filterwarnings("ignore:All inputs of this cat operator")
@pytest.mark.parametrize(("case", "qconfig", "fuse"), combinations(static=True))
def test_static_quantization_matches_torch(case: Case, qconfig: str, fuse: bool) -> None:
    with quiet():
        theirs = case.calibrated(tq, STATIC_QCONFIGS[qconfig], fuse)
        expected = qparams(theirs)
        their_int8 = tq.convert(theirs)
    ours = case.calibrated(fq, STATIC_QCONFIGS[qconfig], fuse)
    assert tree(ours) == tree(theirs)
    assert layout(ours) == layout(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the observers inside MultiheadAttention
        assert_same(qparams(ours), expected)
    our_int8 = fq.convert(ours)
    assert tree(our_int8) == tree(their_int8)
    assert_same(dict(our_int8.state_dict()), dict(their_int8.state_dict()))
    x = case.inputs(9)
    assert_same(our_int8(*x), their_int8(*x))


@pytest.mark.usefixtures("torchs_qat_arithmetic")
@pytest.mark.parametrize(("case", "qconfig", "fuse"), combinations(static=False))
def test_qat_matches_torch(case: Case, qconfig: str, fuse: bool) -> None:
    with quiet():
        theirs = case.trained(tq, QAT_QCONFIGS[qconfig], fuse)
        their_int8 = tq.convert(theirs)
    ours = case.trained(fq, QAT_QCONFIGS[qconfig], fuse)
    our_int8 = fq.convert(ours)
    assert tree(ours) == tree(theirs)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    x = case.inputs(9)
    assert_same(ours(*x), theirs(*x))
    assert tree(our_int8) == tree(their_int8)
    assert_same(dict(our_int8.state_dict()), dict(their_int8.state_dict()))
    assert_same(our_int8(*x), their_int8(*x))


@pytest.mark.parametrize("fuse", [False, True])
def test_fused_qat_op_comes_close_to_torch(fuse: bool) -> None:
    case = STATIC_CASES["conv_net"]
    with quiet():
        theirs = case.trained(tq, lambda ns: ns.get_default_qat_qconfig("x86"), fuse)
        their_int8 = tq.convert(theirs)
    ours = case.trained(fq, lambda ns: ns.get_default_qat_qconfig("x86"), fuse)
    assert layout(ours) == layout(theirs)
    for path, observer in observers(ours).items():
        inner = getattr(observer, "activation_post_process", observer)
        other = getattr(observers(theirs)[path], "activation_post_process", observers(theirs)[path])
        torch.testing.assert_close(inner.min_val, other.min_val, rtol=0.05, atol=0.05)
    x = case.inputs(9)
    torch.testing.assert_close(fq.convert(ours)(*x), their_int8(*x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "name", [name for name, case in STATIC_CASES.items() if case.has_reference]
)
def test_reference_conversion_matches_torch(name: str) -> None:
    case = STATIC_CASES[name]
    qconfig = STATIC_QCONFIGS["minmax"]
    with quiet():
        theirs = tq.convert(case.calibrated(tq, qconfig), is_reference=True)
    ours = fq.convert(case.calibrated(fq, qconfig), is_reference=True)
    assert tree(ours) == tree(theirs)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


DYNAMIC_SPECS: dict[str, tuple[torch.dtype, QConfigOf]] = {
    "qint8": (torch.qint8, lambda ns: None),
    "float16": (torch.float16, lambda ns: None),
    "qint8_set": (torch.qint8, lambda ns: {nn.Linear, "gru"}),
    "float16_set": (torch.float16, lambda ns: {nn.LSTM, "fc"}),
    "dict": (
        torch.qint8,
        lambda ns: {
            nn.Linear: ns.per_channel_dynamic_qconfig,
            "lstm": ns.float16_dynamic_qconfig,
            "gru_cell": ns.default_dynamic_qconfig,
        },
    ),
}


@pytest.mark.parametrize("spec", DYNAMIC_SPECS)
def test_dynamic_quantization_matches_torch(spec: str) -> None:
    dtype, qconfig_spec = DYNAMIC_SPECS[spec]
    torch.manual_seed(0)
    model = Zoo()
    with quiet():
        theirs = tq.quantize_dynamic(model, qconfig_spec(tq), dtype)
    ours = fq.quantize_dynamic(model, qconfig_spec(fq), dtype)
    assert tree(ours) == tree(theirs)
    assert tree(ours) != tree(model)
    x = torch.randn(3, 4, 6)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2])
@pytest.mark.parametrize("spec", [None, {nn.EmbeddingBag}, {"bag"}])
def test_embedding_quantization_matches_torch(dtype: torch.dtype, spec: Any) -> None:
    torch.manual_seed(0)
    model = Embedded()
    with quiet():
        theirs = tq.quantize_dynamic(model, spec, dtype)
    ours = fq.quantize_dynamic(model, spec, dtype)
    assert tree(ours) == tree(theirs)
    assert type(ours.bag) is nnq.EmbeddingBag
    indices, offsets = torch.tensor([1, 2, 5, 7, 11]), torch.tensor([0, 3, 5])
    assert_same(ours(indices, offsets), theirs(indices, offsets))


def test_embedding_training_matches_torch() -> None:
    def run(ns: ModuleType) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4)).train()
        model[0].qconfig = ns.default_embedding_qat_qconfig
        model = ns.prepare_qat(model, mapping=ns.get_embedding_qat_module_mappings())
        model(torch.tensor([[0, 3], [5, 7]])).sum().backward()
        return model, ns.convert(model.eval(), ns.get_embedding_static_quant_module_mappings())

    with quiet():
        theirs, their_int8 = run(tq)
    ours, our_int8 = run(fq)
    assert tree(ours) == tree(theirs)
    assert type(ours[0]) is nnqat.Embedding
    assert_same(ours[0].weight.grad, theirs[0].weight.grad)
    assert tree(our_int8) == tree(their_int8)
    x = torch.tensor([[1, 2]])
    assert_same(our_int8(x), their_int8(x))


def test_special_activations_train_with_fixed_parameters() -> None:
    case = STATIC_CASES["activations"]
    model = case.make(fq).train()
    model.qconfig = fq.get_default_qat_qconfig("x86")
    model = fq.prepare_qat(model)
    fixed = {
        type(module).__name__: type(module.activation_post_process)
        for module in model.body
        if hasattr(module, "activation_post_process")
    }
    for name in ("Sigmoid", "Tanh", "Hardsigmoid"):
        assert fixed[name] is fq.FixedQParamsFakeQuantize
    assert fixed["Hardswish"] is fq.FusedMovingAvgObsFakeQuantize
    assert "Dropout" not in fixed


def test_memoryless_activations_are_observed_on_the_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    qconfig = fq.QConfig(fq.default_dynamic_fake_quant, fq.default_weight_fake_quant)
    model[0].qconfig = qconfig
    mapping = {nn.Linear: torch.ao.nn.qat.dynamic.Linear}
    model = fq.prepare_qat(model.train(), mapping)
    x = torch.tensor([[-1.0, 2.0, 0.5, 3.0]])
    model(x)
    observed = model[0].activation_post_process.activation_post_process
    assert (observed.min_val.item(), observed.max_val.item()) == (-1.0, 3.0)
    assert list(model[0]._forward_pre_hooks.values()) == [_observer_forward_pre_hook]
    assert not model[0]._forward_hooks
    converted = fq.convert(model.eval(), fq.get_default_dynamic_quant_module_mappings())
    assert type(converted[0]) is nnqd.Linear
    assert not converted[0]._forward_pre_hooks
    converted(x)


def test_precomputed_fake_quant_keeps_trained_weight_ranges() -> None:
    def weight(ns: ModuleType, precomputed: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(ns.QuantStub(), nn.Linear(4, 3)).train()
        model.qconfig = ns.get_default_qat_qconfig("qnnpack", 0)
        model = ns.prepare_qat(model)
        model(torch.randn(2, 4))
        with torch.no_grad():
            model[1].weight.mul_(2)
        model = ns.convert(model.eval(), use_precomputed_fake_quant=precomputed)
        return model[1].weight()

    with quiet():
        expected = [weight(tq, precomputed) for precomputed in (False, True)]
    ours = [weight(fq, precomputed) for precomputed in (False, True)]
    assert_same(ours, expected)
    assert ours[0].q_scale() != ours[1].q_scale()


# ---------------------------------------------------------------------------------- qconfigs


def qconfigs(model: nn.Module) -> dict[str, Any]:
    return {path: getattr(m, "qconfig", "absent") for path, m in model.named_modules()}


def assert_qconfigs(model: nn.Module, expected: dict[str, Any]) -> None:
    found = qconfigs(model)
    for path, qconfig in expected.items():
        if qconfig in (None, "absent"):
            assert found[path] is qconfig or found[path] == qconfig, path
        else:
            assert fq.qconfig_equals(found[path], qconfig), path


def test_propagation_prefers_own_then_name_then_type_then_parent() -> None:
    model = Nested()
    model.blocks[1].qconfig = None
    parent, by_type, by_name, by_path = (
        fq.default_qconfig,
        fq.default_per_channel_qconfig,
        fq.default_dynamic_qconfig,
        fq.float16_dynamic_qconfig,
    )
    fq.propagate_qconfig_(
        model,
        {"": parent, nn.Linear: by_type, "heads": by_name, "blocks.0.0": by_path},
    )
    assert_qconfigs(
        model,
        {
            "": parent,
            "blocks": parent,
            "blocks.0": parent,
            "blocks.0.0": by_path,
            "blocks.0.1": parent,
            "blocks.1": None,
            # A type beats what the parent hands down, also where the parent is switched off.
            "blocks.1.0": by_type,
            "heads": by_name,
            "heads.0": by_type,
        },
    )


def test_propagation_leaves_out_non_traceable_modules_at_any_depth() -> None:
    model = nn.Sequential(Nested(), nn.Sequential(Residual()))
    fq.propagate_qconfig_(
        model,
        {"": fq.default_qconfig},
        {
            "non_traceable_module_name": ["0.blocks.0", "1.0.conv"],
            "non_traceable_module_class": [nn.ModuleList],
        },
    )
    found = qconfigs(model)
    absent = {path for path, qconfig in found.items() if qconfig == "absent"}
    assert absent == {
        "0.blocks.0",
        "0.blocks.0.0",
        "0.blocks.0.1",
        "0.heads",
        "0.heads.0",
        "0.heads.1",
        "1.0.conv",
    }


def test_prepare_leaves_out_non_traceable_modules() -> None:
    model = Stubbed(fq, Nested()).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(
        model, prepare_custom_config_dict={"non_traceable_module_name": ["body.heads"]}
    )
    assert "body.blocks.0.0.activation_post_process" in observers(model)
    assert not any(path.startswith("body.heads") for path in observers(model))


def test_observers_made_later_are_made_where_the_module_is_then() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.qconfig = fq.default_qconfig
    fq.propagate_qconfig_(model)
    assert model[0].qconfig.weight().min_val.device.type == "cpu"
    model.to("meta")
    assert model[0].qconfig.weight().min_val.device.type == "meta"


def test_add_quant_dequant_wraps_leaves_that_have_a_qconfig() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model[0].qconfig = model[1][0].qconfig = fq.default_qconfig
    wrapped = fq.add_quant_dequant(copy.deepcopy(model))
    assert type(wrapped[0]) is fq.QuantWrapper
    assert type(wrapped[1][0]) is fq.QuantWrapper
    assert type(wrapped[1][1]) is nn.ReLU
    x = torch.randn(3, 2)
    assert_same(wrapped(x), model(x))
    leaf = nn.Linear(2, 2)
    leaf.qconfig = fq.default_qconfig
    assert type(fq.add_quant_dequant(leaf)) is fq.QuantWrapper


# ---------------------------------------------------------------------------------- observers


def test_a_copy_is_prepared_and_converted_unless_inplace() -> None:
    case = STATIC_CASES["conv_net"]
    model = case.make(fq)
    model.qconfig = fq.default_qconfig
    before = tree(model)
    copied = fq.prepare(model)
    assert tree(model) == before
    assert fq.prepare(model, inplace=True) is model
    assert tree(model) == tree(copied) != before
    model(*case.inputs(0))
    before = tree(model)
    copied = fq.convert(model)
    assert tree(model) == before
    assert fq.convert(model, inplace=True) is model
    assert tree(model) == tree(copied) != before


def test_conversion_removes_configs_observers_and_hooks_unless_told_not_to() -> None:
    case = STATIC_CASES["residual"]
    model = case.calibrated(fq, STATIC_QCONFIGS["minmax"])
    converted = fq.convert(model)
    for module in converted.modules():
        assert not hasattr(module, "qconfig")
        assert not fq.observer._is_activation_post_process(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    kept = fq.convert(model, remove_qconfig=False)
    assert kept.qconfig is not None
    assert_same(kept(*case.inputs(9)), converted(*case.inputs(9)))


def test_allow_list_limits_what_is_observed() -> None:
    model = Stubbed(fq, ConvNet()).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model, allow_list=[fq.QuantStub, nn.Linear])
    assert set(observers(model)) == {
        "quant.activation_post_process",
        "body.fc.activation_post_process",
    }


def test_non_leaf_modules_are_observed_as_a_whole() -> None:
    model = Stubbed(fq, Residual()).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model, observer_non_leaf_module_list=[Residual])
    assert "body.activation_post_process" in observers(model)
    assert "body.conv.activation_post_process" not in observers(model)
    y = model.body(torch.randn(1, 4, 3, 3))
    assert model.body.activation_post_process.max_val == y.max()


def histograms(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.endswith("histogram")}


def fused_and_prepared(ns: ModuleType, activation: Any = None) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = Stubbed(ns, ns.fuse_modules(body.eval(), [["0", "1", "2"]])).eval()
    activation = activation or ns.HistogramObserver.with_args(bins=300)
    model.qconfig = ns.QConfig(activation, ns.default_weight_observer)
    return ns.prepare(model)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_histograms_of_fused_modules_count_as_torch_aos(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    theirs, ours = fused_and_prepared(tq), copied(fused_and_prepared(fq))
    for seed in range(3):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        theirs(x)
        ours(x)
    expected = histograms(theirs)
    assert histograms(ours).keys() == expected.keys()
    for name, histogram in histograms(ours).items():
        assert torch.equal(histogram, expected[name]), name
    assert expected["body.0.activation_post_process.histogram"].sum() == 2 * 3 * 2 * 4 * 7 * 7
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_an_observer_that_modules_share_counts_as_torch_aos() -> None:
    models = []
    for ns in (tq, fq):
        shared = ns.HistogramObserver(bins=300)
        model = fused_and_prepared(ns, lambda shared=shared: shared)
        model(torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)))
        models.append(model)
    theirs, ours = map(histograms, models)
    for name, histogram in theirs.items():
        assert torch.equal(ours[name], histogram), name


def test_preparing_twice_does_not_observe_twice() -> None:
    model = Stubbed(fq, nn.Linear(4, 4)).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(fq.prepare(model))
    seen: list[Any] = []
    model.body.activation_post_process.register_forward_pre_hook(lambda *args: seen.append(args))
    model(torch.randn(2, 4))
    assert len(seen) == 1


def test_a_leaf_with_a_weight_fake_quant_is_observed() -> None:
    # As AdaRound leaves it.
    model = Stubbed(fq, nn.Linear(4, 4)).eval()
    model.body.weight_fake_quant = fq.default_weight_fake_quant()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    model(torch.randn(3, 4))
    assert len(model.body._forward_hooks) == 1
    assert type(model.body.activation_post_process) is fq.MinMaxObserver
    quantized = fq.convert(model)
    assert type(quantized.body) is nnq.Linear
    weight = model.body.weight_fake_quant
    weight(model.body.weight)
    assert quantized.body.weight().q_scale() == weight.calculate_qparams()[0].item()


def test_dropout_is_not_observed_and_goes_away() -> None:
    model = Stubbed(fq, nn.Sequential(nn.Linear(4, 4), nn.Dropout())).eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    assert not hasattr(model.body[1], "activation_post_process")
    model(torch.randn(3, 4))
    assert type(fq.convert(model).body[1]) is nnq.Dropout


def test_observers_see_what_the_module_itself_put_out() -> None:
    model = Stubbed(fq, nn.Linear(4, 4)).eval()
    model.body.register_forward_hook(lambda module, args, output: output * 100)
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    x = torch.randn(3, 4)
    y = model(x)
    assert model.body.activation_post_process.max_val * 100 == y.max()


def test_get_observer_dict_lists_nested_observers_under_a_prefix() -> None:
    model = STATIC_CASES["linears"].trained(fq, QAT_QCONFIGS["x86"])
    found: dict[str, Any] = {}
    _get_observer_dict(model, found, "net")
    theirs: dict[str, Any] = {}
    torch_ao_quantization("quantize")._get_observer_dict(model, theirs, "net")
    assert list(found) == list(theirs)
    assert all(found[path] is theirs[path] for path in found)


def test_one_module_under_two_names_stays_one_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant = fq.QuantStub()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.inner = nn.Sequential(self.first)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.second(self.first(self.quant(x))))

    model = Tied().eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    model(torch.randn(3, 4))
    model = fq.convert(model)
    assert type(model.first) is nnq.Linear
    assert model.second is model.first
    assert model.inner[0] is model.first
    model(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("name", "qat"),
    [
        ("conv_net", False),
        ("conv_net", True),
        ("lstm", False),
        ("lstm", True),
        ("attention", False),
    ],
)
def test_prepared_models_can_be_copied_pickled_and_saved(name: str, qat: bool) -> None:
    case = STATIC_CASES[name]
    if qat:
        model = case.trained(fq, QAT_QCONFIGS["x86"], fuse=bool(case.fusable))
    else:
        model = case.calibrated(fq, STATIC_QCONFIGS["minmax"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    )
    expected = fq.convert(model)(*case.inputs(9))
    for other in copies:
        assert_same(fq.convert(other)(*case.inputs(9)), expected)


# ------------------------------------------------------------------------------ custom modules


class FloatDouble(nn.Module):
    """A module of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class ObservedDouble(FloatDouble):
    @classmethod
    def from_float(cls, module: FloatDouble) -> ObservedDouble:
        observed = cls()
        observed.qconfig = module.qconfig
        return observed


class QuantizedDouble(nn.Module):
    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.scale, self.zero_point = scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        return torch.quantize_per_tensor(
            2 * x.dequantize(), self.scale, self.zero_point, torch.quint8
        )

    @classmethod
    def from_observed(cls, module: Any) -> QuantizedDouble:
        scale, zero_point = module.activation_post_process.calculate_qparams()
        return cls(scale.item(), zero_point.item())


def test_a_users_own_module_is_observed_and_quantized_its_own_way() -> None:
    config = fq.get_default_custom_config_dict()
    config["float_to_observed_custom_module_class"][FloatDouble] = ObservedDouble
    config["observed_to_quantized_custom_module_class"][ObservedDouble] = QuantizedDouble
    assert (
        FloatDouble
        not in (fq.get_default_custom_config_dict()["float_to_observed_custom_module_class"])
    )
    calls: list[str] = []
    model = Stubbed(fq, FloatDouble()).eval()
    model.body.register_forward_hook(lambda *_: calls.append("hook"))
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model, prepare_custom_config_dict=config)
    assert type(model.body) is ObservedDouble
    x = torch.randn(5, 4)
    model(x)
    assert calls == ["hook"]
    model = fq.convert(model, convert_custom_config_dict=config)
    assert type(model.body) is QuantizedDouble
    torch.testing.assert_close(model(x), 2 * x, rtol=0, atol=0.1)
    assert calls == ["hook", "hook"]


# --------------------------------------------------------------------------------------- hooks


def test_swap_module_swaps_one_module() -> None:
    model = STATIC_CASES["linears"].calibrated(fq, STATIC_QCONFIGS["minmax"])
    mapping = fq.get_default_static_quant_module_mappings()
    linear, relu = model.body[0], model.body[1]
    assert type(fq.swap_module(linear, mapping, {})) is nnq.Linear
    assert fq.swap_module(relu, mapping, {}) is relu
    linear.qconfig = None
    assert fq.swap_module(linear, mapping, {}) is linear


def test_training_modules_that_are_left_in_place_go_on_working() -> None:
    case = STATIC_CASES["linears"]
    model = case.trained(fq, QAT_QCONFIGS["x86"])
    # Reference modules exist for float modules only, so those trained stay.
    model = fq.convert(model, is_reference=True)
    assert type(model.body[0]) is nnqat.Linear
    model.body(torch.randn(2, 6))


# ----------------------------------------------------------------------------- in one call


def test_quantize_and_quantize_qat_do_the_whole_way() -> None:
    case = STATIC_CASES["conv_net"]

    def feed(model: nn.Module, seeds: int) -> None:
        for seed in range(seeds):
            model(*case.inputs(seed))

    for ns_call in ("quantize", "quantize_qat"):
        outputs = []
        for ns in (tq, fq):
            model = case.make(ns)
            static = ns_call == "quantize"
            model.qconfig = ns.default_qconfig if static else ns.get_default_qat_qconfig("x86", 0)
            with quiet():
                quantized = getattr(ns, ns_call)(model, feed, [2])
            assert model.qconfig is not None
            assert type(quantized.body.fc) is nnq.Linear
            outputs.append(quantized.eval()(*case.inputs(9)))
        assert_same(outputs[1], outputs[0])


def test_default_eval_fn_is_a_run_fn() -> None:
    model = Stubbed(fq, nn.Linear(4, 2))
    model.qconfig = fq.default_qconfig
    pairs = [(torch.randn(3, 4), torch.zeros(3)) for _ in range(2)]
    quantized = fq.quantize(model, fq.default_eval_fn, [pairs])
    assert type(quantized.body) is nnq.Linear


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "call",
    [
        fq.prepare,
        fq.prepare_qat,
        fq.convert,
        fq.quantize_dynamic,
        fq.propagate_qconfig_,
        fq.add_quant_dequant,
        lambda model: fq.fuse_modules(model, ["a", "b"]),
        lambda model: fq.quantize(model, print, []),
        lambda model: fq.quantize_qat(model, print, []),
    ],
)
def test_what_is_no_module_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        call([nn.Linear(2, 2)])


def test_what_is_no_qconfig_is_refused() -> None:
    model = Stubbed(fq, nn.Linear(2, 2)).eval()
    model.qconfig = "x86"
    with pytest.raises(TypeError, match="must be a QConfig or None, got str"):
        fq.prepare(model)


class OnCuda(nn.Parameter):
    """A parameter that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def test_models_on_several_devices_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    model[1].weight = OnCuda(torch.zeros(2, 2))
    model.qconfig = fq.default_qconfig
    for expected in (ValueError, AssertionError):
        with pytest.raises(expected, match=r"on one device, got cpu, cuda:0"):
            fq.prepare(model)
    fq.propagate_qconfig_(model)
    mapping = fq.get_default_dynamic_quant_module_mappings()
    with pytest.raises(ValueError, match=r"on one device, got cpu, cuda:0"):
        fq.swap_module(model[1], mapping, {})


class Follower(nn.Module):
    """A quantized module that notes where it is moved."""

    moved_to = None

    @classmethod
    def from_float(cls, module: nn.Module) -> Follower:
        return cls()

    def to(self, device: torch.device) -> Follower:  # type: ignore[override]
        self.moved_to = device
        return self


def test_a_swapped_module_goes_where_the_old_one_was() -> None:
    linear = nn.Linear(2, 2)
    linear.qconfig = fq.default_qconfig
    swapped = fq.swap_module(linear, {nn.Linear: Follower}, {})
    assert swapped.moved_to == torch.device("cpu")
    linear.weight, linear.bias = OnCuda(torch.zeros(2, 2)), OnCuda(torch.zeros(2))
    swapped = fq.swap_module(linear, {nn.Linear: Follower}, {})
    assert swapped.moved_to == torch.device("cuda:0")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_observers_go_where_the_model_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).cuda().eval()
    model.qconfig = fq.default_qconfig
    model = fq.prepare(model)
    assert model[0].activation_post_process.min_val.is_cuda
    model(torch.randn(3, 2, device="cuda"))


def test_unknown_dtypes_of_dynamic_quantization_are_refused() -> None:
    for spec in (None, {nn.Linear}):
        with pytest.raises(ValueError, match=r"no default config for torch\.float64"):
            fq.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), spec, torch.float64)


def test_pieces_of_prepare_work_by_themselves() -> None:
    model = Stubbed(fq, nn.Linear(2, 2))
    fq.propagate_qconfig_(model, {"": fq.default_qconfig})
    _add_observer_(model)
    assert set(observers(model)) == {
        "quant.activation_post_process",
        "body.activation_post_process",
    }
    _remove_qconfig(model)
    assert not observers(model)
    assert qconfigs(model) == dict.fromkeys(("", "quant", "body", "dequant"), "absent")


def test_fused_training_modules_are_the_expected_ones() -> None:
    case = STATIC_CASES["conv_net"]
    model = case.trained(fq, QAT_QCONFIGS["x86"], fuse=True)
    assert type(model.body.conv1) is nniqat.ConvBnReLU2d
    assert type(model.body.conv2) is nniqat.ConvBn2d
    assert type(model.body.fc) is nnqat.Linear


def fused_alone(ns: ModuleType, observer: str) -> Any:
    """A prepared convolution with its ReLU: the fused module alone."""
    with quiet():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        model.qconfig = ns.QConfig(getattr(ns, observer), ns.default_weight_observer)
        return ns.prepare(ns.fuse_modules(model, ["0", "1"]))[0]


ONCE = ("HistogramObserver", "MinMaxObserver", "PerChannelMinMaxObserver")


@pytest.mark.parametrize("observer", ONCE)
def test_the_output_of_a_fused_module_is_read_once_and_counted_twice(observer: str) -> None:
    theirs, ours = fused_alone(tq, observer), fused_alone(fq, observer)
    for factor in (1, 2):
        x = factor * torch.randn(4, 3, 8, 8)
        theirs(x)
        ours(x)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    ours(torch.full((4, 3, 3, 3), math.nan))
    assert ours.activation_post_process.nonfinite_count == 16


def _new_observer(fused: Any, ns: ModuleType) -> None:
    kind = type(fused.activation_post_process).__name__
    fused.activation_post_process = getattr(ns, kind)()


def _note(fused: Any, ns: ModuleType) -> None:
    calls = fused.calls = []
    fused.activation_post_process.register_forward_hook(lambda *args: calls.append(1))


def _earlier_hook(fused: Any, ns: ModuleType) -> None:
    fused.register_forward_hook(lambda module, args, y: y * 3, prepend=True)


def _forward_without_observer(fused: Any, ns: ModuleType) -> None:
    fused.forward = lambda x: 2 * fused[1](fused[0](x))


def _forward_around_another(fused: Any, ns: ModuleType) -> None:
    fused.forward = lambda x: 2 * nn.Sequential.forward(fused, x)


def _another_child_last(fused: Any, ns: ModuleType) -> None:
    fused.append(nn.Sigmoid())


@pytest.mark.parametrize("observer", ONCE)
@pytest.mark.parametrize(
    "change",
    [
        *(_new_observer, _note, _earlier_hook),
        *(_forward_without_observer, _forward_around_another, _another_child_last),
    ],
)
def test_what_is_changed_of_a_prepared_fused_module_is_observed_as_by_torch_ao(
    observer: str, change: Callable[[Any, ModuleType], None]
) -> None:
    models = []
    for ns in (tq, fq):
        fused = fused_alone(ns, observer)
        generator = torch.Generator().manual_seed(0)
        fused(torch.randn(4, 3, 8, 8, generator=generator))
        change(fused, ns)
        for factor in (1, 2):
            fused(factor * torch.randn(4, 3, 8, 8, generator=generator))
        models.append((dict(fused.state_dict()), getattr(fused, "calls", None)))
    assert_same(models[1], models[0])


def test_preparing_for_training_does_not_look_at_parametrized_weights_more_often_than_torch() -> (
    None
):
    def prepared(ns: ModuleType) -> nn.Module:
        torch.manual_seed(0)
        # Each look at the weight takes a step of the power iteration.
        model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))).train()
        model.qconfig = ns.get_default_qat_qconfig("x86", 0)
        return ns.prepare_qat(model)

    with quiet():
        theirs = prepared(tq)
    norm = theirs[0].parametrizations.weight[0]
    assert_same(prepared(fq)[0].parametrizations.weight[0]._u, norm._u)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({nn.Linear, nn.Conv2d}, "Conv2d"),
        ({nn.Linear: fq.default_dynamic_qconfig, "0": fq.default_dynamic_qconfig}, "'0' (Conv2d)"),
    ],
)
@pytest.mark.parametrize("backend", [pytest.param("torch.ao", marks=beside_torch_ao), "native"])
def test_dynamic_quantization_names_what_it_leaves_alone(
    spec: Any, named: str, backend: str
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.warns(UserWarning, match=re.escape(f"{named} has no effect")) as caught:
        quantized: Any = fq.quantize_dynamic(model, spec, backend=backend)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(quantized[0]) is nn.Conv2d
    assert type(quantized[1][0]) is not nn.Linear


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", [None, {"layers.0"}])
@pytest.mark.parametrize("backend", [pytest.param("torch.ao", marks=beside_torch_ao), "native"])
def test_encoders_of_torch_can_be_called_when_their_layers_are_dynamic(
    backend: str, spec: Any, masked: bool, mode: Any
) -> None:
    # torch.nn's encoders read the weights of their layers as tensors, and torch.ao's models fail.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    mask = padding if masked else None
    quantized: Any = fq.quantize_dynamic(encoder, spec, backend=backend)
    assert type(quantized.layers[0].linear1) is not nn.Linear
    with mode(), quiet():
        ours, floating = (model(x, src_key_padding_mask=mask) for model in (quantized, encoder))
        again = copy.deepcopy(quantized)(x, src_key_padding_mask=mask)
    keep = ~padding if masked else torch.ones_like(padding)
    assert 0 < (ours - floating)[keep].abs().max() < 0.05
    assert_same(again[keep], ours[keep])


@pytest.mark.parametrize("backend", [pytest.param("torch.ao", marks=beside_torch_ao), "native"])
def test_layers_that_attention_does_not_call_stay_floating(backend: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model, x = Attention().eval(), torch.randn(3, 2, 8)
    with pytest.warns(UserWarning, match=r"'attention' \(MultiheadAttention\) has no effect"):
        quantized = fq.quantize_dynamic(model, {"attention"}, backend=backend)
    assert_same(quantized(x), model(x))


@pytest.mark.parametrize(
    "spec",
    [
        *(None, {nn.Linear, nn.LSTM}, {nn.Sequential: fq.default_dynamic_qconfig}),
        {"1": fq.default_dynamic_qconfig},
        {nn.Linear: fq.default_dynamic_qconfig, nn.Conv2d: None, "0": None},
    ],
)
def test_dynamic_quantization_is_silent_where_a_spec_fits(spec: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantized: Any = fq.quantize_dynamic(model, spec, backend="native")
    assert type(quantized[1][0]) is not nn.Linear
