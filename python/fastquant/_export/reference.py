"""Quantized modules as floating ones between quantize and dequantize, for export.

A model of these computes on ordinary floating tensors, what travels between its layers has been
rounded to the integers that the quantized layers give each other, and weights are int8 constants.
Compilers know quantized layers by this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core.errors import QuantizationError
from .._torch import decomposed
from .._torch.hooks import copy_forward_hooks, copy_forward_pre_hooks
from ..nn import quantized as nnq
from ..nn.intrinsic import quantized as nniq
from ..nn.quantized.rnn import in_class
from ..nn.quantized.weighted import Weighted


class Rounded(nn.Module):
    """Quantizes a floating tensor, and dequantizes it at once.

    Args:
        scale: of the integers.
        zero_point: of the integers.
        dtype: torch.uint8 or torch.int8.
    """

    def __init__(self, scale: float, zero_point: int, dtype: torch.dtype) -> None:
        super().__init__()
        limits = torch.iinfo(dtype)
        self.arguments = (scale, zero_point, limits.min, limits.max, dtype)

    def forward(self, x: Tensor) -> Tensor:
        ops = decomposed.ops()
        levels = ops.quantize_per_tensor.default(x, *self.arguments)
        return ops.dequantize_per_tensor.default(levels, *self.arguments)  # type: ignore[no-any-return]


class Boundary(nn.Module):
    """Where the quantized part of a model ends: what follows is not rounded any more."""

    def forward(self, x: Any) -> Any:
        return torch.ops.aten.alias.default(x) if isinstance(x, Tensor) else x


class _Weighted(nn.Module):
    """A linear layer or convolution with an int8 weight.

    Args:
        layer: the native one.
        rounded: what quantizes its output.
        int8_constant: whether the weight is kept as int8, or floating, to be quantized.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, rounded: Rounded, int8_constant: bool) -> None:
        super().__init__()
        values, axis = layer._integers(), layer._channel_axis()
        # A scale for each channel, also where they are all the same: compilers know no other form.
        scales = layer.weight_scale.detach().expand(values.shape[axis]).clone()
        self.axis = axis
        if not int8_constant:
            values = values * scales.reshape([-1 if d == axis else 1 for d in range(values.dim())])
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_zero_point", torch.zeros_like(scales, dtype=torch.int64))
        bias = layer.bias()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
        self.computation = _computation_of(layer)
        self.activation = _activation_of(layer)
        self.rounded = rounded

    def _real(self, x: Tensor) -> Tensor:
        ops, weight = decomposed.ops(), self.weight
        arguments = (self.weight_scale, self.weight_zero_point, self.axis, -128, 127, torch.int8)
        if weight.is_floating_point():
            weight = ops.quantize_per_channel.default(weight, *arguments)
        weight = ops.dequantize_per_channel.default(weight, *arguments)
        return self.computation(x, weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(self.activation(self._real(x)))  # type: ignore[no-any-return]


class _WeightedAdd(_Weighted):
    """A convolution to whose result another tensor is added."""

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        return self.rounded(self.activation(self._real(x) + extra))  # type: ignore[no-any-return]


def _computation_of(layer: Any) -> Callable[..., Tensor]:
    if isinstance(layer, nnq.Linear):
        return F.linear
    dims = layer._DIMS
    shared: dict[str, Any] = {
        "stride": layer.stride,
        "groups": layer.groups,
        "dilation": layer.dilation,
    }
    convolution: Callable[..., Tensor]
    if layer.transposed:
        convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        shared.update(padding=layer.padding, output_padding=layer.output_padding)
        return partial(convolution, **shared)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    shared["padding"] = tuple(layer._padded_by_kernel)
    if layer._padded_before is None:
        return partial(convolution, **shared)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    pad = partial(F.pad, pad=layer._padded_before, mode=mode)
    return lambda x, weight, bias: convolution(pad(x), weight, bias, **shared)


def _activation_of(layer: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nniq.LinearLeakyReLU):
        return partial(F.leaky_relu, negative_slope=layer.negative_slope)
    if isinstance(layer, nniq.LinearTanh):
        return torch.tanh
    if isinstance(layer, nniq.ConvAddReLU2d) or layer._LOW == 0.0:
        return F.relu
    return _same


def _same(x: Any) -> Any:
    return x


class _Computed(nn.Module):
    """A layer without an int8 weight, whose floating result is quantized."""

    def __init__(self, layer: nn.Module, rounded: Rounded) -> None:
        super().__init__()
        self.layer = layer
        self.activation = F.relu if getattr(layer, "_LOW", None) == 0.0 else _same
        self.rounded = rounded

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(self.activation(self.layer(x)))  # type: ignore[no-any-return]


class _Functional(nn.Module):
    """The operations of a QFunctional."""

    def __init__(self, rounded: Rounded) -> None:
        super().__init__()
        self.rounded = rounded

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rounded(torch.add(x, y))  # type: ignore[no-any-return]

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rounded(F.relu(torch.add(x, y)))  # type: ignore[no-any-return]

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rounded(torch.mul(x, y))  # type: ignore[no-any-return]

    def mul_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rounded(F.relu(torch.mul(x, y)))  # type: ignore[no-any-return]

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        return self.rounded(torch.cat(list(x), dim))  # type: ignore[no-any-return]

    def cat_relu(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        return self.rounded(F.relu(torch.cat(list(x), dim)))  # type: ignore[no-any-return]

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rounded(torch.matmul(x, y))  # type: ignore[no-any-return]

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.add(x, y)

    def add_scalar_relu(self, x: Tensor, y: float) -> Tensor:
        return F.relu(torch.add(x, y))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.mul(x, y)

    def mul_scalar_relu(self, x: Tensor, y: float) -> Tensor:
        return F.relu(torch.mul(x, y))


class _Embedding(nn.Module):
    """Rows of a weight of 8 or 4 bits, or of the real numbers that it stands for."""

    def __init__(self, layer: Any, int8_constant: bool) -> None:
        super().__init__()
        values, scales, zero_points = layer._unpacked()
        if not int8_constant:
            values = (values - zero_points[:, None]) * scales[:, None]
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_zero_point", zero_points)
        self.highest = 2**layer._bits - 1

    def _real(self) -> Any:
        if self.weight.is_floating_point():  # type: ignore[operator]
            return self.weight
        return decomposed.ops().dequantize_per_channel.default(
            *(self.weight, self.weight_scale, self.weight_zero_point, 0),
            *(0, self.highest, torch.uint8),
        )

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self._real())


class _EmbeddingBag(_Embedding):
    """Sums, means or maxima of such rows."""

    def __init__(self, layer: Any, int8_constant: bool) -> None:
        super().__init__(layer, int8_constant)
        self.settings = {
            name: getattr(layer, name) for name in ("mode", "include_last_offset", "padding_idx")
        }

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Any = None
    ) -> Tensor:
        return F.embedding_bag(
            *(indices, self._real(), offsets),
            per_sample_weights=per_sample_weights,
            **self.settings,
        )


class _LSTM(nnq.LSTM):
    """An LSTM of reference modules, whose first states are quantized zeros."""

    rounded: Rounded

    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        if hidden is None:
            zeros = self.rounded(self._zeros(x))
            hidden = [(zeros, zeros)] * self.num_layers
        return super().forward(x, hidden)


# --- which module stands for which --------------------------------------------------------------

# Those that derive from the floating module, and keep its parameters.
_COMPUTED = (
    *(nnq.BatchNorm2d, nnq.BatchNorm3d, nnq.LayerNorm, nnq.GroupNorm),
    *(nnq.InstanceNorm1d, nnq.InstanceNorm2d, nnq.InstanceNorm3d),
    *(nnq.Hardswish, nnq.ELU, nnq.LeakyReLU, nnq.Sigmoid, nnq.Softmax),
)


def _floating(layer: Any) -> nn.Module:
    """The layer as the class of torch.nn that it is derived from, which computes in floats."""
    base: Any = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn.modules"))
    made: nn.Module = base.__new__(base)
    vars(made).update(vars(layer))
    vars(made).update(_forward_hooks={}, _forward_pre_hooks={})
    return made


def _prelu(layer: Any) -> nn.Module:
    made = nn.PReLU(layer.num_parameters)
    made.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    return made


class Form(NamedTuple):
    """What a runtime's compiler looks for in a program.

    Attributes:
        dtype: of the integers between layers: torch.uint8 or torch.int8, which hold the same
            values, 128 apart.
        int8_constants: whether weights are int8, or floating and quantized in the program.
        adds_before_rounding: whether the sum of a layer's result and another tensor takes the
            result as it is, not rounded to the integers that the layer alone would give.
    """

    dtype: torch.dtype
    int8_constants: bool
    adds_before_rounding: bool


class References:
    """Makes the floating modules that stand for native ones; each once, wherever it is used.

    Args:
        dtype: of the integers between the native layers.
        form: of the program.
    """

    def __init__(self, dtype: torch.dtype, form: Form) -> None:
        self.dtype, self.form = dtype, form
        self._made: dict[int, nn.Module] = {}

    def of(self, path: str, module: nn.Module) -> nn.Module:
        """What stands for a module: itself, with its parts replaced, where it is not a native one.

        Raises:
            QuantizationError: it is of a user's class, and changes the forward of a native one.
        """
        if id(module) not in self._made:
            made = self._stand_in(path, module)
            if made is None:
                made = self._with_parts_replaced(path, module)
            else:
                copy_forward_pre_hooks(module, made)
                copy_forward_hooks(module, made)
            self._made[id(module)] = self._made[id(made)] = made
        return self._made[id(module)]

    def _with_parts_replaced(self, path: str, module: nn.Module) -> nn.Module:
        made: Any = module
        if isinstance(module, nnq.LSTM):
            made = in_class(_LSTM, module)
            made.rounded = Rounded(1.0, torch.iinfo(self.form.dtype).min, self.form.dtype)
        for name, child in module.named_children():
            setattr(made, name, self.of(f"{path}.{name}".lstrip("."), child))
        return made  # type: ignore[no-any-return]

    def _stand_in(self, path: str, module: Any) -> nn.Module | None:
        for classes, make in self._makers():
            if isinstance(module, classes):
                _require_known_forward(path, module)
                return make(module)
        return None

    def _makers(self) -> Iterator[tuple[Any, Callable[[Any], nn.Module]]]:
        int8_constants = self.form.int8_constants
        yield nnq.Quantize, lambda m: self._rounded(m, m.dtype)
        yield nnq.DeQuantize, lambda m: Boundary()
        yield nniq.ConvAdd2d, lambda m: _WeightedAdd(m, self._rounded(m), int8_constants)
        yield Weighted, lambda m: _Weighted(m, self._rounded(m), int8_constants)
        yield nnq.QFunctional, lambda m: _Functional(self._rounded(m))
        yield nnq.PReLU, lambda m: _Computed(_prelu(m), self._rounded(m))
        yield _COMPUTED, lambda m: _Computed(_floating(m), self._rounded(m))
        yield nnq.EmbeddingBag, lambda m: _EmbeddingBag(m, int8_constants)
        yield nnq.Embedding, lambda m: _Embedding(m, int8_constants)
        yield nnq.ReLU6, lambda m: nn.ReLU6()
        yield nnq.Dropout, lambda m: nn.Identity()

    def _rounded(self, layer: Any, dtype: torch.dtype | None = None) -> Rounded:
        """What quantizes the output of a layer."""
        wanted = self.form.dtype
        shift = torch.iinfo(wanted).min - torch.iinfo(dtype or self.dtype).min
        return Rounded(layer.scale, layer.zero_point + shift, wanted)


def _require_known_forward(path: str, module: nn.Module) -> None:
    defining = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if defining.__module__.partition(".")[0] not in ("fastquant", "torch"):
        raise QuantizationError(
            f"export: {path} is a {type(module).__name__}, whose class changes the forward of a "
            "quantized module; what it computes of floating tensors is not known"
        )
