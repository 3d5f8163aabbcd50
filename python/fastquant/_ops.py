"""The door to the native side: loads it, binds its ops, gives them gradients and a fallback.

Every op of `csrc/library.cpp` is here under its own name, bound once. Modules call the ops
directly, and the two `apply_…` functions where gradients are involved.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _reference

MINIMUM_TORCH = (2, 10)


def _load_library() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        raise ImportError(
            f"fastquant needs torch {'.'.join(map(str, MINIMUM_TORCH))} or newer, found "
            f"{torch.__version__}: pip install --upgrade torch"
        )
    try:
        importlib.import_module("fastquant._C")
    except ImportError as error:
        raise ImportError(
            f"fastquant's native library does not load ({error}). It is built when fastquant is "
            "installed: run `pip install .` in the source directory, or `pip install -e . "
            "--no-build-isolation` to work on it."
        ) from error


_load_library()


def _load_cuda_library() -> str | None:
    """Load the kernels for CUDA tensors, where they were built and torch has CUDA.

    Returns why they do not load, if so: the environment variable FASTQUANT_CUDA_KERNELS=0 says
    not to, or they cannot.
    """
    setting = os.environ.get("FASTQUANT_CUDA_KERNELS") or "1"
    if setting not in ("0", "1"):
        raise ImportError(f"FASTQUANT_CUDA_KERNELS must be 0 or 1, and is {setting!r}")
    if setting == "0":
        return "FASTQUANT_CUDA_KERNELS=0 switches them off"
    library = importlib.util.find_spec("fastquant._cuda")
    if torch.version.cuda is None or library is None or library.origin is None:
        return None
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        reason = str(error.__cause__ or error)
        warnings.warn(
            f"fastquant's CUDA kernels do not load; CUDA tensors take slower ones: {reason}",
            stacklevel=2,
        )
        return reason
    return None


why_no_cuda_kernels = _load_cuda_library()

from . import _C  # noqa: E402  (its absence is explained above)

_Op = Callable[..., Any]


def _bind(name: str) -> _Op:
    op: _Op = getattr(torch.ops.fastquant, name).default
    return op


observe_minmax_ = _bind("observe_minmax_")
observe_histogram_ = _bind("observe_histogram_")
observe_qparams_ = _bind("observe_qparams_")
search_histogram_range = _bind("search_histogram_range")
choose_qparams = _bind("choose_qparams")
fake_quantize = _bind("fake_quantize")
fake_quantize_with_mask = _bind("fake_quantize_with_mask")
fake_quantize_backward = _bind("fake_quantize_backward")
fused_observe_fake_quantize = _bind("fused_observe_fake_quantize")
fused_observe_fake_quantize_with_mask = _bind("fused_observe_fake_quantize_with_mask")
learnable_fake_quantize = _bind("learnable_fake_quantize")
learnable_fake_quantize_backward = _bind("learnable_fake_quantize_backward")

# ------------------------------------------------------------------- fallback for any device

# An op that has no autograd of its own leaves gradients on while its kernel runs, so the
# fallback turns them off itself.
_fallback: Any = torch.library.Library("fastquant", "IMPL")  # type: ignore[no-untyped-call]
for _name, _op in _reference.OPS.items():
    _fallback.impl(_name, torch.no_grad()(_op), "CompositeExplicitAutograd")

# -------------------------------------------------------------------------------- fake kernels


def _on_one_device(kernel: _Op) -> _Op:
    """A fake kernel also runs where only some tensors are on the meta device: refuse that."""

    @functools.wraps(kernel)
    def fake(*args: Any) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"tensors lie on different devices: {', '.join(map(str, devices))}")
        return kernel(*args)

    return fake


def _changes_in_place(*_: Any) -> None:
    return None


def _empty_mask(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 63) // 64 * 8, dtype=torch.uint8)


def _empty_like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _empty_with_mask(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_mask(x)


def _empty_range(
    histogram: Tensor, min_val: Tensor, max_val: Tensor, dst_nbins: int
) -> tuple[Tensor, Tensor]:
    return min_val.new_empty(()), max_val.new_empty(())


def _zero_point_dtype(min_val: Tensor, scheme: int) -> torch.dtype:
    """What `choose_qparams` gives zero points, by the code of the scheme."""
    return (torch.int32, torch.int64, min_val.dtype)[scheme]


def _empty_qparams(
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    scheme: int,
    symmetric_zero_point: int,
) -> tuple[Tensor, Tensor]:
    n = min_val.numel()
    dtype = _zero_point_dtype(min_val, scheme)
    return min_val.new_empty(n), min_val.new_empty(n, dtype=dtype)


def _empty_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(zero_point)


_FAKE_KERNELS: dict[str, _Op] = {
    "observe_minmax_": _changes_in_place,
    "observe_histogram_": _changes_in_place,
    "observe_qparams_": _changes_in_place,
    "search_histogram_range": _empty_range,
    "choose_qparams": _empty_qparams,
    "fake_quantize": _empty_like_first,
    "fake_quantize_with_mask": _empty_with_mask,
    "fake_quantize_backward": _empty_like_first,
    "fused_observe_fake_quantize": _empty_like_first,
    "fused_observe_fake_quantize_with_mask": _empty_with_mask,
    "learnable_fake_quantize": _empty_like_first,
    "learnable_fake_quantize_backward": _empty_gradients,
}
for _name, _op in _FAKE_KERNELS.items():
    torch.library.register_fake(f"fastquant::{_name}", _on_one_device(_op))

# ------------------------------------------------------------------------------------- autograd

# Each gradient is here twice. Registered with the op, compilers can trace it; but that way
# through the dispatcher costs an eager call several times what a Function of one's own does.


class _MaskGradient(torch.autograd.Function):
    """The straight-through gradient as a function of the gradient, for gradients of gradients."""

    @staticmethod
    def forward(grad: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
        return _masked(grad, mask, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.stride = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _straight_through(ctx, grad), None, None


_mask_gradient: _Op = _MaskGradient.apply


def _masked(grad: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
    if _goes_fast():
        gradient = _C.mask_gradient(grad, mask, stride)
        if gradient is not None:
            return gradient
    # The mask has its bits in the order of the output's memory.
    if grad.stride() != stride:
        grad = grad.new_empty_strided(grad.size(), stride).copy_(grad)
    result: Tensor = fake_quantize_backward(grad, mask)
    return result


def _straight_through(ctx: Any, grad: Tensor) -> Tensor:
    """The straight-through estimate, https://arxiv.org/abs/1308.3432."""
    (mask,) = ctx.saved_tensors
    gradient = _mask_gradient if grad.requires_grad and torch.is_grad_enabled() else _masked
    result: Tensor = gradient(grad, mask, ctx.stride)
    return result


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask = output
    ctx.save_for_backward(mask)
    ctx.stride = y.stride()


def _fake_quantize_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _straight_through(ctx, grad), *(None,) * 6


def _save_learnable(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.settings = inputs
    ctx.save_for_backward(x, scale, zero_point)


@torch.autograd.function.once_differentiable
def _learnable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    gradients = learnable_fake_quantize_backward(grad, x, scale, zero_point, *ctx.settings)
    return *gradients, *(None,) * 4


torch.library.register_autograd(
    "fastquant::fake_quantize_with_mask", _fake_quantize_gradients, setup_context=_save_mask
)
torch.library.register_autograd(
    "fastquant::learnable_fake_quantize", _learnable_gradients, setup_context=_save_learnable
)

_below_autograd = torch._C._AutoDispatchBelowAutograd


class _StraightThrough(torch.autograd.Function):
    """Gives a result that was made of x, with a mask, the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
        _save_mask(ctx, (x, made), made)
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _straight_through(ctx, grad), None


class _Learnable(torch.autograd.Function):
    """The op `learnable_fake_quantize` with the gradients of x, scale and zero point."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with _below_autograd():
            y: Tensor = learnable_fake_quantize(*inputs)
        _save_learnable(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = _learnable_gradients(ctx, *grads)
        return gradients


class _TransformableFakeQuantize(torch.autograd.Function):
    """The op `fake_quantize_with_mask` as torch.func transforms it; dearer."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = fake_quantize_with_mask(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save_mask(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _fake_quantize_gradients(ctx, *grads)


class _TransformableLearnable(torch.autograd.Function):
    """The op `learnable_fake_quantize` likewise."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        y: Tensor = learnable_fake_quantize(*inputs)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_learnable(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = _learnable_gradients(ctx, *grads)
        return gradients


_transformable_fake_quantize: _Op = _TransformableFakeQuantize.apply
_transformable_learnable: _Op = _TransformableLearnable.apply
_with_straight_through: _Op = _StraightThrough.apply
_learnable_with_gradients: _Op = _Learnable.apply

# ---------------------------------------------------------------- what modules' forwards call

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def _is_transformed() -> bool:
    """Whether torch.func transforms, or forward-mode derivatives are taken (and refused)."""
    return _innermost_transform() is not None or forward_ad._current_level >= 0


def has_plain_gradients() -> bool:
    """Whether gradients are taken, and by autograd alone: nothing transforms, traces, compiles."""
    return (
        _is_grad_enabled() and not _is_compiling() and not _is_transformed() and not _is_tracing()
    )


def _set_up_fast_calls() -> bool:
    """Let `_C` reach tensors without the dispatcher, where torch has what that takes."""
    try:
        _C.set_up_fast_calls(
            torch.Tensor.__dlpack_c_exchange_api__,
            (Tensor, torch.nn.Parameter),
            # What intercepts ops has to see them: modes (fake tensors, export, a default device),
            # the transforms of torch.func, torch.jit.trace, the profiler.
            (
                _modes,
                torch._C._len_torch_function_stack,
                _innermost_transform,
                _is_tracing,
                torch._C._autograd._profiler_enabled,
            ),
            Tensor.is_neg,
            torch.empty_like,
            functools.partial(torch.empty, dtype=torch.uint8, device=torch.device("cpu")),
        )
    except (AttributeError, RuntimeError):
        return False
    return True


# Whether plain CPU tensors go round the dispatcher (benchmarks/calls.py: what that saves).
fast_calls = _set_up_fast_calls()


def _goes_fast() -> bool:
    """Whether the functions of `_C` may be tried; they say None, with nothing done, where not.

    What they cannot ask for themselves is asked here: they must not be seen while compiling, and
    torch keeps the level of forward-mode derivatives in Python.
    """
    return fast_calls and not _is_compiling() and forward_ad._current_level < 0


def observe_minmax(*args: Any) -> None:
    """The op `observe_minmax_`."""
    if not (_goes_fast() and _C.observe_minmax(*args)):
        observe_minmax_(*args)


def observe_histogram(*args: Any) -> None:
    """The op `observe_histogram_`."""
    if not (_goes_fast() and _C.observe_histogram(*args)):
        observe_histogram_(*args)


def histogram_qparams(
    histogram: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    eps: Tensor,
    dst_nbins: int,
    *config: int,
) -> tuple[Tensor, Tensor]:
    """The op `choose_qparams` of what the op `search_histogram_range` finds; their arguments."""
    if min_val.is_cpu and _goes_fast():
        scale = min_val.new_empty(1)
        zero_point = min_val.new_empty(1, dtype=_zero_point_dtype(min_val, config[2]))
        observed = (histogram, min_val, max_val, eps, dst_nbins)
        if _C.histogram_qparams(*observed, *config, scale, zero_point):
            return scale, zero_point
    found = search_histogram_range(histogram, min_val, max_val, dst_nbins)
    qparams: tuple[Tensor, Tensor] = choose_qparams(*found, eps, *config)
    return qparams


def _attached(x: Tensor, made: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The result that was made of x; where it came with a mask, with the gradient of x."""
    if isinstance(made, Tensor):
        return made
    y: Tensor = _with_straight_through(x, made)
    return y


def _made_by(op: _Op, *args: Any) -> tuple[Tensor, Tensor]:
    """Result and mask, without the gradient that is registered with the op."""
    with _below_autograd():
        made: tuple[Tensor, Tensor] = op(*args)
    return made


def _can_read_flags(x: Tensor) -> bool:
    """Whether a flag beside `x` may be read here, and not by the op where it lies.

    To read one of another device would be to wait for it, one that a mode makes out to be a fake
    tensor has no value, and in a graph it may change from call to call.
    """
    return x.is_cpu and not _is_compiling() and not _is_tracing() and not _modes()


def apply_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    enabled: Tensor | None = None,
) -> Tensor:
    """Fake-quantize `x`; the straight-through gradient where one is needed.

    Args as the op `fake_quantize`. Where `enabled` says no on the CPU, `x` itself comes back.
    """
    needs_grad = x.requires_grad and _is_grad_enabled()
    settings: tuple[Any, ...] = (scale, zero_point, enabled, ch_axis, quant_min, quant_max)
    y: Tensor
    if _goes_fast():
        made = _C.fake_quantize(x, *settings, needs_grad)
        if made is not None:
            return _attached(x, made)
    if enabled is not None and _can_read_flags(x):
        if not enabled.item():
            return x
        settings = (scale, zero_point, None, ch_axis, quant_min, quant_max)
    if _is_compiling():
        y = fake_quantize_with_mask(x, *settings)[0] if needs_grad else fake_quantize(x, *settings)
    elif _is_transformed() or (needs_grad and _is_tracing()):
        y, _ = _transformable_fake_quantize(x, *settings)
    elif needs_grad:
        y = _attached(x, _made_by(fake_quantize_with_mask, x, *settings))
    else:
        y = fake_quantize(x, *settings)
    return y


def apply_fused(
    x: Tensor, observer_enabled: Tensor, fake_quant_enabled: Tensor, *settings: Any
) -> Tensor:
    """Observe and fake-quantize `x`; the straight-through gradient where one is needed.

    Args as the op `fused_observe_fake_quantize`, all of them and in its order. Where
    `fake_quant_enabled` says no on the CPU, `x` itself comes back.
    """
    needs_grad = x.requires_grad and _is_grad_enabled()
    args = (x, observer_enabled, fake_quant_enabled, *settings)
    if _goes_fast():
        made = _C.observe_fake_quantize(*args, needs_grad)
        if made is not None:
            return _attached(x, made)
    # In two steps while compiling or tracing, since an op that changes its arguments can have no
    # gradient, and under transforms.
    if (needs_grad and (_is_compiling() or _is_tracing())) or (
        not _is_compiling() and _is_transformed()
    ):
        observe_qparams_(x, observer_enabled, *settings)
        _, _, scale, zero_point, _, _, ch_axis, _, quant_min, quant_max, *_ = settings
        return apply_fake_quantize(
            x, scale, zero_point, ch_axis, quant_min, quant_max, fake_quant_enabled
        )
    if _can_read_flags(x) and not fake_quant_enabled.item():
        observe_qparams_(x, observer_enabled, *settings)
        return x
    if needs_grad:
        return _attached(x, _made_by(fused_observe_fake_quantize_with_mask, *args))
    y: Tensor = fused_observe_fake_quantize(*args)
    return y


def apply_learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
) -> Tensor:
    """Fake-quantize `x` with a scale and zero point that have gradients; args as the op's."""
    if _is_compiling():
        op = learnable_fake_quantize
    else:
        op = _transformable_learnable if _is_transformed() else _learnable_with_gradients
    y: Tensor = op(x, scale, zero_point, ch_axis, quant_min, quant_max, grad_factor)
    return y
