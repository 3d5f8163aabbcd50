"""Layers whose weight is fake-quantized at each call, for quantization-aware training.

They are the package's own; where torch.ao exists, `fastquant.nn.qat` has torch.ao's instead.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.utils.parametrize import (
    is_parametrized,
    transfer_parametrizations_and_params,
    type_before_parametrizations,
)

from ..._core.errors import QuantizationError
from ..._torch.private import AttentionLinear
from ..intrinsic import _FusedModule
from .convolution import convolve

_Self = TypeVar("_Self", bound="Trained")


class Trained(nn.Module):
    """What a layer with a fake-quantized weight adds to the layer of torch.nn."""

    # What `from_float` takes.
    _FLOAT_MODULE: ClassVar[type[nn.Module]]
    # The layer of torch.nn, and the arguments that it keeps as attributes under the same name.
    _FLOAT_LAYER: ClassVar[type[nn.Module]]
    _ARGUMENTS: ClassVar[tuple[str, ...]]

    qconfig: Any
    weight_fake_quant: Any
    weight: Any

    def _quantize_weight_by(self, qconfig: Any, **factory_kwargs: Any) -> None:
        """Make the weight's fake-quantizer; factory_kwargs: `device` and `dtype`, for it."""
        if not qconfig:
            raise QuantizationError(
                f"{type(self).__name__} needs a qconfig, whose weight() makes the weight's "
                f"fake-quantizer, got {qconfig!r}"
            )
        self.qconfig = qconfig
        given = {"factory_kwargs": factory_kwargs} if factory_kwargs else {}
        self.weight_fake_quant = qconfig.weight(**given)

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        """What makes a layer like this one."""
        return {name: getattr(layer, name) for name in cls._ARGUMENTS}

    @classmethod
    def from_float(cls: type[_Self], mod: Any, use_precomputed_fake_quant: bool = False) -> _Self:
        """A layer that trains the parameters of a float one, which it shares.

        Args:
            mod: the layer, or a fused module that begins with it, with a `qconfig`.
            use_precomputed_fake_quant: means nothing here.
        """
        require_float_module(cls, mod)
        layer = mod[0] if isinstance(mod, _FusedModule) else mod
        made = cls(**cls._arguments_of(layer), qconfig=getattr(layer, "qconfig", mod.qconfig))
        take_parameters(made, layer)
        return made

    def _float_layer(self) -> Any:
        """The layer of torch.nn; its parameters share memory with this one's."""
        layer = self._FLOAT_LAYER(**self._arguments_of(self))
        for name in layer._parameters:
            tensor = getattr(self, name)
            setattr(layer, name, None if tensor is None else Parameter(tensor.detach()))
        return layer.train(self.training)

    def to_float(self) -> nn.Module:
        """The layer without fake-quantizing; its parameters share memory with this one's."""
        layer: nn.Module = self._float_layer()
        return layer


def require_float_module(cls: type[Trained], mod: Any) -> None:
    """Raise unless `cls.from_float` takes the module."""
    kind = type_before_parametrizations(mod)
    is_in_attention = cls._FLOAT_MODULE is nn.Linear and kind is AttentionLinear
    if kind is not cls._FLOAT_MODULE and not is_in_attention:
        raise QuantizationError(
            f"{cls.__name__}.from_float takes a {cls._FLOAT_MODULE.__name__}, got {kind.__name__}"
        )
    if not getattr(mod, "qconfig", None):
        raise QuantizationError(
            f"{cls.__name__}.from_float takes a module with a qconfig, and this "
            f"{type(mod).__name__} has none"
        )


def take_parameters(made: nn.Module, layer: nn.Module) -> None:
    """Have `made` use the parameters of `layer`, and how they are computed if they are."""
    for name in ("weight", "bias"):
        if is_parametrized(layer, name):
            transfer_parametrizations_and_params(layer, made, name)
        elif hasattr(layer, name):
            setattr(made, name, getattr(layer, name))


class Biased(Trained):
    bias: Any

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        return {**super()._arguments_of(layer), "bias": layer.bias is not None}


class Linear(Biased, nn.Linear):
    """`torch.nn.Linear` with a fake-quantized weight.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn has them.
        qconfig: its `weight` makes the fake-quantizer.
    """

    _FLOAT_LAYER = nn.Linear
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.Linear
    _ARGUMENTS = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._quantize_weight_by(qconfig, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_fake_quant(self.weight), self.bias)


class Conv(Biased):
    """What the convolutions below, and those that are fused with other modules, have in common."""

    _ARGUMENTS = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode"),
    )


class _PlainConv(Conv):
    """The constructor and the computation; classes that derive from it name a layer of torch.nn.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as torch.nn has them.
        qconfig: its `weight` makes the fake-quantizer.
    """

    _conv_forward: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            *(padding_mode, device, dtype),
        )
        self._quantize_weight_by(qconfig, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return convolve(self, input, self.weight_fake_quant(self.weight), self.bias)


class Conv1d(_PlainConv, nn.Conv1d):
    """`torch.nn.Conv1d` with a fake-quantized weight."""

    _FLOAT_LAYER = nn.Conv1d
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.Conv1d


class Conv2d(_PlainConv, nn.Conv2d):
    """`torch.nn.Conv2d` with a fake-quantized weight."""

    _FLOAT_LAYER = nn.Conv2d
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.Conv2d


class Conv3d(_PlainConv, nn.Conv3d):
    """`torch.nn.Conv3d` with a fake-quantized weight."""

    _FLOAT_LAYER = nn.Conv3d
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.Conv3d


class _Table(Trained):
    """What embeddings have in common: a weight whose rows have a scale and zero point each."""

    @classmethod
    def _arguments_of(cls, layer: Any) -> dict[str, Any]:
        # Given a weight, torch.nn draws no random one.
        return {**super()._arguments_of(layer), "_weight": layer.weight}

    def _quantize_weight_by(self, qconfig: Any, **factory_kwargs: Any) -> None:
        super()._quantize_weight_by(qconfig, **factory_kwargs)
        qscheme = getattr(self.weight_fake_quant, "qscheme", None)
        if qscheme != torch.per_channel_affine_float_qparams:
            raise QuantizationError(
                f"{type(self).__name__} needs a weight with qscheme "
                f"torch.per_channel_affine_float_qparams, got {qscheme}"
            )


class Embedding(_Table, nn.Embedding):
    """`torch.nn.Embedding` with a fake-quantized weight.

    Args:
        qconfig: its `weight` makes the fake-quantizer, of `torch.per_channel_affine_float_qparams`.

    The other arguments are torch.nn's.
    """

    _FLOAT_LAYER = nn.Embedding
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.Embedding
    _ARGUMENTS = (
        *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
        *("scale_grad_by_freq", "sparse"),
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Any = None,
        dtype: Any = None,
        qconfig: Any = None,
    ) -> None:
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type),
            *(scale_grad_by_freq, sparse, _weight),
            device=device,
            dtype=dtype,
        )
        self._quantize_weight_by(qconfig, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            *(input, self.weight_fake_quant(self.weight), self.padding_idx, self.max_norm),
            *(self.norm_type, self.scale_grad_by_freq, self.sparse),
        )


class EmbeddingBag(_Table, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with a fake-quantized weight.

    Args:
        qconfig: its `weight` makes the fake-quantizer, of `torch.per_channel_affine_float_qparams`.

    The other arguments are torch.nn's.
    """

    _FLOAT_LAYER = nn.EmbeddingBag
    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nn.EmbeddingBag
    _ARGUMENTS = (
        *("num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq"),
        *("mode", "sparse", "include_last_offset", "padding_idx"),
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        qconfig: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            *(num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode),
            *(sparse, _weight, include_last_offset, padding_idx, device, dtype),
        )
        self._quantize_weight_by(qconfig, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return F.embedding_bag(
            *(input, self.weight_fake_quant(self.weight), offsets, self.max_norm, self.norm_type),
            *(self.scale_grad_by_freq, self.mode, self.sparse, per_sample_weights),
            *(self.include_last_offset, self.padding_idx),
        )
