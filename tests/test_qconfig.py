"""Configs, mappings and helpers, against torch.ao.quantization's."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from torch import nn

import fastquant as fq
from fastquant.qconfig import (
    _activation_is_memoryless,
    _add_module_to_qconfig_obs_ctr,
    _assert_valid_qconfig,
    _is_reuse_input_qconfig,
    _obs_or_fq_ctr_equals,
    _partial_wrapper_equals,
)
from oracle import assert_same, recipes
from zoo import tree

NAMED = [name for name in tq.qconfig.__all__ if isinstance(getattr(tq.qconfig, name), tq.QConfig)]
BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")


@pytest.mark.parametrize("name", NAMED)
def test_named_configs_are_torchs(name: str) -> None:
    ours, theirs = getattr(fq, name), getattr(tq, name)
    assert recipes(ours) == recipes(theirs)
    assert type(ours) is fq.QConfig


@pytest.mark.torch_ao
def test_there_are_named_configs_to_compare() -> None:
    assert len(NAMED) > 20
    for name in ("_default_fp32_placeholder_qconfig", "_default_quint8_placeholder_qconfig"):
        ours, theirs = getattr(fq.qconfig, name), getattr(tq.qconfig, name)
        assert recipes(ours) == recipes(theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_configs_of_backends_are_torchs(backend: str) -> None:
    assert recipes(fq.get_default_qconfig(backend)) == recipes(tq.get_default_qconfig(backend))
    for version in (0, 1):
        assert recipes(fq.get_default_qat_qconfig(backend, version)) == recipes(
            tq.get_default_qat_qconfig(backend, version)
        )
    assert recipes(fq.get_default_qconfig()) == recipes(fq.get_default_qconfig("x86", 0))
    assert recipes(fq.get_default_qat_qconfig()) == recipes(fq.get_default_qat_qconfig("x86", 1))


@pytest.mark.parametrize("get", [fq.get_default_qconfig, fq.get_default_qat_qconfig])
def test_unknown_backends_and_versions_are_refused(get: Any) -> None:
    with pytest.raises(AssertionError, match=r"'tpu' is not supported; accepted: 'fbgemm', 'x86'"):
        get("tpu")
    with pytest.raises(ValueError, match="version 7 is not supported; accepted: 0"):
        get("x86", 7)


# --------------------------------------------------------------------------------------- QConfig


@pytest.mark.parametrize("cls", [fq.QConfig, fq.QConfigDynamic])
def test_a_config_takes_factories_and_no_observers(cls: Any) -> None:
    qconfig = cls(activation=fq.MinMaxObserver, weight=fq.default_weight_observer)
    assert qconfig == (fq.MinMaxObserver, fq.default_weight_observer)
    assert qconfig._fields == ("activation", "weight")
    with pytest.raises(ValueError, match=r"instance as weight \(MinMaxObserver\)"):
        cls(fq.MinMaxObserver, fq.MinMaxObserver())


def test_a_config_can_be_copied_and_pickled() -> None:
    qconfig = fq.get_default_qat_qconfig()
    for other in (copy.deepcopy(qconfig), pickle.loads(pickle.dumps(qconfig))):
        assert type(other) is fq.QConfig
        assert fq.qconfig_equals(other, qconfig)


def test_dynamic_config_defaults_to_identities() -> None:
    assert fq.QConfigDynamic() == (nn.Identity, nn.Identity)


@dataclasses.dataclass
class Configured:
    """A factory that has a dataclass's `__eq__`, and so no hash."""

    make: Any

    def __call__(self, **kwargs: Any) -> nn.Module:
        return self.make(**kwargs)

    def method(self, **kwargs: Any) -> nn.Module:
        return self.make(**kwargs)


class Slotted:
    """A factory to which no weak reference is possible."""

    __slots__ = ("make",)

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, **kwargs: Any) -> nn.Module:
        return self.make(**kwargs)


class EqualToAll(Slotted):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class WithArgs(EqualToAll):
    """A factory with an observer's `with_args`, and equal to others that make other things."""

    def with_args(self, **kwargs: Any) -> Any:
        return self.make.with_args(**kwargs)

    def with_callable_args(self, **kwargs: Any) -> Any:
        return self.make.with_callable_args(**kwargs)


FACTORIES = {
    "class": lambda cls: cls,
    "with_args": lambda cls: cls.with_args(),
    "dataclass": Configured,
    "method of an unhashable object": lambda cls: Configured(cls).method,
    "slots": Slotted,
    "equal to all": EqualToAll,
    "equal to all, with_args": WithArgs,
    "partial": functools.partial,
    "lambda": lambda cls: lambda **kwargs: cls(**kwargs),  # noqa: PLW0108
}


@pytest.mark.parametrize("wrap", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_any_callable_is_a_factory(wrap: Any, qat: bool) -> None:
    trees = []
    for ns in (tq, fq):
        activation, weight = (
            (ns.FakeQuantize,) * 2 if qat else (ns.HistogramObserver, ns.MinMaxObserver)
        )
        model = nn.Sequential(ns.QuantStub(), nn.Linear(4, 3), ns.DeQuantStub()).train(qat)
        model.qconfig = ns.QConfig(wrap(activation), wrap(weight))
        prepared = (ns.prepare_qat if qat else ns.prepare)(model)
        prepared(torch.randn(5, 4))
        trees.append(tree(prepared))
    assert trees[0] == trees[1]


def test_factories_that_claim_to_be_equal_are_asked_each() -> None:
    qconfig = fq.QConfig(WithArgs(fq.PlaceholderObserver), WithArgs(fq.MinMaxObserver))
    bound = _add_module_to_qconfig_obs_ctr(qconfig, nn.Linear(2, 2, device="meta"))
    assert type(bound.activation()) is fq.PlaceholderObserver
    assert bound.weight().min_val.is_meta


@pytest.mark.parametrize("weight", [None, Configured(fq.default_weight_observer)])
def test_a_config_may_do_without_one_factory(weight: Any) -> None:
    model = nn.Sequential(fq.QuantStub(), nn.ReLU(), fq.DeQuantStub()).eval()
    model.qconfig = fq.QConfig(fq.MinMaxObserver, weight)
    prepared = fq.prepare(model)
    prepared(torch.randn(3))
    quantized = fq.convert(prepared)
    assert type(quantized[0]) is nnq.Quantize
    dynamic = fq.quantize_dynamic(
        nn.Sequential(nn.Linear(2, 2)), {nn.Linear: fq.QConfig(None, weight)}
    )
    assert type(dynamic[0]) is torch.ao.nn.quantized.dynamic.Linear


@pytest.mark.filterwarnings("ignore")
def test_torchs_numeric_suite_compares_models() -> None:
    from torch.ao.ns import _numeric_suite

    x = torch.randn(3, 4)
    results = []
    for patched in (False, True):
        torch.manual_seed(0)
        with fq.patch_torch_ao() if patched else contextlib.nullcontext():
            ns = fq if patched else tq
            model = nn.Sequential(ns.QuantStub(), nn.Linear(4, 3), nn.ReLU(), ns.DeQuantStub())
            model.eval().qconfig = ns.default_qconfig
            prepared = ns.prepare(model)
            prepared(x)
            quantized = ns.convert(prepared)
            logged = _numeric_suite.compare_model_outputs(model, quantized, x)
            shadowed = _numeric_suite.compare_model_stub(model, quantized, [nn.Linear], x)
            results.append(({k: v["float"] for k, v in logged.items()}, set(shadowed)))
    assert list(results[0][0]) == ["0.stats", "1.stats"]
    assert_same(results[1], results[0])


def variants(ns: Any) -> list[Any]:
    """Configs of a namespace, no two of them equal."""
    moving = ns.MovingAverageMinMaxObserver
    return [
        ns.QConfig(ns.MinMaxObserver, ns.MinMaxObserver),
        ns.QConfig(ns.HistogramObserver, ns.MinMaxObserver),
        ns.QConfig(ns.MinMaxObserver, None),
        ns.QConfig(ns.MinMaxObserver.with_args(quant_min=0, quant_max=127), ns.MinMaxObserver),
        ns.QConfig(ns.MinMaxObserver.with_args(quant_min=0, quant_max=63), ns.MinMaxObserver),
        ns.QConfig(ns.MinMaxObserver.with_args(quant_min=0), ns.MinMaxObserver),
        ns.QConfig(ns.FakeQuantize.with_args(observer=moving), ns.MinMaxObserver),
        ns.QConfig(
            ns.FakeQuantize.with_args(observer=moving.with_args(averaging_constant=0.5)),
            ns.MinMaxObserver,
        ),
        ns.QConfig(
            ns.FakeQuantize.with_args(observer=moving.with_args(averaging_constant=0.25)),
            ns.MinMaxObserver,
        ),
    ]


def test_configs_are_equal_where_they_make_the_same() -> None:
    first = variants(fq) + variants(tq) + [None, fq.QConfigDynamic(weight=fq.MinMaxObserver)]
    second = variants(fq) + variants(tq) + [None, fq.QConfigDynamic(weight=fq.MinMaxObserver)]
    for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second)):
        assert fq.qconfig_equals(a, b) == (i == j), (a, b)
    assert _obs_or_fq_ctr_equals(first[3].activation, second[3].activation)
    assert _partial_wrapper_equals(first[3].activation, second[3].activation)
    assert not _partial_wrapper_equals(first[3].activation, second[4].activation)


def test_chained_arguments_make_equal_configs_equal() -> None:
    def make() -> Any:
        factory = fq.MinMaxObserver.with_args(quant_min=0).with_args(quant_max=127)
        return fq.QConfig(factory, fq.MinMaxObserver)

    assert fq.qconfig_equals(make(), make())


@pytest.mark.parametrize("ns", [fq, tq])
def test_memoryless_activations_are_recognised(ns: Any) -> None:
    memoryless = ns.MovingAverageMinMaxObserver.with_args(averaging_constant=1)
    for activation, expected in (
        (memoryless, True),
        (ns.FakeQuantize.with_args(observer=memoryless), True),
        (ns.default_dynamic_fake_quant, True),
        (ns.MovingAverageMinMaxObserver, False),
        (ns.MinMaxObserver, False),
        (ns.default_fused_act_fake_quant, False),
        (nn.Identity, False),
    ):
        assert _activation_is_memoryless(ns.QConfig(activation, nn.Identity)) is expected


@pytest.mark.parametrize("ns", [fq, tq])
def test_configs_that_reuse_the_input_are_recognised(ns: Any) -> None:
    assert _is_reuse_input_qconfig(ns.default_reuse_input_qconfig)
    assert not _is_reuse_input_qconfig(ns.default_qconfig)
    assert not _is_reuse_input_qconfig(None)


@pytest.mark.parametrize("ns", [fq, tq])
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
def test_per_channel_weights_of_transposed_convolutions_are_refused(ns: Any) -> None:
    conv = nn.ConvTranspose2d(2, 2, 1)
    for qconfig in (ns.default_per_channel_qconfig, ns.get_default_qconfig("x86")):
        with pytest.raises(AssertionError, match="ConvTranspose2d takes no per-channel weight"):
            _assert_valid_qconfig(qconfig, conv)
        _assert_valid_qconfig(qconfig, nn.Conv2d(2, 2, 1))
    _assert_valid_qconfig(ns.default_qconfig, conv)
    _assert_valid_qconfig(ns.QConfig(ns.MinMaxObserver, None), conv)
    _assert_valid_qconfig(None, conv)


@pytest.mark.parametrize("ns", [fq, tq])
def test_observers_are_made_on_the_modules_device(ns: Any) -> None:
    module = nn.Linear(2, 2, device="meta")
    bound = _add_module_to_qconfig_obs_ctr(ns.default_per_channel_qconfig, module)
    assert bound.activation().min_val.device.type == "meta"
    assert bound.weight().min_val.device.type == "meta"
    # What takes no device is left as it is, and so is a config of another kind.
    assert _add_module_to_qconfig_obs_ctr(
        ns.QConfig(ns.PlaceholderObserver, nn.Identity), module
    ) == (ns.PlaceholderObserver, nn.Identity)
    assert _add_module_to_qconfig_obs_ctr(None, module) is None
    assert _add_module_to_qconfig_obs_ctr(ns.default_qconfig, None) is ns.default_qconfig


def test_a_config_bound_to_a_module_follows_its_copy() -> None:
    module = nn.Linear(2, 2)
    module.qconfig = _add_module_to_qconfig_obs_ctr(fq.default_qconfig, module)
    copied = copy.deepcopy(module).to("meta")
    assert copied.qconfig.weight().min_val.device.type == "meta"
    assert module.qconfig.weight().min_val.device.type == "cpu"
