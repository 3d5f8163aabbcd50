"""Layers whose weight is fake-quantized as scaled by the batch norm that follows them.

They are the package's own; where torch.ao exists, `fastquant.nn.intrinsic.qat` has torch.ao's.
`fastquant.nn.qat.batch_norm` explains what they compute.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter, init
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ... import intrinsic as nni
from ...qat import layers
from ...qat.batch_norm import before_batch_norm

_Self = TypeVar("_Self", bound="WithBatchNorm")

_KEPT_BY_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class WithBatchNorm(layers.Biased):
    """A layer, its batch norm, and whether that is frozen.

    Frozen, it uses its running statistics and leaves them, in whichever mode the model is.
    """

    _BATCH_NORM: ClassVar[type[nn.Module]]
    # What folds batch norm into weight and bias.
    _fold: ClassVar[Any]

    bias: Any
    bn: Any
    freeze_bn: bool

    def _add_batch_norm(
        self, features: int, eps: float, momentum: float | None, freeze_bn: bool, qconfig: Any
    ) -> None:
        self.bn = self._BATCH_NORM(features, eps, momentum)
        self._quantize_weight_by(qconfig)
        self.reset_bn_parameters()
        if freeze_bn:
            self.freeze_bn_stats()
        else:
            self.update_bn_stats()

    def reset_running_stats(self) -> None:
        """Have batch norm forget what it has seen."""
        self.bn.reset_running_stats()

    def reset_bn_parameters(self) -> None:
        """Give batch norm random weights, as torch.ao does, and have it forget what it has seen."""
        self.bn.reset_running_stats()
        init.uniform_(self.bn.weight)
        init.zeros_(self.bn.bias)

    def update_bn_stats(self: _Self) -> _Self:
        """Let batch norm use the statistics of each batch, and learn from them."""
        self.freeze_bn = False
        self.bn.training = True
        return self

    def freeze_bn_stats(self: _Self) -> _Self:
        """Have batch norm use its running statistics from now on, and leave them."""
        self.freeze_bn = True
        self.bn.training = False
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode; a frozen batch norm, and the fake-quantizers beside it, keep theirs."""
        self.training = mode
        if not self.freeze_bn:
            for child in self.children():
                child.train(mode)
        return self

    @classmethod
    def from_float(cls: type[_Self], mod: Any, use_precomputed_fake_quant: bool = False) -> _Self:
        """A layer that trains the parameters of a fused module, which it shares.

        Args:
            mod: the fused module, with a `qconfig`.
            use_precomputed_fake_quant: means nothing here.
        """
        layers.require_float_module(cls, mod)
        layer, bn = mod[0], mod[1]
        made = cls(
            **cls._arguments_of(layer), eps=bn.eps, momentum=bn.momentum, qconfig=mod.qconfig
        )
        layers.take_parameters(made, layer)
        for name in _KEPT_BY_BATCH_NORM:
            setattr(made.bn, name, getattr(bn, name))
        return made

    def to_float(self) -> nn.Module:
        """The layer without fake-quantizing, with batch norm folded into its weight and bias."""
        layer = self._float_layer()
        bn = self.bn
        if bn.running_mean is None or bn.running_var is None:
            raise AssertionError(f"{type(self).__name__} needs the running statistics of its bn")
        layer.weight, layer.bias = self._fold(
            *(layer.weight, layer.bias, bn.running_mean, bn.running_var),
            *(bn.eps, bn.weight, bn.bias),
        )
        return layer  # type: ignore[no-any-return]


class _ConvBn(WithBatchNorm, layers.Conv):
    """The constructor and the computation; classes that derive from it name a layer of torch.nn.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: of the convolution, as torch.nn has them.
        eps, momentum: of the batch norm.
        freeze_bn: whether batch norm uses its running statistics from the beginning.
        qconfig: its `weight` makes the fake-quantizer.
    """

    # In states of version 1, batch norm's tensors were the module's own.
    _version = 2

    _fold = staticmethod(fuse_conv_bn_weights)
    _conv_forward: Any
    out_channels: int
    _enable_slow_path_for_better_numerical_stability: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        eps: float = 1e-05,
        momentum: float | None = 0.1,
        freeze_bn: bool = False,
        qconfig: Any = None,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False),
            padding_mode,
        )
        if bias:
            self.bias = Parameter(torch.empty(out_channels))
        self._add_batch_norm(out_channels, eps, momentum, freeze_bn, qconfig)
        self._enable_slow_path_for_better_numerical_stability = False

    def reset_bn_parameters(self) -> None:
        super().reset_bn_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if self._enable_slow_path_for_better_numerical_stability:
            return self._forward_slow(input)
        return self._forward_approximate(input)

    def _forward_approximate(self, input: Tensor) -> Tensor:
        y: Tensor = self.bn(before_batch_norm(self, input))
        return y

    def _forward_slow(self, input: Tensor) -> Tensor:
        """The same with two convolutions: it never divides by gamma, and scales by this batch.

        In training, the first convolution, with the weight as it is, gives the batch's statistics.
        The second has the weight that inference will use, fake-quantized as scaled by running
        statistics that have just learned of the batch; its result is scaled to the batch's own.
        """
        bn = self.bn
        per_channel = (1, -1, *(1,) * (self.weight.dim() - 2))
        no_bias = torch.zeros(self.out_channels, device=self.weight.device, dtype=input.dtype)
        if bn.training:
            unscaled = self._conv_forward(input, self.weight, no_bias)
            with torch.no_grad():
                bn(unscaled if self.bias is None else unscaled + self.bias.reshape(per_channel))
        running_std = torch.sqrt(bn.running_var + bn.eps)
        scale = (bn.weight / running_std).reshape(-1, *(1,) * (self.weight.dim() - 1))
        y = self._conv_forward(input, self.weight_fake_quant(self.weight * scale), no_bias)
        if bn.training:
            but_channels = [d for d in range(unscaled.dim()) if d != 1]
            mean = unscaled.mean(but_channels)
            variance = torch.square(unscaled - mean.reshape(per_channel)).mean(but_channels)
            std = torch.sqrt(variance + bn.eps)
            y = y * (running_std / std).reshape(per_channel)
        else:
            mean = bn.running_mean - (0 if self.bias is None else self.bias)
            std = running_std
        y = y + (bn.bias - bn.weight * mean / std).reshape(per_channel)
        if self.bias is not None:
            # A gradient of zeros, which DistributedDataParallel wants to see.
            y = y + (self.bias - self.bias).reshape(per_channel)
        return y  # type: ignore[no-any-return]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        if local_metadata.get("version") in (None, 1):
            for name in _KEPT_BY_BATCH_NORM:
                before = {"weight": "gamma", "bias": "beta"}.get(name, name)
                # Some states say 1 and have the names of 2.
                if prefix + before in state_dict:
                    state_dict[f"{prefix}bn.{name}"] = state_dict.pop(prefix + before)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)


class ConvBn1d(_ConvBn, nn.Conv1d, nni._FusedModule):
    """A `Conv1d` and its `BatchNorm1d`."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvBn1d
    _FLOAT_LAYER = nn.Conv1d
    _BATCH_NORM = nn.BatchNorm1d


class ConvBn2d(_ConvBn, nn.Conv2d, nni._FusedModule):
    """A `Conv2d` and its `BatchNorm2d`."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvBn2d
    _FLOAT_LAYER = nn.Conv2d
    _BATCH_NORM = nn.BatchNorm2d


class ConvBn3d(_ConvBn, nn.Conv3d, nni._FusedModule):
    """A `Conv3d` and its `BatchNorm3d`."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvBn3d
    _FLOAT_LAYER = nn.Conv3d
    _BATCH_NORM = nn.BatchNorm3d


class _WithReLU(_ConvBn):
    _FUSED_FLOAT_MODULE: ClassVar[Any]

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self._forward(input))

    def to_float(self) -> nn.Module:
        """A fused module without fake-quantizing, with batch norm folded into the layer."""
        fused: nn.Module = self._FUSED_FLOAT_MODULE(super().to_float(), nn.ReLU())
        return fused.train(self.training)


class ConvBnReLU1d(_WithReLU, ConvBn1d):
    """A `Conv1d`, its `BatchNorm1d` and `ReLU`."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvBnReLU1d
    _FUSED_FLOAT_MODULE = nni.ConvReLU1d


class ConvBnReLU2d(_WithReLU, ConvBn2d):
    """A `Conv2d`, its `BatchNorm2d` and `ReLU`."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvBnReLU2d
    _FUSED_FLOAT_MODULE = nni.ConvReLU2d


class ConvBnReLU3d(_WithReLU, ConvBn3d):
    """A `Conv3d`, its `BatchNorm3d` and `ReLU`."""

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.ConvBnReLU3d
    _FUSED_FLOAT_MODULE = nni.ConvReLU3d


class LinearBn1d(WithBatchNorm, nn.Linear, nni._FusedModule):
    """A `Linear` and its `BatchNorm1d`.

    Args:
        in_features, out_features, bias: of the linear layer.
        eps, momentum: of the batch norm.
        freeze_bn: whether batch norm uses its running statistics from the beginning.
        qconfig: its `weight` makes the fake-quantizer.
    """

    _FLOAT_MODULE: ClassVar[type[nn.Module]] = nni.LinearBn1d
    _FLOAT_LAYER = nn.Linear
    _ARGUMENTS = layers.Linear._ARGUMENTS
    _BATCH_NORM = nn.BatchNorm1d
    _fold = staticmethod(fuse_linear_bn_weights)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-05,
        momentum: float | None = 0.1,
        freeze_bn: bool = False,
        qconfig: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._add_batch_norm(out_features, eps, momentum, freeze_bn, qconfig)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.bn(before_batch_norm(self, input))
        return y
