"""Every private name of torch that fastquant uses; those of torch.ao are in `ao`.

A release of torch may rename or drop any of them. Each is therefore looked up once, when fastquant
is imported, and has a fallback: a slower public function, an answer that makes callers take their
slower path, or an error that names the supported releases. tests/test_private_names.py takes
each of `NAMES` away and runs a model through prepare, training and convert.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._version import __version__

OLDEST, NEWEST = "2.10", "2.15"

# What is looked up here, as paths below `torch`.
NAMES: list[str] = []


def _unsupported(reason: object) -> str:
    return (
        f"fastquant {__version__} supports torch {OLDEST} to {NEWEST} and found "
        f"{torch.__version__}: {reason}"
    )


@contextmanager
def required() -> Iterator[None]:
    """Make a failing import raise an error that names the supported releases of torch."""
    try:
        yield
    except ImportError as error:
        raise ImportError(_unsupported(error)) from error


def _find(path: str, otherwise: Any) -> Any:
    """What is at `path` below torch, or `otherwise`."""
    NAMES.append(path)
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        return otherwise


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor version, which sort as numbers do."""
    return tuple(map(int, version.split(".")[:2]))


def _assume_so() -> bool:
    """A fallback for a check: with this answer, callers take the path that is always correct."""
    return True


torch_release = _numbers(torch.__version__)
if torch_release < _numbers(OLDEST):
    raise ImportError(_unsupported("run `pip install --upgrade torch`"))

# --- what surrounds a call ------------------------------------------------------------------

dispatch_modes = _find("_C._len_torch_dispatch_stack", _assume_so)
function_modes = _find("_C._len_torch_function_stack", _assume_so)
innermost_transform = _find("_C._functorch.peek_interpreter_stack", _assume_so)
is_profiling = _find("_C._autograd._profiler_enabled", _assume_so)
# The public function is written in Python, and slower because it also checks for scripting.
is_tracing = _find("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]

_missing = SimpleNamespace(_current_level=0, _is_exporting_flag=None)
_levels: Any = _missing if _find("autograd.forward_ad._current_level", None) is None else forward_ad
_flags: Any = _missing if _find("compiler._is_exporting_flag", None) is None else torch.compiler


def takes_forward_derivatives() -> bool:
    """Whether forward-mode derivatives are being taken; torch keeps their level in Python."""
    return _levels._current_level >= 0  # type: ignore[no-any-return]


def is_exporting() -> bool:
    """Whether torch.export traces.

    torch.compiler.is_exporting serves only where the flag is missing: it returns True in every
    graph of torch 2.11, exported or compiled.
    """
    flag = _flags._is_exporting_flag
    return torch.compiler.is_exporting() if flag is None else flag


def is_intercepted() -> Any:
    """Whether (as a true value) anything has to see the ops that are called.

    Modes (fake tensors, export, a default device), transforms of torch.func, forward-mode
    derivatives, torch.jit.trace, the profiler.
    """
    return (
        dispatch_modes()
        or function_modes()
        or innermost_transform() is not None
        or _levels._current_level >= 0
        or is_tracing()
        or is_profiling()
    )


def is_altered() -> Any:
    """`is_intercepted`, but for the profiler and Dynamo, which watch ops and let them be.

    `is_intercepted` repeats these conditions because to call this function would slow every op.
    """
    return not _is_traced_by_dynamo() and (
        dispatch_modes()
        or function_modes()
        or innermost_transform() is not None
        or _levels._current_level >= 0
        or is_tracing()
    )


# --- tensors and dispatch -------------------------------------------------------------------

# How `_C` reaches the memory of tensors without the dispatcher. Without it there are no fast calls.
exchange_api = _find("Tensor.__dlpack_c_exchange_api__", None)

# A context in which functions take tensors of a subclass as ordinary ones.
ignoring_overrides = _find("_C.DisableTorchFunctionSubclass", None)
if ignoring_overrides is None:
    raise ImportError(_unsupported("it has no torch._C.DisableTorchFunctionSubclass"))

# Whether a tensor has memory (sparse ones and those that vmap has batched have none), how many
# owners it and its memory have, and whether the memory is shared until somebody writes to it.
has_storage: Any = _find("_C._has_storage", None)
tensor_use_count: Any = _find("Tensor._use_count", None)
is_copied_on_write: Any = _find("_C._is_cow_tensor", None)
_storage_use_count: Any = _find("_C._storage_Use_Count", None)
counts_owners = None not in (
    has_storage,
    tensor_use_count,
    is_copied_on_write,
    _storage_use_count,
    _find("UntypedStorage._cdata", None),
)


def storage_use_count(storage: torch.UntypedStorage) -> int:
    """How many owners a storage has; only where `counts_owners`."""
    return _storage_use_count(storage._cdata)  # type: ignore[no-any-return]


below_autograd = _find("_C._AutoDispatchBelowAutograd", torch.no_grad)


def _without_derivatives() -> Callable[[], AbstractContextManager[Any]]:
    exclude = _find("_C._ExcludeDispatchKeyGuard", None)
    key_set = _find("_C.DispatchKeySet", None)
    key = _find("_C.DispatchKey", None)
    if exclude is None or key_set is None or key is None:
        return torch.no_grad
    return functools.partial(
        exclude, key_set(key.AutogradFunctionality) | key_set(key.ADInplaceOrView)
    )


# A context in which ops skip autograd. Under no_grad they still pass through it, which costs time.
without_derivatives = _without_derivatives()


def _quantized_again(integers: Tensor, scales: Tensor, zero_points: Tensor, axis: int) -> Tensor:
    shape = [-1 if i == axis else 1 for i in range(integers.dim())]
    values = (integers - zero_points.reshape(shape)) * scales.reshape(shape)
    return torch.quantize_per_channel(values.float(), scales, zero_points, axis, torch.qint8)


def _not_learned(x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any) -> Tensor:
    """Fake-quantize without gradients of scale and zero point."""
    *axis, quant_min, quant_max, _ = args
    quantize: Any = torch.fake_quantize_per_tensor_affine
    if axis:
        quantize = torch.fake_quantize_per_channel_affine
    rounded = zero_point.detach().round().clamp(quant_min, quant_max).to(torch.int32)
    y: Tensor = quantize(x, scale.detach(), rounded, *axis, quant_min, quant_max)
    return y


learnable_per_tensor = _find("_fake_quantize_learnable_per_tensor_affine", _not_learned)
learnable_per_channel = _find("_fake_quantize_learnable_per_channel_affine", _not_learned)

per_channel_quantized = _find("_make_per_channel_quantized_tensor", _quantized_again)

# --- modules --------------------------------------------------------------------------------

# The fallback is not empty: where torch stores its global hooks elsewhere, there may be some.
global_forward_hooks = _find("nn.modules.module._global_forward_hooks", {"unknown": None})
global_forward_pre_hooks = _find("nn.modules.module._global_forward_pre_hooks", {"unknown": None})
_call_impl = _find("nn.Module._call_impl", None)
_module_call = nn.Module.__call__
_is_traced_by_dynamo = torch.compiler.is_dynamo_compiling
# torch.fx.symbolic_trace replaces nn.Module.__call__ while it traces. Its state is a flag, and from
# torch 2.15 on, a function; the public is_fx_tracing() logs a warning.
_fx: Any = SimpleNamespace(_is_fx_tracing_flag=False)
if _find("fx._symbolic_trace._is_fx_tracing_flag", None) is not None:
    _fx = torch.fx._symbolic_trace
_is_fx_tracing = _find("fx._symbolic_trace._get_is_fx_tracing", lambda: _fx._is_fx_tracing_flag)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling the module with a detached tensor runs its class's forward, and no more.

    False where it has forward hooks, its own or global ones, where it was compiled, or where
    somebody replaced the method that calls forward. Backward hooks do not count: they do nothing
    where nothing needs a gradient.
    """
    own, cls = module.__dict__, type(module)
    return (
        # These wrap it to record the module path of each call.
        (cls.__call__ is _module_call or _is_fx_tracing() or is_exporting())
        and cls._call_impl is _call_impl
        and "forward" not in own
        and "_call_impl" not in own
        and "_compiled_call_impl" not in own
        and not (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or global_forward_hooks
            or global_forward_pre_hooks
        )
    )


_global_backward_hooks = _find("nn.modules.module._global_backward_hooks", {"unknown": None})
_global_backward_pre_hooks = _find(
    "nn.modules.module._global_backward_pre_hooks", {"unknown": None}
)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether the module has backward hooks, its own or global ones."""
    own = module.__dict__
    return bool(
        own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def sees_autograd_nodes(module: nn.Module) -> bool:
    """Whether the module has backward hooks that are given the gradients of an autograd node.

    `register_backward_hook` adds these; `register_full_backward_hook` does not. Global hooks may
    be of either kind.
    """
    own = module.__dict__
    are_full = own.get("_is_full_backward_hook") is True
    return bool(_global_backward_hooks or (own["_backward_hooks"] and not are_full))


def shorten_calls(cls: type[nn.Module], shortcut: Callable[..., Any]) -> None:
    """Have a call of a module of this class return what `shortcut(module, *args, **kwargs)` does.

    Where that returns NotImplemented, and where somebody replaced nn.Module.__call__, as
    torch.fx.symbolic_trace does, the call is as before.
    """
    if _call_impl is None or "_call_impl" in vars(cls):
        return

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(self).__call__ is _module_call:
            result = shortcut(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return super(cls, self)._call_impl(*args, **kwargs)  # type: ignore[misc]

    call.__name__ = "_call_impl"
    cls._call_impl = call  # type: ignore[method-assign]


BatchNorm = _find(
    "nn.modules.batchnorm._BatchNorm",
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)
# Linear layers inside of attention, which is not quantized as other modules are.
AttentionLinear: type[nn.Linear] = _find(
    "nn.modules.linear.NonDynamicallyQuantizableLinear", nn.Linear
)
Dropout = _find(
    "nn.modules.dropout._DropoutNd",
    (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if not isinstance(tree, (list, tuple)):
        return [tree]
    return [leaf for part in tree for leaf in _leaves(part)]


tree_leaves = _find("utils._pytree.tree_leaves", _leaves)

# --- the compiler ---------------------------------------------------------------------------

# `compiling` waits for the import of this module, which has no public name.
DYNAMO = "torch._dynamo"


def ask_subclasses_in_graphs(functions: Iterable[Callable[..., Any]]) -> None:
    """Have Dynamo call `__torch_function__` for these functions, as they do outside of graphs.

    Its own list of such functions lacks some. torch._dynamo has to be imported by now.
    """
    with contextlib.suppress(AttributeError):
        torch._dynamo.variables.torch.get_overridable_functions().update(functions)


_compile_id = _find("_guards.CompileContext.current_compile_id", lambda: None)


def is_compiler_at_work() -> bool:
    """Whether torch.compile or torch.export is making a graph; for code that is not traced itself.

    torch.compiler.is_compiling does not say so of torch.compile before torch 2.13.
    """
    return torch.compiler.is_compiling() or _compile_id() is not None


def override_in_graphs(classes: tuple[Any, ...]) -> None:
    """Have Dynamo find out that functions of torch written in Python are overridden by `classes`.

    Before torch 2.12, it cannot trace how they themselves find out.
    """
    if torch_release >= (2, 12):
        return
    handle = torch.overrides.handle_torch_function

    @torch.compiler.substitute_in_graph(handle, skip_signature_check=True)
    def substitute(public_api: Any, relevant_args: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in relevant_args:
            if isinstance(argument, classes):
                return argument.__torch_function__(public_api, (type(argument),), args, kwargs)
        torch._dynamo.graph_break()
        return handle(public_api, relevant_args, *args, **kwargs)


def find_in_tuples_in_graphs(classes: tuple[Any, ...]) -> None:
    """Have Dynamo find out that tensors of `classes` in a tuple override functions, too.

    It looks into lists only, and would call functions such as torch.cat as of ordinary tensors.
    """
    with contextlib.suppress(AttributeError):
        dispatch: Any = torch._dynamo.variables.torch_function
        tuples = torch._dynamo.variables.lists.TupleVariable
        flatten, overriding = dispatch._flatten_vts, dispatch.TensorWithTFOverrideVariable

        def is_ours(variable: Any) -> bool:
            return isinstance(variable, overriding) and variable.python_type() in classes

        def flatten_tuples(variables: Iterable[Any]) -> list[Any]:
            found: list[Any] = []
            for variable in flatten(variables):
                is_tuple = variable.is_realized() and isinstance(variable, tuples)
                items = variable.items if is_tuple else ()
                found += items if any(map(is_ours, items)) else [variable]
            return found

        dispatch._flatten_vts = flatten_tuples


def require_dtypes_kept_by_aot_inductor() -> None:
    """Raise an error where AOTInductor compiles calls of ops that have a dtype as an argument.

    That of torch 2.10 numbers dtypes as torch.export's files do, the ops it calls as C++ does:
    torch.float32 becomes torch.float64.
    """
    if torch_release < (2, 11):
        inductor = sys.modules.get("torch._inductor.virtualized")
        if inductor is not None and getattr(inductor.V.graph, "aot_mode", False):
            raise NotImplementedError(
                f"AOTInductor of torch {torch.__version__} gives wrong dtypes to operators, so "
                "that a quantized model would compute wrong numbers: compile it with torch 2.11 or "
                "newer, or use torch.compile"
            )


NAMES.append(DYNAMO.removeprefix("torch."))
if importlib.util.find_spec(DYNAMO) is None:
    raise ImportError(_unsupported(f"it has no {DYNAMO}"))


def register_decomposed_ops() -> None:
    """Have Inductor register the ops of `torch.ops.quantized_decomposed`, as it does for itself.

    This one is looked up when an export needs it, because importing Inductor takes seconds.

    Raises:
        ImportError: this torch has no such module; `decomposed` then registers ops of its own.
    """
    importlib.import_module("torch._inductor.decomposition")


# --- names that files of torch.save hold ----------------------------------------------------

# Module and name of what makes a tensor from its parts. They stand in files that exist, so a newer
# torch cannot change them; nothing is looked up.
PICKLED_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
PICKLED_QUANTIZED_TENSOR = ("torch._utils", "_rebuild_qtensor")
PICKLED_PARAMETER = ("torch._utils", "_rebuild_parameter")
