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
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastquant as fq
from fastquant import utils
from fastquant.qconfig import (
    _activation_is_memoryless,
    _add_module_to_qconfig_obs_ctr,
    _assert_valid_qconfig,
    _is_reuse_input_qconfig,
    _obs_or_fq_ctr_equals,
    _partial_wrapper_equals,
)
from fastquant.quantization_mappings import (
    _get_special_act_post_process,
    _has_special_act_post_process,
)
from oracle import assert_same, quiet
from zoo import tree

NAMED = [name for name in tq.qconfig.__all__ if isinstance(getattr(tq.qconfig, name), tq.QConfig)]
BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")


def recipe(factory: Any) -> Any:
    """What a factory makes, told without the namespace that its classes come from."""
    partial = getattr(factory, "p", factory)
    if isinstance(partial, functools.partial):
        keywords = {key: recipe(value) for key, value in partial.keywords.items()}
        inner = recipe(partial.func)
        return (inner[0], {**inner[1], **keywords}) if isinstance(inner, tuple) else inner
    if isinstance(factory, type):
        return factory.__name__, {}
    return factory


def recipes(qconfig: Any) -> Any:
    if qconfig is None:
        return None
    return {field: recipe(value) for field, value in qconfig._asdict().items()}


@pytest.mark.parametrize("name", NAMED)
def test_named_configs_are_torchs(name: str) -> None:
    ours, theirs = getattr(fq, name), getattr(tq, name)
    assert recipes(ours) == recipes(theirs)
    assert type(ours) is fq.QConfig


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


def mapping_recipe(mapping: Any) -> Any:
    return {
        style: [(key[:-1], recipes(key[-1])) for key in mapping[style]]
        if isinstance(mapping[style], list)
        else recipes(mapping[style])
        for style in mapping
    }


def by_type(mapping: dict[str, Any]) -> dict[Any, Any]:
    return {key: recipes(qconfig) for key, qconfig in mapping["object_type"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qat", [False, True])
def test_config_mappings_of_backends_are_torchs(backend: str, qat: bool) -> None:
    name = "get_default_qat_qconfig" if qat else "get_default_qconfig"
    theirs = getattr(tq, f"{name}_mapping")(backend).to_dict()
    with quiet():
        assert getattr(tq, f"{name}_dict")(backend).keys() == theirs.keys()
    ours = getattr(fq, f"{name}_mapping")(backend)
    assert isinstance(ours, tq.QConfigMapping)
    for mapping in (ours.to_dict(), getattr(fq, f"{name}_dict")(backend)):
        assert recipes(mapping[""]) == recipes(theirs[""])
        assert by_type(mapping) == by_type(theirs)


@pytest.mark.parametrize(
    "name", ["_get_symmetric_qnnpack_qconfig_mapping", "_get_symmetric_qnnpack_qat_qconfig_mapping"]
)
def test_symmetric_config_mappings_are_torchs(name: str) -> None:
    ours = getattr(fq.qconfig_mapping, name)().to_dict()
    theirs = getattr(tq.qconfig_mapping, name)().to_dict()
    assert recipes(ours[""]) == recipes(theirs[""])
    assert by_type(ours) == by_type(theirs)


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


# -------------------------------------------------------------------------------------- mappings


TABLES = [name for name in tq.quantization_mappings.__all__ if name.isupper()]
GETTERS = [
    name
    for name in tq.quantization_mappings.__all__
    if name.startswith("get_") and name.endswith(("mappings", "list"))
] + ["no_observer_set"]


def without_our_stubs(mapping: Any) -> Any:
    stubs = (fq.QuantStub, fq.DeQuantStub)
    if isinstance(mapping, dict):
        return {
            key: recipe(value) if hasattr(value, "p") else value
            for key, value in mapping.items()
            if key not in stubs
        }
    return {key for key in mapping if key not in stubs}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_torchs(name: str) -> None:
    ours = getattr(fq.quantization_mappings, name)
    theirs = getattr(tq.quantization_mappings, name)
    assert without_our_stubs(ours) == without_our_stubs(theirs)
    assert getattr(fq, name) is ours


@pytest.mark.parametrize("name", GETTERS)
def test_getters_are_torchs_and_give_copies(name: str) -> None:
    ours = getattr(fq, name)()
    assert without_our_stubs(ours) == without_our_stubs(getattr(tq, name)())
    ours.clear()
    assert getattr(fq, name)()


def test_our_stubs_are_mapped_as_torchs_are() -> None:
    for mapping in (
        fq.get_default_static_quant_module_mappings(),
        fq.get_default_static_quant_reference_module_mappings(),
    ):
        assert mapping[fq.QuantStub] is mapping[tq.QuantStub] is nnq.Quantize
        assert mapping[fq.DeQuantStub] is mapping[tq.DeQuantStub] is nnq.DeQuantize


def test_quantized_counterparts_are_looked_up() -> None:
    assert fq.get_static_quant_module_class(nn.Linear) is nnq.Linear
    assert fq.get_static_quant_module_class(nn.Linear, {nn.Linear: int}) is int
    assert (
        fq.get_static_quant_module_class(nn.Linear, is_reference=True)
        is torch.ao.nn.quantized.reference.Linear
    )
    assert fq.get_dynamic_quant_module_class(nn.LSTM) is torch.ao.nn.quantized.dynamic.LSTM
    assert fq.get_dynamic_quant_module_class(nn.ReLU, {nn.ReLU: int}) is int
    assert fq.get_quantized_operator(F.elu) is torch.ops.quantized.elu
    for look_up in (
        fq.get_static_quant_module_class,
        fq.get_dynamic_quant_module_class,
        fq.get_quantized_operator,
    ):
        with pytest.raises(AssertionError, match="has no quantized counterpart"):
            look_up(nn.Bilinear)


def test_special_activations_are_special_in_training_only() -> None:
    sigmoid = nn.Sigmoid()
    assert _get_special_act_post_process(sigmoid) is fq.default_fixed_qparams_range_0to1_fake_quant
    assert _get_special_act_post_process(nn.ReLU()) is None
    assert _has_special_act_post_process(sigmoid)
    assert not _has_special_act_post_process(sigmoid.eval())


# ----------------------------------------------------------------------------------------- utils


CONFIGS = [
    "default_qconfig",
    "default_dynamic_qconfig",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "default_qat_qconfig",
    "default_symmetric_qnnpack_qconfig",
    "default_embedding_qat_qconfig",
    "default_debug_qconfig",
]
QUESTIONS = [
    "activation_dtype",
    "weight_dtype",
    "activation_is_statically_quantized",
    "activation_is_dynamically_quantized",
    "activation_is_int8_quantized",
    "activation_is_int32_quantized",
    "weight_is_quantized",
    "weight_is_statically_quantized",
    "op_is_int8_dynamically_quantized",
    "get_qconfig_dtypes",
    "get_quant_type",
]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_questions_about_configs_are_answered_as_by_torch(question: str, name: str) -> None:
    with quiet():
        expected = getattr(tq.utils, question)(getattr(tq, name))
        assert getattr(utils, question)(getattr(tq, name)) == expected
    assert getattr(utils, question)(getattr(fq, name)) == expected


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_about_no_config_are_refused(question: str) -> None:
    with pytest.raises(AssertionError, match="qconfig must be provided"):
        getattr(utils, question)(None)


def test_a_config_without_meaning_has_no_quant_type() -> None:
    nothing = fq.QConfig(fq.PlaceholderObserver, fq.PlaceholderObserver)
    with pytest.raises(ValueError, match="unrecognized dtype combination"):
        utils.get_quant_type(nothing)
    assert fq.QuantType.QAT == tq.QuantType.QAT
    for quant_type in tq.QuantType:
        name = tq.quant_type._get_quant_type_to_str(quant_type)
        assert fq.quant_type._get_quant_type_to_str(fq.QuantType(quant_type)) == name
        assert fq.quant_type._quant_type_from_str(name) == quant_type
    with pytest.raises(ValueError, match="unknown QuantType name 'none'"):
        fq.quant_type._quant_type_from_str("none")


DTYPES = [
    torch.quint8,
    torch.qint8,
    torch.qint32,
    torch.quint4x2,
    torch.quint2x4,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.int32,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
]


@given(
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.integers(-300, 300),
    st.integers(-300, 300),
)
def test_quantized_ranges_are_torchs(
    dtype: torch.dtype, customized: bool, reduce_range: bool, low: int, high: int
) -> None:
    def call(ns: Any) -> Any:
        try:
            return ns.calculate_qmin_qmax(low, high, customized, dtype, reduce_range)
        except AssertionError:
            return "refused"

    assert call(utils) == call(tq.utils)


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_customized_ranges_are_validated_as_by_torch(low: int, high: int) -> None:
    def refused(ns: Any) -> bool:
        try:
            ns.validate_qmin_qmax(low, high)
        except AssertionError:
            return True
        return False

    assert refused(utils) == refused(tq.utils)


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1e3)), min_size=1, max_size=4),
    st.sampled_from(
        [
            torch.per_tensor_affine,
            torch.per_tensor_symmetric,
            torch.per_channel_affine,
            torch.per_channel_symmetric,
            torch.per_channel_affine_float_qparams,
        ]
    ),
    st.sampled_from([(torch.quint8, 0, 255), (torch.qint8, -128, 127), (torch.quint8, 0, 100)]),
    st.booleans(),
)
def test_parameters_of_ranges_are_torchs(
    ranges: list[tuple[float, float]], qscheme: Any, dtype: Any, scalar: bool
) -> None:
    low = torch.tensor([a for a, _ in ranges])
    high = low + torch.tensor([width for _, width in ranges])
    if scalar:
        low, high = low[0], high[0]
    quantized, quant_min, quant_max = dtype
    args = (quant_min, quant_max, quantized, torch.tensor([1e-7]), quant_max == 100, qscheme)
    assert_same(
        utils.determine_qparams(low, high, *args), tq.utils.determine_qparams(low, high, *args)
    )


def test_ranges_that_are_none_have_default_parameters() -> None:
    rest = (0, 255, torch.quint8, torch.tensor([1e-7]), False)
    for low, high in (
        (torch.tensor([]), torch.tensor([])),
        (torch.tensor(float("inf")), torch.tensor(float("-inf"))),
    ):
        with pytest.warns(UserWarning, match="must run observer"):
            assert_same(
                utils.determine_qparams(low, high, *rest), (torch.tensor([1.0]), torch.tensor([0]))
            )
    with pytest.raises(AssertionError, match="should be less than max"):
        utils.check_min_max_valid(torch.tensor([1.0]), torch.tensor([0.0]))
    assert utils.check_min_max_valid(torch.tensor([0.0]), torch.tensor([0.0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda ns: ns.default_weight_observer(),
        lambda ns: ns.default_per_channel_weight_observer(),
        lambda ns: ns.default_float_qparams_observer(),
        lambda ns: ns.default_weight_fake_quant(),
        lambda ns: ns.PlaceholderObserver(dtype=torch.float16),
        lambda ns: ns.NoopObserver(),
    ],
)
def test_parameters_for_reference_modules_are_torchs(make: Any) -> None:
    parts = []
    for ns in (tq, fq):
        observer = make(ns)
        observer(torch.arange(-6.0, 6.0).reshape(3, 4))
        parts.append(tq.utils.get_qparam_dict(observer) if ns is tq else None)
        parts.append(utils.get_qparam_dict(observer))
    expected, of_torchs, _, of_ours = parts
    for part in (of_torchs, of_ours):
        assert part.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(part[key], value, f"{key}: ")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_underlying_dtypes_are_torchs(dtype: torch.dtype) -> None:
    if dtype is torch.float32:
        with pytest.raises(AssertionError, match=r"Unsupported dtype: torch\.float32; accepted"):
            utils.to_underlying_dtype(dtype)
    else:
        assert utils.to_underlying_dtype(dtype) == tq.utils.to_underlying_dtype(dtype)


def test_small_helpers_do_what_torchs_do() -> None:
    a, b = {"a": 1, "b": 1}, {"b": 2, "c": 3}
    assert utils.get_combined_dict(a, b) == {"a": 1, "b": 2, "c": 3}
    assert a == {"a": 1, "b": 1}
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    assert utils.getattr_from_fqn(model, "0.0.weight") is model[0][0].weight
    assert utils._get_path_of_module(model, model[0][0]) == "0.0"
    assert utils._get_path_of_module(model, nn.ReLU()) is None
    assert utils._parent_name("a.b.c") == ("a.b", "c")
    assert utils._parent_name("a") == ("", "a")
    for qscheme in (
        torch.per_tensor_affine,
        torch.per_channel_symmetric,
        torch.per_tensor_symmetric,
    ):
        assert utils.is_per_tensor(qscheme) == tq.utils.is_per_tensor(qscheme)
        assert utils.is_per_channel(qscheme) == tq.utils.is_per_channel(qscheme)
    mapping = {fq.QuantType.STATIC: {nn.Linear: nnq.Linear}}
    assert (
        utils.get_swapped_custom_module_class(model[0][0], mapping, fq.default_qconfig)
        is nnq.Linear
    )
    with pytest.raises(AssertionError, match="did not find the class"):
        utils.get_swapped_custom_module_class(model, mapping, fq.default_qconfig)
    assert utils._assert_and_get_unique_device(model) == torch.device("cpu")
    assert utils._assert_and_get_unique_device(nn.ReLU()) is None
