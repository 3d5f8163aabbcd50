"""Scale and zero point of a range: torch.ao's, and the same from everything that chooses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import utils as torch_utils

import fastquant as fq
from fastquant import functional as F
from fastquant import utils
from fastquant._native import ops, reference
from oracle import assert_same, quiet
from strategies import FLOATS

QSCHEMES = (
    torch.per_tensor_affine,
    torch.per_tensor_symmetric,
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
GRIDS = (
    (torch.quint8, 0, 255, False),
    (torch.qint8, -128, 127, False),
    (torch.qint8, -127, 127, True),
    (torch.quint8, 3 - 10, 100, True),
    (torch.uint16, 0, 65535, False),
    (torch.int16, -32768, 32767, False),
    (torch.quint4x2, 0, 15, False),
)


@st.composite
def ranges(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pairs = draw(
        st.lists(
            st.tuples(st.floats(-100, 100, width=16), st.floats(0, 100, width=16)),
            min_size=1,
            max_size=4,
        )
    )
    low = torch.tensor([start for start, _ in pairs], dtype=dtype)
    high = low + torch.tensor([width for _, width in pairs], dtype=dtype)
    return (low[0], high[0]) if draw(st.booleans()) else (low, high)


@given(
    st.data(),
    st.sampled_from(FLOATS),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from(QSCHEMES),
    st.sampled_from(GRIDS),
)
def test_determine_qparams_is_torchs(
    data: st.DataObject, dtype: torch.dtype, eps_dtype: torch.dtype, qscheme: Any, grid: Any
) -> None:
    low, high = data.draw(ranges(dtype))
    quantized, quant_min, quant_max, customized = grid
    eps = torch.tensor([1.3e-7], dtype=eps_dtype)
    args = (low, high, quant_min, quant_max, quantized, eps, customized, qscheme)
    assert_same(utils.determine_qparams(*args)[0], torch_utils.determine_qparams(*args)[0])
    assert_same(utils.determine_qparams(*args)[1], torch_utils.determine_qparams(*args)[1])


@given(st.data(), st.sampled_from(QSCHEMES), st.sampled_from(GRIDS))
def test_all_that_choose_qparams_agree(data: st.DataObject, qscheme: Any, grid: Any) -> None:
    low, high = data.draw(ranges(torch.float32))
    quantized, quant_min, quant_max, customized = grid
    if customized and quantized == torch.quint8:
        # Unsigned symmetric zero points beyond the range are an error of the caller's.
        quant_min = 0
    ends = {"quant_min": quant_min, "quant_max": quant_max} if customized else {}
    channels = utils.is_per_channel(qscheme)
    cls: Any = fq.PerChannelMinMaxObserver if channels else fq.MinMaxObserver
    observer = cls(dtype=quantized, qscheme=qscheme, **ends)
    low, high = (low.reshape(-1), high.reshape(-1)) if channels else (low.min(), high.max())
    observer.min_val, observer.max_val = low, high
    expected = observer.calculate_qparams()

    scheme = observer._scheme()
    eps = observer.eps
    found = {
        "functional": F.choose_qparams(low, high, dtype=quantized, qscheme=qscheme, **ends),
        "op": ops.choose_qparams(low, high, eps, *scheme),
        "reference": reference.choose_qparams(low, high, eps, *scheme),
    }
    for name, qparams in found.items():
        for got, wanted in zip(qparams, expected, strict=True):
            assert_same(got, wanted, name)
    if quantized == torch.uint16 and "symmetric" in str(qscheme):
        return  # where torch.ao's determine_qparams knows no middle
    determined = utils.determine_qparams(
        low, high, quant_min, quant_max, quantized, eps, customized, qscheme
    )
    for got, wanted in zip(determined, expected, strict=True):
        assert_same(got, wanted.to(got.dtype), "determine_qparams")


@pytest.mark.parametrize("cls", [fq.MinMaxObserver, fq.HistogramObserver])
def test_unobserved_ranges_have_scale_one_and_zero_point_zero(cls: Any) -> None:
    with quiet():
        scale, zero_point = cls().calculate_qparams()
    assert_same(scale, torch.ones(1))
    assert_same(zero_point, torch.zeros(1, dtype=torch.int64))
    nothing = (torch.tensor(float("inf")), torch.tensor(float("-inf")))
    for qparams in (
        F.choose_qparams(*nothing),
        reference.choose_qparams(*nothing, torch.ones(1), 0, 255, 0, 0),
    ):
        assert [value.tolist() for value in qparams] == [[1.0], [0]]
