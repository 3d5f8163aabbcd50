"""Entries of dynamic modules in state dicts of torch.ao's: in the form that ours load, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...._core.errors import QuantizationError
from ...._torch.private import per_channel_quantized
from ..weighted import integers_of_weight
from .conv import _DynamicConv
from .linear import Linear
from .rnn import RNNBase, RNNCellBase, _Gates
from .weighted import DynamicWeighted


class ScriptObject:
    """A packed weight of torch's in a pickle, as the tensors that it holds."""

    _state: Any = ((), "")

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def __getstate__(self) -> Any:
        return self._state


def _packed(value: Any) -> Any:
    """What a packed weight holds, whether torch or this module has made it."""
    try:
        return value.__getstate__()[0]
    except (AttributeError, IndexError, TypeError, RuntimeError):
        raise QuantizationError(
            f"it must be a packed weight of torch's, got {type(value).__name__}"
        ) from None


def take_dynamic(state: dict[str, Any], metadata: Any, path: str, module: nn.Module) -> None:
    """Put the weights of a dynamic module of torch.ao's into the form that ours loads.

    What is in our form already stays.

    Args:
        state: is changed.
        metadata: the versions in a state_dict.
        path: of the module.
        module: what will load it.
    """
    prefix = f"{path}." if path else ""
    try:
        if isinstance(module, RNNBase):
            _take_recurrent(state, prefix, module)
        elif isinstance(module, RNNCellBase):
            for kind in ("ih", "hh"):
                packed = state.pop(f"{prefix}_packed_weight_{kind}", None)
                if packed is not None:
                    weight, bias = _packed(packed)
                    _take(state, f"{prefix}{kind}.", getattr(module, kind), weight, bias)
        elif isinstance(module, DynamicWeighted) and not isinstance(module, _Gates):
            for name in ("scale", "zero_point"):
                state.pop(prefix + name, None)
            weight, bias = _pair(state, prefix)
            version = metadata.get(path, {}).get("version")
            if isinstance(module, Linear) and weight is not None and version is not None:
                module.reduce_range = version >= 4
            _take(state, prefix, module, weight, bias)
    except QuantizationError as error:
        raise QuantizationError(f"{path}: {error}") from None


def _pair(state: dict[str, Any], prefix: str) -> tuple[Any, Any]:
    """Weight and bias of a linear layer or a convolution, taken out where they are torch.ao's."""
    packed = f"{prefix}_packed_params."
    state.pop(f"{packed}dtype", None)
    for name in ("weight", "bias"):  # version 2 of torch.ao's Linear
        if packed + name in state:
            state[prefix + name] = state.pop(packed + name)
    pair = state.pop(f"{packed}_packed_params", None)
    if pair is None and getattr(state.get(f"{prefix}weight"), "is_quantized", False):
        pair = state.pop(f"{prefix}weight"), state.pop(f"{prefix}bias", None)
    return (None, None) if pair is None else tuple(pair)


def _take_recurrent(state: dict[str, Any], prefix: str, module: RNNBase) -> None:
    parts = list(module._parts())
    for i in range(len(parts) // 2):
        cell = state.pop(f"{prefix}_all_weight_values.{i}.param", None)
        if cell is None:
            continue
        _, _, _, flags, packed = _packed(cell)
        for (name, part), params in zip(parts[2 * i : 2 * i + 2], packed, strict=True):
            part.reduce_range = bool(flags and flags[0])
            _take(state, f"{prefix}{name}.", part, *_packed(params))


def _take(
    state: dict[str, Any], prefix: str, module: DynamicWeighted, weight: Any, bias: Any
) -> None:
    if weight is None:
        return
    if module._is_half:
        if getattr(weight, "is_quantized", True):
            raise QuantizationError("its weight must be float16, got an int8 one")
        state[f"{prefix}weight"] = weight.detach().to(torch.float16)
    else:
        if not getattr(weight, "is_quantized", False):
            raise QuantizationError("its weight must be int8, got a floating one")
        state[f"{prefix}weight"], state[f"{prefix}weight_scale"] = integers_of_weight(
            weight, module._weight_shape, module._channel_axis()
        )
    if bias is not None:
        state[f"{prefix}bias"] = bias.detach()


# --- writing ------------------------------------------------------------------------------------


def _of_torch(module: DynamicWeighted) -> Any:
    """The weight as one of torch's quantized tensors, or as fp32 where it is float16."""
    values = module._integers()
    if module._is_half:
        return values.float()
    scales = module.weight_scale
    if scales.numel() == 1:
        scale = float(scales)
        return torch.quantize_per_tensor(values * scale, scale, 0, torch.qint8)
    zero_points = torch.zeros(len(scales), dtype=torch.int64)
    return per_channel_quantized(values, scales.double(), zero_points, module._channel_axis())


def give_dynamic(state: dict[str, Any], metadata: Any, path: str, module: nn.Module) -> None:
    """Replace the entries of a dynamic module by those of torch.ao's."""
    prefix = f"{path}." if path else ""
    if isinstance(module, RNNBase):
        parts = [part for _, part in module._parts()]
        for i, (ih, hh) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            state[f"{prefix}_all_weight_values.{i}.param"] = _cell_params(ih, hh)
            metadata[f"{prefix}_all_weight_values.{i}"] = {"version": 1}
        metadata[path] = {"version": 2}
    elif isinstance(module, RNNCellBase):
        for kind in ("ih", "hh"):
            state[f"{prefix}_packed_weight_{kind}"] = _prepacked(getattr(module, kind))
    elif isinstance(module, DynamicWeighted) and not isinstance(module, _Gates):
        weight, bias = _of_torch(module), module.bias()
        _drop(state, prefix)
        state[f"{prefix}scale"], state[f"{prefix}zero_point"] = torch.tensor(1.0), torch.tensor(0)
        if isinstance(module, _DynamicConv):
            state[f"{prefix}weight"], state[f"{prefix}bias"] = weight, bias
        else:
            packed = f"{prefix}_packed_params"
            dtype = torch.float16 if module._is_half else torch.qint8
            state[f"{packed}.dtype"], state[f"{packed}._packed_params"] = dtype, (weight, bias)
            metadata[path], metadata[packed] = {"version": 4}, {"version": 3}
    for name in _inner(module):
        _drop(state, f"{prefix}{name}.")
        metadata.pop(prefix + name, None)


def _inner(module: nn.Module) -> Iterator[str]:
    """The child modules that torch.ao's form has not."""
    if isinstance(module, (RNNBase, RNNCellBase)):
        yield from (name for name, child in module.named_children() if isinstance(child, _Gates))


def _drop(state: dict[str, Any], prefix: str) -> None:
    for name in ("weight", "weight_scale", "bias"):
        state.pop(prefix + name, None)


def _prepacked(part: Any) -> Any:
    pack: Any = torch.ops.quantized.linear_prepack
    if part._is_half:
        pack = torch.ops.quantized.linear_prepack_fp16
    return pack(_of_torch(part), part.bias())


def _cell_params(ih: Any, hh: Any) -> Any:
    packed = _prepacked(ih), _prepacked(hh)
    if ih._is_half:
        return torch.ops.quantized.make_quantized_cell_params_fp16(*packed)
    if ih.bias() is None:
        raise QuantizationError("torch.ao has no recurrent layers without bias")
    return torch.ops.quantized.make_quantized_cell_params_dynamic(
        *packed, ih.bias(), hh.bias(), ih.reduce_range
    )
