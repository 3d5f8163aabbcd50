"""Calls of the ops that do batch norm, activation and fake-quantize as one, and what has to hold.

Batch statistics are sums, which another order of adding rounds differently, and everything after
them depends on their last digits. So these are compared within a tolerance, and all that comes
after is compared bit by bit with the reference, given the same statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import oracle
from fastquant._native.reference import OPS
from fastquant._native.reference.batch_norm import quantized
from op_calls import AFFINE, IGNORE, INF, PROPAGATE, RAISE, SYMMETRIC, eps, flags, statistics
from strategies import LAYOUTS, quant_ranges, random_values, seeds, shapes, tensors

Op = Callable[..., Any]
Move = Callable[[tuple[Any, ...]], tuple[Any, ...]]

ACTIVATIONS = ((-INF, INF), (0.0, INF), (0.0, 6.0), (-1.0, 1.0))
CHANNELS = 1


@dataclass
class Case:
    """Arguments of `observe_batch_norm_`, and what else the other ops take."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    low: float
    high: float
    observer_enabled: Tensor
    fake_quant_enabled: Tensor
    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor
    nonfinite_count: Tensor
    averaging_constant: float | None
    quant_range: tuple[int, int]
    scheme: int
    nonfinite: int
    grad_lies_alike: bool = True

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def buffers(self) -> tuple[Tensor, ...]:
        return (self.min_val, self.max_val, self.scale, self.zero_point, self.nonfinite_count)

    def config(self) -> tuple[Any, ...]:
        return (self.averaging_constant, *self.quant_range, self.scheme, 0, self.nonfinite)

    def observing(self) -> tuple[Any, ...]:
        """Arguments, with buffers of their own."""
        return (
            self.x,
            self.weight,
            self.bias,
            self.running_mean.clone(),
            self.running_var.clone(),
            self.training,
            *(0.1, 1e-5, self.low, self.high),
            self.observer_enabled,
            self.fake_quant_enabled,
            *(b.clone() for b in self.buffers()),
            eps(),
            *self.config(),
        )

    def values(self, norm: Tensor, quantizer: Tensor) -> tuple[Any, ...]:
        """Arguments of `batch_norm_fake_quantize`."""
        activation_and_range = (self.training, self.low, self.high, *self.quant_range)
        return (self.x, self.weight, self.bias, norm, quantizer, *activation_and_range)

    def backward(self, norm: Tensor, quantizer: Tensor) -> tuple[Any, ...]:
        """Arguments of `batch_norm_fake_quantize_backward`."""
        grad = torch.cos(self.x.double() * 3).nan_to_num(0.5, 0.5, 0.5).to(self.x.dtype)
        if self.grad_lies_alike:
            grad = torch.empty_like(self.x).copy_(grad)
        x, _, _, *others = self.values(norm, quantizer)
        return grad, x, *others


def case_of(
    x: Tensor,
    seed: int = 0,
    *,
    training: bool = True,
    bounds: tuple[float, float] = (0.0, INF),
    observe: bool = True,
    quantize: bool = True,
    nonfinite: int = IGNORE,
) -> Case:
    """A case with random parameters; the weights of some channels are negative, and one is zero."""
    channels = x.shape[CHANNELS]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, generator=generator)
    weight[channels // 2 : channels // 2 + 1] = 0.0
    return Case(
        x,
        weight,
        torch.randn(channels, generator=generator),
        torch.randn(channels, generator=generator),
        torch.rand(channels, generator=generator) + 0.5,
        training,
        *bounds,
        torch.tensor([int(observe)], dtype=torch.uint8),
        torch.tensor([int(quantize)], dtype=torch.uint8),
        torch.tensor(-0.5),
        torch.tensor(1.5),
        torch.tensor([0.01]),
        torch.tensor([3], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int64),
        0.1,
        (0, 255),
        AFFINE,
        nonfinite,
    )


# Shape and layout: every way in which a GPU walks over channels (see op_calls.GEOMETRIES).
GEOMETRIES: list[tuple[tuple[int, ...], str]] = [
    ((600, 64), "contiguous"),
    ((600, 64), "offset"),
    ((9_000, 5), "contiguous"),
    ((20, 2_100), "contiguous"),
    ((70_001, 1), "contiguous"),
    ((2, 3, 7_001), "offset"),
    ((40, 3, 400), "contiguous"),
    ((33, 17, 49), "contiguous"),
    ((97, 65, 5), "contiguous"),
    ((60, 64, 5), "permuted"),
    ((2, 300, 40), "contiguous"),
    ((4, 24, 20, 20), "channels_last"),
    ((2, 130, 5, 5), "channels_last"),
    ((9, 1_200, 1, 1), "contiguous"),
    ((8, 30, 20, 3), "sliced"),
    ((3, 6, 4, 5, 7), "channels_last"),
    ((3, 6, 4, 5, 7), "contiguous"),
]


def cases_of_geometry(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int = 0
) -> Iterator[Case]:
    """In training and evaluation; without, and with NaN and infinities."""
    values = random_values(shape, dtype, seed, "outliers")
    nonfinite = values.clone()
    nonfinite.view(-1)[:: max(7, values.numel() // 5)] = INF
    nonfinite.view(-1)[-1:] = math.nan
    for v, training in itertools.product((values, nonfinite), (True, False)):
        case = case_of(LAYOUTS[layout](v, 1), seed, training=training)
        yield case
        yield replace(case, low=-INF, nonfinite=PROPAGATE, grad_lies_alike=False)
        yield replace(case, low=0.0, high=6.0, nonfinite=RAISE)


def far_from_zero(layout: str) -> Case:
    """The variance is 1e-12 of the squared mean: a difference of sums of squares would be noise."""
    x = 1000 + 1e-3 * random_values((40, 16, 10, 10), torch.float64, 0)
    return case_of(LAYOUTS[layout](x.float(), 0))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.sampled_from([200, 3000, 20_000]).flatmap(lambda n: shapes(2, 5, max_numel=n))
    x = draw(tensors(shapes=sizes, nonfinite=True).filter(lambda x: x.dim() >= 2))
    if draw(st.integers(0, 4)) == 0 and x.dtype in (torch.float32, torch.bfloat16):
        x = x * 1e34  # squares overflow, and values may
    seed = draw(seeds)
    case = case_of(x, seed, training=draw(st.booleans()), bounds=draw(st.sampled_from(ACTIVATIONS)))
    low, high, count = draw(statistics(None))
    parameter_dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, x.dtype]))
    return replace(
        case,
        weight=case.weight.to(parameter_dtype),
        bias=case.bias.to(parameter_dtype),
        running_mean=case.running_mean.to(draw(st.sampled_from([torch.float32, x.dtype]))),
        observer_enabled=draw(flags),
        fake_quant_enabled=draw(flags),
        min_val=low,
        max_val=high,
        scale=case.scale.to(low.dtype),
        nonfinite_count=count,
        averaging_constant=draw(st.sampled_from([None, 0.01, 1.0])),
        quant_range=draw(quant_ranges()),
        scheme=draw(st.sampled_from([AFFINE, SYMMETRIC])),
        nonfinite=draw(st.sampled_from([IGNORE, IGNORE, RAISE, PROPAGATE])),
        grad_lies_alike=draw(st.booleans()),
    )


# --------------------------------------------------------------------------------- checks


def _called(op: Op, args: tuple[Any, ...]) -> tuple[Tensor, ...] | RuntimeError:
    """The results, or the error with which x is refused."""
    try:
        results = op(*args)
    except RuntimeError as error:
        return error
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _on_cpu(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.cpu() for t in tensors]


# Of args = Case.observing()
_RUNNING, _BUFFERS = slice(3, 5), slice(12, 17)


def _check_statistics(case: Case, norm: Tensor, running: list[Tensor]) -> None:
    args = case.observing()
    expected, _ = OPS["observe_batch_norm_"](*args)
    digits = torch.finfo(norm.dtype).eps
    if not case.training or case.x.numel() == 0:
        oracle.assert_same(running, args[_RUNNING], "running statistics")
        # torch.sqrt itself is not always exact.
        torch.testing.assert_close(norm, expected, rtol=2 * digits, atol=0.0, equal_nan=True)
        return
    # Relative to the standard deviation, and the last digit of the mean itself.
    deviation = 1 / expected[1]
    error = (norm[0] - expected[0]).abs()
    close = error <= 16 * digits * deviation + 2 * digits * expected[0].abs()
    equal = (norm[0] == expected[0]) | (norm[0].isnan() & expected[0].isnan())
    assert (close | equal).all(), (norm, expected)
    relative = {"rtol": 64 * digits, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(norm[1:], expected[1:], **relative)
    for ours, theirs in zip(running, args[_RUNNING], strict=True):
        tolerance = max(64 * digits, 2 * torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def _check_range(case: Case, norm: Tensor, quantizer: Tensor, buffers: list[Tensor]) -> None:
    """The range is that of the tensor that will be quantized, to the last bit."""
    expected = [b.clone() for b in case.buffers()]
    unquantized = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    observed, _ = quantized(case.x, norm, unquantized, case.low, case.high, *case.quant_range)
    averaging_constant, *config = case.config()
    OPS["observe_qparams_"](
        observed, case.observer_enabled, *expected, eps(), None, averaging_constant, *config
    )
    oracle.assert_same(buffers, expected, "buffers")
    scale, zero_point = (t.double().reshape(()) for t in expected[2:4])
    enabled = (case.fake_quant_enabled != 0).double().reshape(())
    oracle.assert_same(quantizer, torch.stack([scale, zero_point, enabled]), "quantizer")


def _sizes_of_terms(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What the gradients of weight and bias would be if no two terms of these sums cancelled."""
    grad, x, norm, quantizer, _, *clamp = arguments
    _, passes = quantized(x, norm, quantizer, *clamp)
    shape = [-1 if d == CHANNELS else 1 for d in range(x.dim())]
    others = [d for d in range(x.dim()) if d != CHANNELS]
    mean, invstd, _, _ = (row.double() for row in norm)
    of_bias = torch.where(passes, grad.double().abs(), 0.0)
    of_weight = of_bias * (x.double() - mean.reshape(shape)).abs() * invstd.reshape(shape)
    return of_weight.sum(others).nan_to_num(INF), of_bias.sum(others).nan_to_num(INF)


def _check_gradients(
    case: Case, arguments: tuple[Any, ...], got: list[Tensor], expected: tuple[Tensor, ...]
) -> None:
    if case.training:
        # Offset and slope are sums; a last digit of theirs may move a gradient to the next number.
        digits = torch.finfo(case.x.dtype).eps
        finite = expected[0].nan_to_num(0.0, 0.0, 0.0).double().abs()
        most = float(finite.max()) if finite.numel() else 0.0
        torch.testing.assert_close(
            got[0],
            expected[0],
            rtol=4 * digits,
            atol=4 * torch.finfo(case.compute_dtype).eps * most,
            equal_nan=True,
            check_stride=True,
        )
    else:
        oracle.assert_same(got[0], expected[0], "gradient of x", strides=True)
    digits = torch.finfo(case.compute_dtype).eps
    for ours, theirs, size in zip(got[1:], expected[1:], _sizes_of_terms(arguments), strict=True):
        close = (ours - theirs).abs() <= 4 * digits * (theirs.abs() + size)
        equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
        assert (close | equal).all(), (ours, theirs)


def assert_as_reference(
    op: Callable[[str], Op], case: Case, move: Move = lambda args: args
) -> None:
    """What the three ops do, on the device that `move` takes their arguments to."""
    args = move(case.observing())
    made = _called(op("observe_batch_norm_"), args)
    by_reference = _called(OPS["observe_batch_norm_"], case.observing())
    refused = isinstance(by_reference, RuntimeError)
    assert isinstance(made, RuntimeError) == refused, (case, made, by_reference)
    running, buffers = _on_cpu(args[_RUNNING]), _on_cpu(args[_BUFFERS])
    if isinstance(made, RuntimeError):
        before = [case.running_mean, case.running_var, *case.buffers()]
        oracle.assert_same([*running, *buffers], before, "buffers of an op that refused")
        return
    norm, quantizer = _on_cpu(made)
    _check_statistics(case, norm, running)
    _check_range(case, norm, quantizer, buffers)
    arguments = case.values(norm, quantizer)
    y = op("batch_norm_fake_quantize")(*move(arguments)).cpu()
    oracle.assert_same(y, OPS["batch_norm_fake_quantize"](*arguments), "values", strides=True)
    arguments = case.backward(norm, quantizer)
    got = _on_cpu(op("batch_norm_fake_quantize_backward")(*move(arguments)))
    expected = OPS["batch_norm_fake_quantize_backward"](*arguments)
    _check_gradients(case, arguments, got, expected)
