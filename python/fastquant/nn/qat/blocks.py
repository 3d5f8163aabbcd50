"""A call of a QAT block: batch norm, activation and fake-quantizing as one.

Called as a module, a prepared block of torch.ao runs its convolution or linear layer, batch norm
and ReLU, where it has them, and then the hook that observes and fake-quantizes the output. Each of
these goes over all activations by itself. Here they are done as one, which goes over them twice.

It is done only where nothing could tell the difference: where the block, its batch norm and the
fake-quantizer of its output are as their classes were written, nobody's hooks are on them, and no
transform or mode has to see the single steps. Any other call goes on as nn.Module and torch.ao have
it. So does a direct call of `forward`, which runs no hooks and fake-quantizes no output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from ..._core.arguments import nonfinite_error
from ..._core.errors import naming_its_layer
from ..._native.routes import batch_norm_observe_fake_quantize
from ..._native.settings import FusedSettings
from ..._torch.ao import observer_forward_hook
from ..._torch.overrides import Written
from ..._torch.private import has_backward_hooks, is_altered, is_called_plainly, shorten_calls
from ...fake_quantize import FakeQuantizeBase
from .. import qat as nnqat
from ..intrinsic import qat as nniqat
from ..intrinsic.qat.with_batch_norm import WithBatchNorm
from .batch_norm import before_batch_norm
from .convolution import convolve
from .layers import Trained
from .plain import is_fused_for, settings_per_tensor

__all__ = ["teach_blocks"]


class _Kind(NamedTuple):
    """How the blocks of one class work."""

    batch_norm: type[nn.Module]
    dims: int  # of input and output
    low: float  # of the activation
    methods: Written


def _kind(cls: type, batch_norm: type[nn.Module], dims: int, low: float = -math.inf) -> _Kind:
    methods = () if issubclass(cls, nn.Linear) else ("forward", "_forward", "_conv_forward")
    return _Kind(batch_norm, dims, low, Written(cls, *methods))


# Methods are recorded here as torch has them, to notice where a user has replaced them.
_KINDS = {
    nniqat.ConvBn1d: _kind(nniqat.ConvBn1d, nn.BatchNorm1d, 3),
    nniqat.ConvBn2d: _kind(nniqat.ConvBn2d, nn.BatchNorm2d, 4),
    nniqat.ConvBn3d: _kind(nniqat.ConvBn3d, nn.BatchNorm3d, 5),
    nniqat.ConvBnReLU1d: _kind(nniqat.ConvBnReLU1d, nn.BatchNorm1d, 3, 0.0),
    nniqat.ConvBnReLU2d: _kind(nniqat.ConvBnReLU2d, nn.BatchNorm2d, 4, 0.0),
    nniqat.ConvBnReLU3d: _kind(nniqat.ConvBnReLU3d, nn.BatchNorm3d, 5, 0.0),
    nniqat.LinearBn1d: _kind(nniqat.LinearBn1d, nn.BatchNorm1d, 2),
}
# The methods that `teach_blocks` has replaced, by class.
_TAUGHT: dict[type, Written] = {}
_BATCH_NORMS = {
    cls: Written(cls, "forward", "_check_input_dim")
    for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
# Convolutions with ReLU, and how many dimensions their inputs have.
_DIMS: dict[type, int] = {nniqat.ConvReLU1d: 3, nniqat.ConvReLU2d: 4, nniqat.ConvReLU3d: 5}
# Layers of torch.ao without batch norm, and the forward methods as torch has them.
_CONVOLUTIONS: dict[Any, Any] = {
    cls: vars(cls).get("forward") for cls in (nnqat.Conv2d, *_DIMS) if not issubclass(cls, Trained)
}
# The functions that these methods call. Tools that count operations replace them.
_BATCH_NORM, _RELU = F.batch_norm, F.relu


def _is_as_made(block: Any, x: Any, dims: int, *methods: Written) -> bool:
    """Whether a call runs the block's methods and its observer's hook, and nothing of a user's."""
    if is_altered() or (type(x) is not Tensor and type(x) is not Parameter):
        return False
    own = block.__dict__
    hooks = own["_forward_hooks"]
    return not (
        # By identity, since Dynamo cannot compare functions otherwise.
        len(hooks) != 1
        or next(iter(hooks.values())) is not observer_forward_hook
        or own["_forward_hooks_with_kwargs"]
        or own["_forward_pre_hooks"]
        or has_backward_hooks(block)
        or any(written.is_replaced(block) for written in methods)
        or not (is_fused_for(x) and x.dim() == dims)
        or F.relu is not _RELU
        or FakeQuantizeBase not in type(own["_modules"].get("weight_fake_quant")).__mro__
    )


def _settings_if_plain(block: Any, kind: _Kind, x: Any) -> FusedSettings | None:
    """What fake-quantizing the output takes; None where `_call` could be told from torch's call."""
    if not _is_as_made(block, x, kind.dims, kind.methods, _TAUGHT[type(block)]):
        return None
    modules = block._modules
    bn: Any = modules.get("bn")
    if (
        block.__dict__.get("_enable_slow_path_for_better_numerical_stability")
        or type(bn) is not kind.batch_norm
        or not is_called_plainly(bn)
        or has_backward_hooks(bn)
        or _BATCH_NORMS[kind.batch_norm].is_replaced(bn)
        or F.batch_norm is not _BATCH_NORM
        or not bn.track_running_stats
    ):
        return None
    return settings_per_tensor(modules.get("activation_post_process"))


def _arguments_of_batch_norm(
    bn: Any, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, float, float] | None:
    """Weight, bias, running statistics, training, momentum and eps, for a batch of values.

    None where they, or the values, are not such as the op takes; torch may take or refuse them.
    """
    if type(x) is not Tensor or x.layout is not torch.strided:
        return None
    try:
        weight, bias = bn._parameters["weight"], bn._parameters["bias"]
        mean, var = bn._buffers["running_mean"], bn._buffers["running_var"]
        batches = bn._buffers["num_batches_tracked"]
    except KeyError:
        return None  # something else is in the place of a parameter or buffer
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    for tensor in (weight, bias, mean, var):
        cls = type(tensor)
        if (cls is not Parameter and cls is not Tensor) or tensor.dtype is not dtype:
            return None
    training, momentum, eps = bn.training, bn.momentum, bn.eps
    # Of one value a channel there is no variance, which torch says in an error.
    if x.numel() <= (x.shape[1] if training else 0):
        return None
    if momentum is None:
        # The mean over all batches so far.
        momentum = 1.0 / (float(batches) + 1.0) if training and batches is not None else 0.0
    if not isinstance(momentum, (float, int)) or not isinstance(eps, (float, int)) or eps <= 0:
        return None
    return weight, bias, mean, var, training, momentum, eps


def _refusal(fake_quantizer: Any, x: Tensor) -> Exception | None:
    """Why the observer does not take batch norm's result of x, where x says so."""
    refuses = fake_quantizer.activation_post_process.nonfinite == "raise"
    return nonfinite_error(x, "raise") if refuses else None


def _call(block: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call of the block returns; NotImplemented where torch is to make the call."""
    kind = _KINDS.get(type(block))
    if kind is None or len(args) != 1 or kwargs:
        return NotImplemented
    settings = _settings_if_plain(block, kind, args[0])
    if settings is None:
        return NotImplemented
    modules = block._modules
    bn, fake_quantizer = modules["bn"], modules["activation_post_process"]
    x = before_batch_norm(block, args[0])
    arguments = _arguments_of_batch_norm(bn, x)
    if arguments is not None:
        batches = bn._buffers["num_batches_tracked"] if bn.training else None
        if batches is not None:
            batches.add_(1)
        try:
            return batch_norm_observe_fake_quantize(x, *arguments, kind.low, math.inf, settings)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            # Nothing else has changed. The modules may take what the op refused, or else say what
            # is wrong with it; but of values that the observer refuses, batch norm would learn.
            if batches is not None:
                batches.sub_(1)
            refused = error if isinstance(error, ValueError) else _refusal(fake_quantizer, x)
            if refused is not None:
                raise naming_its_layer(fake_quantizer, refused) from None
    y = bn(x)
    return fake_quantizer(F.relu(y) if kind.low == 0.0 else y)


def _call_without_batch_norm(block: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for a convolution with ReLU."""
    taught = _TAUGHT.get(type(block))
    # A compiler fuses ReLU with other steps.
    if taught is None or len(args) != 1 or kwargs or torch.compiler.is_dynamo_compiling():
        return NotImplemented
    x, fake_quantizer = args[0], block._modules.get("activation_post_process")
    if not _is_as_made(block, x, _DIMS[type(block)], taught):
        return NotImplemented
    settings = settings_per_tensor(fake_quantizer)
    if settings is None:
        return NotImplemented
    y = convolve(block, x, block.weight_fake_quant(block.weight), block.bias)
    try:
        if type(y) is Tensor and y.numel() > 0:
            return _relu_observe_fake_quantize(y, settings)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # Nothing has changed. The modules may take what the op refused, or say what is wrong.
    return fake_quantizer(F.relu(y))


def _relu_observe_fake_quantize(x: Tensor, settings: FusedSettings) -> Tensor:
    """The op of batch norm, by statistics and parameters with which it gives x itself."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    ones = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    zeros = torch.zeros_like(ones)
    # Not in training, no momentum, and an eps with which sqrt(1 + eps) is 1.
    frozen = (False, 0.0, 1e-30)
    bounds = (0.0, math.inf)
    return batch_norm_observe_fake_quantize(x, ones, zeros, zeros, ones, *frozen, *bounds, settings)


def _folding_method(cls: type) -> str:
    """The method of a block that scales the weight, and undoes it."""
    return "forward" if issubclass(cls, nn.Linear) else "_forward_approximate"


def _owner(cls: type, method: str) -> type:
    """The class that defines a method of `cls`."""
    return next((base for base in cls.__mro__ if method in vars(base)), cls)


def _fold_on_the_weight(cls: type) -> None:
    """Have torch.ao's class undo the scaling on the weight, for fake-quantizers of ours."""
    name = _folding_method(cls)
    theirs: Callable[[Any, Tensor], Tensor] | None = vars(cls).get(name)
    if theirs is None:
        return  # a torch that does it some other way

    @functools.wraps(theirs)
    def method(self: Any, input: Tensor) -> Tensor:
        if FakeQuantizeBase not in type(self.weight_fake_quant).__mro__:
            return theirs(self, input)
        y: Tensor = self.bn(before_batch_norm(self, input))
        return y

    setattr(cls, name, method)


def _use_native_convolutions(cls: Any, theirs: Callable[[Any, Tensor], Tensor]) -> None:
    """Have torch.ao's class compute its convolution by `convolve`, for fake-quantizers of ours."""
    clamps = cls in _DIMS

    @functools.wraps(theirs)
    def forward(self: Any, input: Tensor) -> Tensor:
        if FakeQuantizeBase not in type(self.weight_fake_quant).__mro__:
            return theirs(self, input)
        y = convolve(self, input, self.weight_fake_quant(self.weight), self.bias)
        return F.relu(y) if clamps else y

    cls.forward = forward


@functools.cache
def teach_blocks() -> None:
    """Have blocks with batch norm call one op for several, and convolutions native kernels.

    This holds from now on in this process.

    torch.ao's stay its classes: its functions and users' code recognise them by their type. In a
    process that unpickles a prepared model and never calls `prepare_qat`, the classes' own methods
    run.
    """
    owners = {_owner(cls, _folding_method(cls)) for cls in _KINDS}
    for cls in owners:
        if not issubclass(cls, WithBatchNorm):
            _fold_on_the_weight(cls)
        shorten_calls(cls, _call)
    for cls, forward in _CONVOLUTIONS.items():
        if forward is not None and vars(cls).get("forward") is forward:
            _use_native_convolutions(cls, forward)
            if cls in _DIMS:
                shorten_calls(cls, _call_without_batch_norm)
                _TAUGHT[cls] = Written(cls, "forward")
    for cls in _KINDS:
        _TAUGHT[cls] = Written(cls, _folding_method(cls))
