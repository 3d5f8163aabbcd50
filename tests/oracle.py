"""For tests that run fastquant's observers and fake-quantizers beside torch.ao's."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fastquant.quantization_mappings import DEFAULT_BACKEND
from strategies import LAYOUTS, RANGES, random_values, seeds

PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
DTYPES = (
    torch.qint8,
    torch.quint8,
    torch.quint4x2,
    torch.qint32,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.uint16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
QUANT_RANGES = ((None, None), (0, 127), (-127, 127), (-8, 7), (0, 15), (-100, 27))

beside_torch_ao = pytest.mark.skipif(DEFAULT_BACKEND == "native", reason="there is no torch.ao")


def torch_ao_quantization(module: str) -> Any:
    """A module of torch.ao.quantization whose name there is a function's, as `quantize` is."""
    try:
        return importlib.import_module(f"torch.ao.quantization.{module}")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch.ao's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@st.composite
def observed(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    ch_axis: int | None = None,
    max_size: int = 4,
) -> list[Tensor]:
    """What an observer sees: tensors of different shape, layout and range, of as many channels."""
    channels = draw(st.integers(1, 7))
    tensors = []
    for _ in range(draw(st.integers(1, max_size))):
        min_size = 0 if ch_axis is None else 2
        shape = draw(st.lists(st.integers(1, 7), min_size=min_size, max_size=4))
        if ch_axis is not None:
            shape[ch_axis] = channels
        seed = draw(seeds)
        kind = draw(st.sampled_from(tuple(RANGES)))
        x = random_values(shape, draw(st.sampled_from(dtypes)), seed, kind)
        tensors.append(LAYOUTS[draw(st.sampled_from(tuple(LAYOUTS)))](x, seed))
    return tensors


@st.composite
def configs(draw: st.DrawFn, qschemes: tuple[torch.qscheme, ...]) -> dict[str, Any]:
    """Arguments that the range observers have in common; not every combination is legal."""
    quant_min, quant_max = draw(st.sampled_from(QUANT_RANGES))
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "qscheme": draw(st.sampled_from(qschemes)),
        "reduce_range": draw(st.booleans()),
        "quant_min": quant_min,
        "quant_max": quant_max,
        "eps": draw(st.sampled_from((torch.finfo(torch.float32).eps, 2**-12))),
    }


def make_both(ours: Callable[..., Any], theirs: Callable[..., Any], **config: Any) -> Any:
    """(ours, torch.ao's), or None where both refuse the configuration."""
    with quiet():
        try:
            expected = theirs(**config)
        except Exception:
            expected = None
    try:
        actual = ours(**config)
    except (ValueError, NotImplementedError):
        assert expected is None, f"torch.ao accepts {config}"
        return None
    assert expected is not None, f"torch.ao refuses {config}"
    return actual, expected


def feed(modules: Any, stream: list[Tensor]) -> None:
    """Have each of the modules observe each tensor, which they hand on as it is."""
    with quiet():
        for x in stream:
            for module in modules:
                assert module(x) is x


def rounded_past(theirs: Any) -> bool:
    """Whether torch.ao's moving averages of one value have rounded past each other.

    Its `calculate_qparams` raises then.
    """
    return "Moving" in type(theirs).__name__ and bool((theirs.min_val > theirs.max_val).any())


def _comparable(value: Any) -> Any:
    """Quantized tensors as values, scales and zero points, and sequences as tuples."""
    if isinstance(value, Tensor) and value.is_quantized:
        if value.qscheme() in PER_CHANNEL:
            qparams = (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        else:
            qparams = (torch.tensor(value.q_scale()), torch.tensor(value.q_zero_point()))
        return (value.dequantize(), *qparams)
    # Packed weights show nothing; outputs must tell.
    return str(value) if isinstance(value, torch.ScriptObject) else value


def assert_same(actual: Any, expected: Any, what: str = "", *, strides: bool = False) -> None:
    """Same dtypes, shapes and values, bit for bit up to the sign of zero; `strides` on request.

    Takes tensors, quantized ones too, and tuples, lists and dictionaries of them, as states and
    outputs are.
    """
    actual, expected = _comparable(actual), _comparable(expected)
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), what
        torch.testing.assert_close(
            actual,
            expected,
            rtol=0,
            atol=0,
            equal_nan=True,
            # Strides of a tensor without elements mean nothing.
            check_stride=strides and expected.numel() > 0,
            msg=lambda m: f"{what}: {m}",
        )
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), what
        for key in expected:
            assert_same(actual[key], expected[key], f"{what} {key}", strides=strides)
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), what
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, b, f"{what}[{i}]", strides=strides)
    else:
        assert actual == expected, what


def assert_same_qparams(actual: Any, expected: Any) -> None:
    """The same scales and zero points from two observers or fake-quantizers."""
    with quiet():
        assert_same(actual.calculate_qparams(), expected.calculate_qparams())


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """The same state_dict: names, their order, and tensors."""
    assert_same(actual.state_dict(), expected.state_dict())


def assert_usable_qparams(module: Any) -> None:
    """Finite positive scales, and zero points that are quantized values."""
    scale, zero_point = module.calculate_qparams()
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    assert bool(((zero_point >= module.quant_min) & (zero_point <= module.quant_max)).all())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer and parameter, also those that are not saved."""
    return {
        name: t.detach().clone()
        for tensors in (module.named_parameters(), module.named_buffers())
        for name, t in tensors
    }


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    assert_same(snapshot(module), before)


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


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient of a sum weighted with 1, 2, …"""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with quiet():
        y = module(x)
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape)
    y.backward(weights)
    assert x.grad is not None
    return y.detach(), x.grad


def assert_runs_same(actual: nn.Module, expected: nn.Module, x: Tensor) -> None:
    assert_same(run(actual, x), run(expected, x), "output and gradient")


def torch_rounds_once() -> bool:
    """Whether torch.quantize_per_tensor adds the zero point before it rounds, as fastquant does.

    torch's CUDA builds round before they add: at ties, results differ by one.
    """
    tie = torch.quantize_per_tensor(torch.tensor([0.5] * 64), 1.0, 1, torch.quint8)
    return int(tie.int_repr()[0]) == 2


def needs_torch_to_round_once() -> None:
    """Skip a test of bit-equality with torch.quantize_per_tensor where its ties are others."""
    if not torch_rounds_once():
        pytest.skip("this build of torch rounds before it adds the zero point")
