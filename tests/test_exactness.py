"""Results never change with the number of threads, the instruction set, layout or blocking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastquant
from fastquant import _C
from oracle import assert_same
from strategies import FLOATS, LAYOUTS, dtypes, random_values, seeds, tensors

# Where work begins to be cut into pieces, and what the pieces are multiples of: words of 64
# elements, one or four tables of counts from 4,096 on, threads from 131,072 on (to look only, from
# 262,144 on), and a third piece at half as many more.
SIZES = (
    *(1, 63, 64, 65, 4095, 4096, 4097, 131_071, 131_072, 131_073, 196_607, 196_608, 196_671),
    *(262_143, 262_144, 262_145, 393_216, 393_279),
)
THREADS = (2, 3, 4)

# Inner sizes on both sides of where rows are walked as columns (512) and parameters repeat as a
# pattern (32).
PER_CHANNEL = (
    ((3, 5, 31), 1),
    ((3, 5, 32), 1),
    ((3, 5, 33), 1),
    ((130, 3), 1),
    ((130, 700), 1),
    ((2, 70, 511), 1),
    ((2, 70, 512), 1),
    ((2, 70, 513), 1),
    ((7, 60_000), 0),
    ((60_000, 7), 0),
    ((2, 64, 56, 56), 1),
    ((2, 64, 56, 56), -1),
)

Results = dict[str, Tensor]


def observe(results: Results, name: str, observer: fastquant.ObserverBase, x: Tensor) -> None:
    """Two tensors, the second one reaching further on one side."""
    observer(x)
    observer(x * 1.5 + 0.25)
    observer(x)
    for key, buffer in observer.named_buffers():
        results[f"{name}.{key}"] = buffer
    results[f"{name} scale"], results[f"{name} zero point"] = observer.calculate_qparams()


def fake_quantize(results: Results, name: str, module: fastquant.FakeQuantize, x: Tensor) -> None:
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    # A gradient that tells elements apart, laid out as y is.
    (results[f"{name} gradient"],) = torch.autograd.grad(y, leaf, torch.cos(y.detach()))
    results[f"{name} y"] = y.detach()
    results[f"{name} y without gradient"] = module(x)
    results[f"{name} scale"], results[f"{name} zero point"] = module.scale, module.zero_point


def per_tensor_results(x: Tensor) -> Results:
    results: Results = {}
    for observer in (fastquant.MinMaxObserver, fastquant.MovingAverageMinMaxObserver):
        observe(results, observer.__name__, observer(), x)
    observe(results, "symmetric", fastquant.MinMaxObserver(qscheme=torch.per_tensor_symmetric), x)
    observe(results, "HistogramObserver", fastquant.HistogramObserver(), x)
    observe(results, "100 bins", fastquant.HistogramObserver(bins=100), x)
    fake_quantize(results, "fused", fastquant.FusedMovingAvgObsFakeQuantize(), x)
    histogram = fastquant.FakeQuantize(fastquant.HistogramObserver, quant_min=0, quant_max=15)
    fake_quantize(results, "histogram", histogram, x)
    return results


def per_channel_results(x: Tensor, axis: int) -> Results:
    results: Results = {}
    for observer in (
        fastquant.PerChannelMinMaxObserver,
        fastquant.MovingAveragePerChannelMinMaxObserver,
    ):
        observe(results, observer.__name__, observer(ch_axis=axis), x)
    for qscheme in (torch.per_channel_symmetric, torch.per_channel_affine_float_qparams):
        module = fastquant.FakeQuantize(
            fastquant.MovingAveragePerChannelMinMaxObserver,
            quant_min=0,
            quant_max=255,
            qscheme=qscheme,
            ch_axis=axis,
        )
        fake_quantize(results, str(qscheme), module, x)
    return results


def under(threads: int, isa: str, work: Callable[[], Results]) -> Results:
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    return work()


def test_there_is_more_than_one_instruction_set(any_isa: list[str]) -> None:
    assert any_isa[-1] == "scalar"
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert len(any_isa) > 1


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype in FLOATS for size in SIZES[:: 1 if dtype == torch.float32 else 3]],
    ids=str,
)
def test_per_tensor(dtype: torch.dtype, size: int, any_isa: list[str], threads: None) -> None:
    x = random_values((size,), dtype, seed=size, kind="outliers")
    expected = under(1, "scalar", lambda: per_tensor_results(x))
    for isa in any_isa:
        assert_same(under(1, isa, lambda: per_tensor_results(x)), expected)
    for count in THREADS:
        assert_same(under(count, any_isa[0], lambda: per_tensor_results(x)), expected)


@pytest.mark.parametrize(("shape", "axis"), PER_CHANNEL, ids=str)
def test_per_channel(shape: tuple[int, ...], axis: int, any_isa: list[str], threads: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = random_values(shape, dtype, seed=1)
        expected = under(1, "scalar", lambda x=x: per_channel_results(x, axis))
        for isa in any_isa:
            assert_same(under(1, isa, lambda x=x: per_channel_results(x, axis)), expected)
        for count in THREADS:
            got = under(count, any_isa[0], lambda x=x: per_channel_results(x, axis))
            assert_same(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 9, 5, 7), (4, 48, 20, 20)], ids=str)
def test_layout(shape: tuple[int, ...], layout: str, threads: None) -> None:
    values = random_values(shape, torch.float32, seed=2)
    x = LAYOUTS[layout](values, 3)
    contiguous = x.contiguous()  # an expanded tensor holds other values than `values`
    for count in (1, 2):
        torch.set_num_threads(count)
        assert_same(per_tensor_results(x), per_tensor_results(contiguous))
        for axis in range(4):
            assert_same(per_channel_results(x, axis), per_channel_results(contiguous, axis))


@given(x=tensors(nonfinite=True), data=st.data())
@settings(max_examples=30)
def test_any_tensor(x: Tensor, data: st.DataObject, any_isa: list[str], threads: None) -> None:
    """Whatever its shape, dtype and layout, also where it holds NaN and infinities."""

    def work() -> Results:
        results: Results = {}
        for observer in (fastquant.MinMaxObserver(), fastquant.HistogramObserver()):
            observer(x)
            for key, buffer in observer.named_buffers():
                results[f"{type(observer).__name__}.{key}"] = buffer
        return results

    isa = data.draw(st.sampled_from(any_isa))
    count = data.draw(st.sampled_from((1, *THREADS)))
    assert_same(under(count, isa, work), under(1, "scalar", work))


@given(seed=seeds, dtype=dtypes)
@settings(max_examples=10)
def test_order_of_elements(seed: int, dtype: torch.dtype) -> None:
    """A statistic knows elements, not where they lie."""
    x = random_values((70_001,), dtype, seed)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    one, other = per_tensor_results(x), per_tensor_results(shuffled)
    for name in one:
        if not name.startswith(("fused", "histogram ")):
            assert torch.equal(one[name], other[name]), name
