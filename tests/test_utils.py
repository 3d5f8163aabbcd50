"""Questions about configs, quantized ranges and their parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.quantization as tq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastquant as fq
from fastquant import utils
from oracle import assert_same, quiet

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
