"""The part of linear layers and convolutions that keeps their weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..._core.errors import QuantizationError
from ..._native.ops import pack_weight, unpack_weight
from ..._quantized.calls import UNBOUNDED
from ...quantized_tensor import PerChannelQuantizedTensor, QuantizedTensor
from . import observed
from .scaled import KeepsDtypes, Scaled

_Self = TypeVar("_Self", bound="PackedWeight")
_Weighted = TypeVar("_Weighted", bound="Weighted")


class PackedWeight(KeepsDtypes):
    """A layer that keeps its int8 weight once, in the form that the kernels read.

    The packed weight is in no state_dict and no pickle: there the weight is as it was quantized,
    an int8 tensor `weight` and its fp32 scales `weight_scale`, one or one for each output channel.
    """

    # The modules that `from_float` takes.
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = ()
    _TRANSPOSED: ClassVar[bool] = False

    groups = 1
    weight_scale: Tensor
    _bias: Tensor | None
    _weight_shape: tuple[int, ...]

    def _init_weight(
        self, shape: tuple[int, ...], bias: int | None, device: torch.device | str | None = None
    ) -> None:
        """Register a weight of zeros, and a bias of that many zeros."""
        self._weight_shape = shape
        for name in ("_packed_weight", "weight_scale", "_bias"):
            self.register_buffer(name, None, persistent=False)
        self._pack(
            torch.zeros(shape, dtype=torch.int8, device=device),
            torch.ones(1, device=device),
            None if bias is None else torch.zeros(bias, device=device),
        )

    def _pack(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self._buffers["_packed_weight"] = pack_weight(values, self.groups, self._TRANSPOSED)
        self._buffers["weight_scale"] = scales
        self._buffers["_bias"] = bias

    def _integers(self) -> Tensor:
        """The int8 weight, in torch's layout."""
        packed = self._buffers["_packed_weight"]
        return unpack_weight(packed, self._weight_shape, self.groups, self._TRANSPOSED)  # type: ignore[no-any-return]

    def _channel_axis(self) -> int:
        return 1 if self._TRANSPOSED else 0

    def _out_channels(self) -> int:
        channels = self._weight_shape[self._channel_axis()]
        return channels * self.groups if self._TRANSPOSED else channels

    # --- accessors, as torch.ao has them ----------------------------------------------------

    def weight(self) -> Any:
        """The weight as a quantized tensor, unpacked at each call."""
        values, scales = self._integers(), self.weight_scale
        if scales.numel() == 1:
            return QuantizedTensor(values, float(scales), 0)
        zero_points = torch.zeros_like(scales, dtype=torch.int64)
        return PerChannelQuantizedTensor(values, scales, zero_points, self._channel_axis())

    def bias(self) -> Tensor | None:
        """The bias, in floating point."""
        return self._buffers["_bias"]

    def _weight_bias(self) -> tuple[Any, Tensor | None]:
        return self.weight(), self.bias()

    def set_weight_bias(self, w: Any, b: Tensor | None) -> None:
        """Give the layer a quantized weight of its shape, and a bias.

        Args:
            w: what `weight()` of such a layer returns, also of one of torch.ao's.
            b: floating; None for no bias.

        Raises:
            QuantizationError: the weight is not int8, has another shape, or has zero points other
                than 0.
        """
        values, scales = integers_of_weight(w, self._weight_shape, self._channel_axis())
        self._check_bias(b)
        self._pack(values, scales, fp32(b))

    def _check_bias(self, b: Any) -> None:
        if b is not None and (not isinstance(b, Tensor) or b.shape != (self._out_channels(),)):
            found = f"shape {list(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
            raise QuantizationError(
                f"the bias must be None or a tensor of shape [{self._out_channels()}], got {found}"
            )

    # --- state -----------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self._integers()
        for key, name in (("weight_scale", "weight_scale"), ("bias", "_bias")):
            value = self._buffers[name]
            if value is not None:
                destination[prefix + key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, scales, bias = (
            state_dict.pop(prefix + name, None) for name in ("weight", "weight_scale", "bias")
        )
        # With load_state_dict(assign=True), tensors stay on the state's device: the module's may be
        # meta.
        assign = local_metadata.get("assign_to_params_buffers", False)
        has_scales = self._buffers["weight_scale"] is not None
        wanted = {"weight": weight, "weight_scale": scales} if has_scales else {"weight": weight}
        if self._bias is not None:
            wanted["bias"] = bias
        elif bias is not None:
            unexpected_keys.append(prefix + "bias")
        values = [value for value in (weight, scales, bias) if value is not None]
        found = {type(value).__name__ for value in values if not isinstance(value, Tensor)}
        if found:
            error_msgs.append(f"{prefix}weight, weight_scale and bias must be tensors, got {found}")
            weight = scales = bias = None
        missing_keys += [prefix + name for name, value in wanted.items() if value is None]
        if weight is not None and (scales is not None or not has_scales):
            self._load_weight(weight, scales, assign, prefix, error_msgs)
        if self._bias is not None and bias is not None:
            self._load_bias(bias, assign, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_weight(
        self, weight: Tensor, scales: Tensor, assign: bool, prefix: str, error_msgs: list[str]
    ) -> None:
        channels = self._out_channels()
        problems = []
        if weight.dtype != torch.int8 or tuple(weight.shape) != self._weight_shape:
            problems.append(
                f"{prefix}weight must be int8 of shape {list(self._weight_shape)}, got "
                f"{weight.dtype} of shape {list(weight.shape)}"
            )
        if scales.numel() not in (1, channels) or not (scales > 0).all() or scales.isinf().any():
            problems.append(
                f"{prefix}weight_scale must have 1 or {channels} positive finite elements, "
                f"got {scales}"
            )
        error_msgs += problems
        if not problems:
            device = weight.device if assign else self.weight_scale.device
            scales = scales.detach().to(device, torch.float32, copy=True).reshape(-1)
            self._pack(weight.to(device), scales, self._bias)

    def _load_bias(self, bias: Tensor, assign: bool, prefix: str, error_msgs: list[str]) -> None:
        assert self._bias is not None
        if bias.shape == self._bias.shape:
            self._buffers["_bias"] = fp32(bias if assign else bias.to(self._bias.device))
            return
        error_msgs.append(
            f"{prefix}bias must have shape {list(self._bias.shape)}, got {list(bias.shape)}"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["_buffers"] = {**self._buffers, "_packed_weight": None}
        state["_weight"] = self._integers()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        weight = state.pop("_weight")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(weight, self.weight_scale, self._bias)

    # --- made of other modules ---------------------------------------------------------------

    @classmethod
    def _like(cls: type[_Self], layer: Any) -> _Self:
        """A module with the settings of a float layer, and a weight of zeros."""
        raise NotImplementedError


class Weighted(PackedWeight, Scaled):
    """A layer with an int8 weight whose output is quantized, too."""

    # The least and the greatest output, in real numbers.
    _LOW: ClassVar[float] = -UNBOUNDED
    _HIGH: ClassVar[float] = UNBOUNDED

    def _init_weight(
        self, shape: tuple[int, ...], bias: int | None, device: torch.device | str | None = None
    ) -> None:
        self.scale, self.zero_point = 1.0, 0
        super()._init_weight(shape, bias, device)

    @classmethod
    def from_float(
        cls: type[_Weighted], mod: Any, use_precomputed_fake_quant: bool = False
    ) -> _Weighted:
        """A quantized module of an observed, fused or trained one, which stays as it is.

        Args:
            mod: has observers, as `prepare` or `prepare_qat` adds them.
            use_precomputed_fake_quant: keep the weight range observed in training, where torch.ao
                does: in linear layers.

        Raises:
            TypeError: `mod` is none of the classes that this one stands for.
            QuantizationError: its observers are not for int8 weights with zero point 0, and 8-bit
                activations.
        """
        require_source(cls, mod)
        scale, zero_point = observed.output_qparams(mod)
        weight, bias = observed.folded(mod)
        observer = observed.weight_observer(mod, weight, use_precomputed_fake_quant)
        made = cls._like(observed.layer_of(mod))
        values, scales = observed.symmetric_integers(weight, observer, made._channel_axis())
        made._pack(values, scales, fp32(bias))
        made._set_qparams(scale, zero_point)
        return made

    @classmethod
    def from_reference(
        cls: type[_Weighted], ref_module: Any, output_scale: float, output_zero_point: int
    ) -> _Weighted:
        """A quantized module of a reference module, which has a quantized weight."""
        layer: Any = ref_module[0] if isinstance(ref_module, nn.Sequential) else ref_module
        made = cls._like(layer)
        made.set_weight_bias(layer.get_quantized_weight(), layer.bias)
        made._set_qparams(float(output_scale), int(output_zero_point))
        return made


def fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32, copy=True)


def require_source(cls: Any, module: Any) -> None:
    """Raise unless `cls` stands for modules of this class."""
    if type_before_parametrizations(module) not in cls._FLOAT_MODULES:
        accepted = ", ".join(f"{c.__module__}.{c.__name__}" for c in cls._FLOAT_MODULES)
        raise TypeError(
            f"{cls.__name__}.from_float takes a module of class {accepted}, got "
            f"{type(module).__module__}.{type(module).__name__}"
        )


def integers_of_weight(
    weight: Any, shape: tuple[int, ...], channel_axis: int
) -> tuple[Tensor, Tensor]:
    """The int8 values and fp32 scales of a quantized tensor, checked to be a weight.

    Args:
        weight: one of this package's, or of torch's quantized dtypes.
        shape: that it must have.
        channel_axis: along which it may have scales.
    """
    if not getattr(weight, "is_quantized", False):
        raise QuantizationError(
            "the weight must be a quantized tensor, as weight() returns it, got "
            f"{type(weight).__name__}"
        )
    values = weight.int_repr()
    if values.dtype != torch.int8 or tuple(values.shape) != shape:
        raise QuantizationError(
            f"the weight must be int8 of shape {list(shape)}, got {values.dtype} of shape "
            f"{list(values.shape)}"
        )
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scales, zero_points = torch.tensor([weight.q_scale()]), [weight.q_zero_point()]
    else:
        scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        if weight.q_per_channel_axis() != channel_axis:
            raise QuantizationError(
                f"the scales of the weight must be along axis {channel_axis}, the output "
                f"channels, got axis {weight.q_per_channel_axis()}"
            )
    if any(zero_points):
        raise QuantizationError(
            "the zero points of the weight must be 0: the kernels take symmetric weights"
        )
    return values, scales.detach().to(torch.float32, copy=True)
