"""Every op against the reference, against torch's own, and on every instruction set."""

from __future__ import annotations

import itertools
import math
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import batch_norm_calls
import elementwise_calls
import embedding_calls
from fastquant import _C
from fastquant._native import ops, routes
from fastquant._native import reference as reference_ops
from fastquant._native.settings import FusedSettings
from op_calls import (
    AFFINE,
    IGNORE,
    INEXACT,
    INF,
    SYMMETRIC,
    assert_as_reference,
    assert_same,
    bn_weights,
    called,
    counter,
    eps,
    flag,
    fused_arguments,
    fused_by_route,
    unobserved,
)
from processes import python
from strategies import (
    FLOATS,
    LAYOUTS,
    random_values,
)

float32 = st.just(torch.float32)


def test_cpu_kernels_are_native() -> None:
    for name in reference_ops.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastquant::{name}", "CPU"), name


# ------------------------------------------------------------------ every op, in every setting


def samples(
    dtype: torch.dtype = torch.float32, numel: int = 120, layout: str = "contiguous"
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments for each op, in a few variants."""
    values = random_values((4, numel // 20, 5), dtype, 0, "outliers")
    nonfinite_values = values.clone()
    nonfinite_values.view(-1)[::7] = math.nan
    x, nonfinite = (LAYOUTS[layout](v, 1) for v in (values, nonfinite_values))
    for axis in (None, 0, 1, -1):
        channels = 1 if axis is None else x.shape[axis]
        scale = torch.linspace(0.01, 0.02, channels)
        zero_point = torch.arange(channels, dtype=torch.int32) % 7
        state = [*unobserved(channels), scale.clone(), zero_point.clone(), counter(), eps()]
        for values in (x, nonfinite):
            yield "observe_minmax_", (values, *unobserved(channels), counter(), axis, 0.1, IGNORE)
            settings = (axis, None, -128, 127, AFFINE, 0, IGNORE)
            yield "observe_qparams_", (values, flag(True), *state, *settings)
            fused = (values, flag(True), flag(True), *state, *settings)
            yield "fused_observe_fake_quantize", fused
            yield "fused_observe_fake_quantize_with_mask", fused
            if axis is None:
                of_tensor = FusedSettings(*fused[1:]).per_tensor()
                for bounds in ((-INF, INF), (0.0, INF), (-0.5, 0.5)):
                    yield "add_observe_fake_quantize", (values, x.cos(), *bounds, *of_tensor)
            for z in (zero_point, zero_point + 0.25):
                args = (values, scale, z, None, axis, -128, 127)
                yield "fake_quantize", args
                yield "fake_quantize_with_mask", args
        if axis == 1:
            for values, training in itertools.product((x, nonfinite), (True, False)):
                case = batch_norm_calls.case_of(values, training=training)
                yield "observe_batch_norm_", case.observing()
                made = ops.observe_batch_norm_(*case.observing())
                yield "batch_norm_fake_quantize", case.values(*made)
                yield "batch_norm_fake_quantize_backward", case.backward(*made)
        if axis in (None, 0):
            bn = (bn_weights(x.shape[0], dtype, 1), random_values((4,), dtype, 2, "positive"))
            for values in (x, nonfinite):
                on_and_off = (flag(True), flag(values is x))
                args = (values, *bn, *on_and_off, *state, axis, None, -128, 127, AFFINE, 0, IGNORE)
                yield "observe_folded_weight_", args
                _, fold = ops.observe_folded_weight_(
                    *(a.clone() if isinstance(a, Tensor) else a for a in args)
                )
                yield "fold_weight", (values, fold, -128, 127)
                yield "fold_weight_backward", (torch.cos(x), values, fold, -128, 127)
        args = (scale, zero_point + 0.4, axis, -128, 127, 0.5)
        yield "learnable_fake_quantize", (x, *args)
        yield "learnable_fake_quantize_backward", (torch.cos(x), x, *args)
        if axis is not None:
            state = (torch.zeros(channels, 60), *unobserved(channels), counter())
            yield "least_error_range", (nonfinite, axis, -8, 7, SYMMETRIC, 0)
            yield "observe_channel_histograms_", (nonfinite, *state, axis, 16, IGNORE)
        if axis is not None and dtype == torch.float32:
            for values in (x, nonfinite):
                yield "quantize_per_channel", (values, scale, axis, -127, 127)
    _, mask = ops.fake_quantize_with_mask(
        x, torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32), None, None, -128, 127
    )
    yield "fake_quantize_backward", (torch.empty_like(x).copy_(x.cos()), mask)
    histogram, (low, high) = torch.zeros(300), unobserved()
    yield "observe_histogram_", (nonfinite, histogram, low, high, counter(), 16, IGNORE)
    reference_ops.observe_histogram_(x, histogram, low, high, counter(), 16, IGNORE)
    yield "observe_histogram_", (nonfinite * 3, histogram, low, high, counter(), 16, IGNORE)
    yield "search_histogram_range", (histogram, low, high, 256)
    for method, scheme in itertools.product(range(5), (AFFINE, SYMMETRIC)):
        yield "histogram_range", (histogram, low, high, method, 99.9, 16, 0, 15, scheme, 8)
    qparams = (torch.tensor([0.3]), torch.tensor([5]))
    yield "histogram_error", (histogram, low, high, *qparams, 0, 15)
    if dtype in (torch.float32, torch.bfloat16):
        yield from convolutions(dtype, numel > 1000)
    if dtype == torch.float32:
        yield from elementwise_calls.samples(numel // 20)
        yield from embedding_calls.samples(numel // 100 + 5)
        yield from errors(x, nonfinite)
    yield "choose_qparams", (torch.randn(9) - 3, torch.randn(9) + 3, eps(), 0, 255, AFFINE, 0)


def convolutions(dtype: torch.dtype, large: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Pointwise, depthwise and 3x3 ones; `large`: so that threads share them."""
    size = 40 if large else 6
    shapes = [(24, 20, 1, 1), (20, 1, 3, 1), (20, 1, 5, 2)]
    shapes += [(24, 20, 3, 1)] if dtype == torch.float32 else []
    for outputs, inputs, kernel, stride in shapes:
        torch.manual_seed(kernel)
        weight = torch.randn(outputs, inputs, kernel, kernel, dtype=dtype)
        x = torch.randn(3, 20, size, size + 1, dtype=dtype)
        bias = torch.randn(outputs, dtype=dtype)
        yield "convolution", (x, weight, bias, stride)
        yield "convolution", (x.contiguous(memory_format=torch.channels_last), weight, None, stride)
        grad = torch.randn_like(ops.convolution(x, weight, None, stride))
        yield "convolution_backward", (grad, x, weight, stride, True, True)
        yield "convolution_backward", (grad, x, weight, stride, False, True)
        yield "convolution_backward", (grad, x, weight, stride, True, False)


def errors(x: Tensor, nonfinite: Tensor) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Of tensors as they are, rounded to a grid, and of integers in x's layout and others."""
    sums, none = torch.zeros(5, dtype=torch.float64), torch.zeros(0, dtype=torch.uint8)
    for values in (x, nonfinite):
        other = values + 0.1 * x.cos()
        yield "observe_error_", (values, other, None, 0, 0, 0, sums.clone(), none)
        for grid, used in (((0.05, 3, -20, 90), 111), ((0.03, 0, 0, 255), 0)):
            counts = torch.zeros(used, dtype=torch.uint8)
            yield "observe_error_", (values, other, *grid, sums.clone(), counts)
        for dtype, zero_point in ((torch.uint8, 100), (torch.int8, -7)):
            q = ops.quantize(x, 0.04, zero_point, dtype, False)
            for laid_out in (q, torch.empty_like(q.mT.contiguous().mT).copy_(q)):
                args = (laid_out, 0.04, zero_point, 0, 0, sums.clone(), none)
                yield "observe_error_", (values, *args)
    images, bytes_ = x.unsqueeze(2), q.unsqueeze(2)
    last = bytes_.contiguous(memory_format=torch.channels_last)
    yield "observe_error_", (images, last, 0.04, -7, 0, 0, sums.clone(), none)


def outcome(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    results, arguments, raised = called(getattr(ops, name), args)
    assert not raised
    results = () if results is None else results
    return [*((results,) if isinstance(results, Tensor) else results), *arguments[1:]]


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bytes(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        if name == "learnable_fake_quantize_backward":  # sums in another order
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
        else:
            assert ours.stride() == theirs.stride()
            assert torch.equal(bytes_of(ours), bytes_of(theirs)), name


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_gives_the_same_bytes(
    dtype: torch.dtype, layout: str, any_isa: list[str]
) -> None:
    assert "scalar" in any_isa
    for name, args in samples(dtype, 1540, layout):
        _C.set_isa("scalar")
        expected = outcome(name, args)
        for isa in any_isa:
            _C.set_isa(isa)
            assert _C.isa() == isa
            assert_same_bytes(name, outcome(name, args), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(dtype: torch.dtype) -> None:
    for name, args in samples(dtype, 280_040):
        torch.set_num_threads(1)
        expected = outcome(name, args)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for got, wanted in zip(outcome(name, args), expected, strict=True):
                assert torch.equal(bytes_of(got), bytes_of(wanted)), name


# Ops on histograms and the like, whose size does not grow with x.
SEARCHES = ("search_histogram_range", "histogram_range", "least_error_range", "histogram_error")

# Ops whose sums the reference adds up in another order.
SUMS = ("observe_histogram_", "observe_batch_norm_", "observe_error_")


def test_large_tensors_as_reference() -> None:
    for name, args in samples(torch.float32, 280_040):
        if name == "observe_channel_histograms_" and len(args[1]) > 1000:
            # The reference takes its time for each channel: a part of them.
            values, *state, count, axis, levels, policy = args
            state = [part[:700] for part in state]
            assert_as_reference(name, values[:, :700], *state, count, axis, levels, policy)
        elif name not in (*INEXACT, *SEARCHES, *SUMS):
            assert_as_reference(name, *args)


class NeverWaits(TorchDispatchMode):
    """Refuses what would wait for a device: a look at a value, a size that depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), name
        return func(*args, **(kwargs or {}))


def test_the_fallback_never_waits_for_the_device() -> None:
    for name, args in samples():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastquant::{name}", "CompositeExplicitAutograd"
        )
        if name not in (*SEARCHES, "quantized_embedding_bag"):
            with NeverWaits():
                _, _, raised = called(reference_ops.OPS[name], args)
            assert not raised


def imported_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = "import fastquant; print(fastquant.build_info()['isa'])"
    return python(code, FASTQUANT_ISA=isa)


def test_the_environment_names_an_instruction_set() -> None:
    assert imported_with("scalar").stdout.strip() == "scalar"
    assert imported_with("").stdout.strip() == _C.isas()[0]
    refused = imported_with("bogus")
    assert refused.returncode != 0
    said = refused.stderr.splitlines()[-1]
    accepted = ", ".join(_C.isas())
    assert said == (
        f"ImportError: FASTQUANT_ISA must be one of {accepted} on this processor, and is 'bogus'"
    )


def test_instruction_sets_that_do_not_run_here_are_refused(every_isa: list[str]) -> None:
    for isa in sorted(set(_C.built_isas()) - set(every_isa)):
        with pytest.raises(ValueError, match=isa):
            _C.set_isa(isa)
        assert f"and is '{isa}'" in imported_with(isa).stderr
    assert _C.isa() in every_isa


def test_set_isa_knows_its_names(every_isa: list[str]) -> None:
    with pytest.raises(ValueError, match="isas"):
        _C.set_isa("z80")
    assert _C.isa() in every_isa
    assert set(every_isa) <= set(_C.built_isas())
    for isa in every_isa:
        _C.set_isa(isa)
        assert _C.isa() == isa


def has_nan(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and bool(a.isnan().any()) for a in args)


OF_SAMPLES = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", sorted(reference_ops.OPS))
def test_opcheck(name: str) -> None:
    # NaN is not equal to itself there.
    chosen = [args for sample, args in samples() if sample == name and not has_nan(args)]
    chosen += [args for sample, args in samples(layout="permuted") if sample == name][:1]
    op = getattr(ops, name)
    # opcheck takes a NaN of a result for a difference.
    chosen = [args for args in chosen if not has_nan(args)]
    chosen = chosen[:: max(1, len(chosen) // 4)]
    for i, args in enumerate(chosen):
        own = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        # Ten times as long as the others take together, and the same but for shapes and strides.
        compiled = ("test_aot_dispatch_dynamic",) if i in (0, len(chosen) - 1) else ()
        torch.library.opcheck(op, own, test_utils=(*OF_SAMPLES, *compiled))


@pytest.mark.parametrize(
    "name",
    [
        "fake_quantize_with_mask",
        "batch_norm_fake_quantize",
        "convolution",
        "learnable_fake_quantize",
    ],
)
def test_opcheck_with_gradients(name: str) -> None:
    args = next(args for sample, args in samples() if sample == name)
    leaves = tuple(
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )
    if name == "fake_quantize_with_mask":
        leaves = (leaves[0], *args[1:])
    if name == "batch_norm_fake_quantize":  # x, weight and bias
        leaves = (*leaves[:3], *args[3:])
    torch.library.opcheck(getattr(ops, name), leaves)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "values"),
    {
        "an integer tensor": ("x", torch.arange(12).reshape(3, 4)),
        "no such axis": ("axis", 2),
        "no such axis from the end": ("axis", -3),
        "another number of channels": ("x", torch.randn(4, 3)),
        "min_val of another size": ("low", torch.full((2,), INF)),
        "max_val of another size": ("high", torch.full((4,), -INF)),
    }.values(),
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: str, values: Any) -> None:
    given_ = {"x": torch.randn(3, 4), "axis": 0}
    given_["low"], given_["high"] = unobserved(3)
    given_[change] = values
    x, axis, low, high = (given_[k] for k in ("x", "axis", "low", "high"))
    scale, zero_point = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    buffers = [low, high, scale, zero_point, count := counter()]
    before = [b.clone() for b in buffers]
    settings = (eps(), axis, 0.1, -8, 7, AFFINE, 0, IGNORE)
    for call in (
        lambda: ops.observe_minmax_(x, low, high, count, axis, 0.1, IGNORE),
        lambda: ops.observe_qparams_(x, flag(True), *buffers, *settings),
        lambda: ops.fused_observe_fake_quantize(x, flag(True), flag(True), *buffers, *settings),
        lambda: fused_by_route(x, flag(True), flag(True), *buffers, *settings),
    ):
        with pytest.raises(RuntimeError):
            call()
        assert_same(buffers, before)


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_with_mask"])
def test_qparams_that_do_not_fit_are_refused(name: str) -> None:
    op, x = getattr(ops, name), torch.randn(3, 4)
    scale, zero_point = torch.ones(3), torch.zeros(3, dtype=torch.int32)
    for bad in (
        (x, scale, zero_point, None, 1, -8, 7),
        (x, scale, zero_point, None, None, -8, 7),
        (x, scale, zero_point, None, 2, -8, 7),
        (x, scale[:2], zero_point, None, 0, -8, 7),
        (x, scale, zero_point[:2], None, 0, -8, 7),
        (x.long(), scale, zero_point, None, 0, -8, 7),
    ):
        with pytest.raises(RuntimeError):
            op(*bad)


# ------------------------------------------------------------------------ autocast, compiling


def test_autocast_leaves_the_dtype_alone() -> None:
    layer = torch.nn.Linear(8, 8)
    args = fused_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_by_route(layer(torch.randn(4, 8)), *args)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert args[2] < args[3]


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_fused_compiles_to_one_graph(needs_grad: bool, quantize: bool) -> None:
    def step(x: Tensor, args: list[Any]) -> Tensor:
        return fused_by_route(x * 2, *args) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_args, compiled_args = (fused_arguments(3, quantize=quantize) for _ in range(2))
    for seed in range(2):
        x = random_values((3, 20), torch.float32, seed).requires_grad_(needs_grad)
        expected, y = step(x, eager_args), compiled(x, compiled_args)
        assert_same(y.detach(), expected.detach())
        assert_same(compiled_args, eager_args)
        assert y.requires_grad == needs_grad
        if needs_grad:
            assert_same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_other_ops_compile_to_one_graph() -> None:
    def step(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ops.observe_minmax_(x, low, high, counter(), None, None, IGNORE)
        new_scale, new_zero_point = ops.choose_qparams(low, high, eps(), 0, 255, AFFINE, 0)
        y = routes.fake_quantize(x, new_scale, new_zero_point, flag(True), None, 0, 255)
        return y + routes.learnable_fake_quantize(x, scale, zero_point, None, 0, 15, 1.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (step, compiled):
        leaves = [random_values((30,), torch.float32, 0), torch.tensor([0.1]), torch.tensor([3.2])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        low, high = unobserved()
        y = run(*leaves, low, high)
        outcomes.append([y.detach(), low, high, *torch.autograd.grad(y.sum(), leaves)])
    assert_same(outcomes[1], outcomes[0])


def test_no_op_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, args in samples():
            outcome(name, args)
        x = torch.randn(9, requires_grad=True)
        low, high = unobserved()
        ops.observe_minmax_(x, low, high, counter(), None, None, IGNORE)
        assert not low.requires_grad
        fused_by_route(x, *fused_arguments()).sum().backward()
