"""What layers have in common whose input is floating and their weight is not."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...._core.dtypes import INT8, QINT8
from ...._core.errors import QuantizationError
from ....qconfig import default_dynamic_qconfig
from .. import observed
from ..weighted import PackedWeight, fp32, require_source

_Self = TypeVar("_Self", bound="DynamicWeighted")

WEIGHT_DTYPES = (*INT8, torch.float16)


def check_weight_dtype(dtype: Any) -> torch.dtype:
    """`dtype`, if weights can have it.

    Raises:
        QuantizationError: they cannot.
    """
    if dtype not in WEIGHT_DTYPES:
        raise QuantizationError(
            f"dtype must be torch.qint8 (or torch.int8) or torch.float16, got {dtype!r}"
        )
    return dtype  # type: ignore[no-any-return]


def weight_observer_of(module: Any) -> Any:
    """A new observer for a weight of this module, as its config or the default one makes it.

    Raises:
        NoNativeFormError: it is for a dtype that no weight here can have.
        QuantizationError: the module has no config.
    """
    if not hasattr(module, "qconfig"):
        raise QuantizationError(
            f"the {type(module).__name__} must have a qconfig: set its attribute qconfig, to None "
            "for the default one"
        )
    config = module.qconfig
    make = getattr(config, "weight", None) or default_dynamic_qconfig.weight
    observer = make()
    if observer.dtype not in WEIGHT_DTYPES:
        raise observed.NoNativeFormError(
            f"the observer of its weight is for {observer.dtype}, and weights are int8 or float16"
        )
    return observer


def half(weight: Tensor) -> Tensor:
    """A weight as float16, in whose range all of it lies."""
    most = torch.finfo(torch.float16).max
    return weight.detach().float().clamp(-most, most).to(torch.float16).contiguous()


class DynamicWeighted(PackedWeight):
    """A layer that quantizes its input at each call, to the range that it has then.

    Attributes:
        weight_dtype: torch.qint8 (torch.int8 where torch lacks it), or torch.float16: then nothing
            else is quantized.
        reduce_range: whether the input gets 7 bits of 8, as torch.ao's layers give it, whose
            kernels could overflow otherwise. These do not: with False, results are more accurate.
    """

    reduce_range = True
    weight_dtype: torch.dtype = QINT8

    @property
    def _is_half(self) -> bool:
        return self.weight_dtype == torch.float16

    def _pack(self, values: Tensor, scales: Any, bias: Tensor | None) -> None:
        if not self._is_half:
            super()._pack(values, scales, bias)
            return
        self._buffers["_packed_weight"] = self._pack_half(half(values))
        self._buffers["weight_scale"] = None
        self._buffers["_bias"] = bias

    def _integers(self) -> Tensor:
        if self._is_half:
            return self._unpack_half(self._buffers["_packed_weight"])  # type: ignore[arg-type]
        return super()._integers()

    def _pack_half(self, weight: Tensor) -> Tensor:
        """A float16 weight in the form in which the layer computes with it."""
        return weight

    def _unpack_half(self, packed: Tensor) -> Tensor:
        """The weight that `_pack_half` was given."""
        return packed

    def weight(self) -> Any:
        """The weight as a quantized tensor, unpacked at each call; a float16 one as it is."""
        return self._integers() if self._is_half else super().weight()

    def set_weight_bias(self, w: Any, b: Tensor | None) -> None:
        """Give the layer a weight of its shape, and a bias.

        Args:
            w: what `weight()` of such a layer returns, also of one of torch.ao's.
            b: floating; None for no bias.

        Raises:
            QuantizationError: the weight has another dtype or shape, or zero points other than 0.
        """
        if not self._is_half:
            super().set_weight_bias(w, b)
            return
        shape, floating = getattr(w, "shape", None), getattr(w, "is_floating_point", None)
        if shape != self._weight_shape or floating is None or not floating():
            raise QuantizationError(
                f"the weight must be a floating tensor of shape {list(self._weight_shape)}, got "
                f"{type(w).__name__} of shape {None if shape is None else list(shape)}"
            )
        self._check_bias(b)
        self._pack(w, None, fp32(b))

    def _load_weight(
        self, weight: Tensor, scales: Any, assign: bool, prefix: str, error_msgs: list[str]
    ) -> None:
        if not self._is_half:
            super()._load_weight(weight, scales, assign, prefix, error_msgs)
            return
        if weight.dtype != torch.float16 or tuple(weight.shape) != self._weight_shape:
            error_msgs.append(
                f"{prefix}weight must be float16 of shape {list(self._weight_shape)}, got "
                f"{weight.dtype} of shape {list(weight.shape)}"
            )
            return
        device = weight.device if assign else self._integers().device
        self._pack(weight.to(device, copy=True), None, self._bias)

    def extra_repr(self) -> str:
        text = f"dtype={self.weight_dtype}"
        if not self._is_half:
            per_channel = self.weight_scale.numel() > 1
            text += f", qscheme=torch.per_{'channel' if per_channel else 'tensor'}_affine"
        return text

    @classmethod
    def from_float(cls: type[_Self], mod: Any, use_precomputed_fake_quant: bool = False) -> _Self:
        """A dynamically quantized module of a float one, or of one trained for that.

        Args:
            mod: has a `qconfig`, whose observer the weight gets; None is the default one.
            use_precomputed_fake_quant: has no effect here, as in torch.ao.

        Raises:
            TypeError: `mod` is none of the classes that this one stands for.
            QuantizationError: the weight's observer is for no weight that is possible here.
        """
        require_source(cls, mod)
        layer = observed.layer_of(mod)
        observer = weight_observer_of(layer if hasattr(layer, "qconfig") else mod)
        made = cls._like(layer)
        made.take(layer.weight, layer.bias, observer)
        return made

    def take(self, weight: Tensor, bias: Tensor | None, observer: Any) -> None:
        """Take a floating weight, as its observer quantizes it."""
        self.weight_dtype = observer.dtype
        if self._is_half:
            self._pack(weight, None, fp32(bias))
            return
        with torch.no_grad():
            observed.observe(observer, weight)
        axis = self._channel_axis()
        self._pack(*observed.symmetric_integers(weight, observer, axis), fp32(bias))

    @classmethod
    def from_reference(cls: type[_Self], ref_module: Any) -> _Self:
        """A dynamically quantized module of a reference module, which has a quantized weight."""
        layer: Any = ref_module[0] if isinstance(ref_module, nn.Sequential) else ref_module
        made = cls._like(layer)
        made.weight_dtype = check_weight_dtype(layer.weight_dtype)
        made.set_weight_bias(layer.get_quantized_weight(), layer.bias)
        return made
