"""Batch normalization of quantized tensors, by its running statistics."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..._native import ops
from ..._quantized.calls import UNBOUNDED
from ...quantized_tensor import made, parts
from .observed import NoNativeFormError, layer_of, output_qparams
from .scaled import Scaled


class _BatchNorm(Scaled):
    _DIMS: ClassVar[int]
    _LOW: ClassVar[float] = -UNBOUNDED

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, True, True, device=device, dtype=dtype)
        self.requires_grad_(False)
        self._set_qparams(1.0, 0)

    def _get_name(self) -> str:
        return f"Quantized{type(self).__name__}"

    def _check_input_dim(self, input: Any) -> None:
        if input.dim() != self._DIMS + 2:
            shape = "(N, C, H, W)" if self._DIMS == 2 else "(N, C, D, H, W)"
            raise ValueError(
                f"{self._get_name()} takes an input of shape {shape}, got shape {list(input.shape)}"
            )

    def forward(self, input: Any) -> Any:
        values, scale, zero_point = parts(input)
        self._check_input_dim(values)
        bn: Any = self
        y = ops.quantized_batch_norm(
            *(values, scale, zero_point, bn.weight, bn.bias, bn.running_mean, bn.running_var),
            *(bn.eps, self.scale, self.zero_point, self._LOW, UNBOUNDED),
        )
        return made(y, self.scale, self.zero_point)

    def _take(self, mod: Any) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(self, name).data.copy_(getattr(mod, name).detach())

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> Any:
        """What an observed batch norm becomes, or one fused with ReLU."""
        return cls.from_reference(mod, *output_qparams(mod))

    @classmethod
    def from_reference(cls, mod: Any, output_scale: float, output_zero_point: int) -> Any:
        """What a float batch norm becomes, given the scale and zero point of its output."""
        bn = layer_of(mod)
        if bn.running_mean is None or bn.weight is None:
            raise NoNativeFormError("it has no running statistics, or no weight and bias")
        made_of = cls(bn.num_features, bn.eps, bn.momentum, device=bn.weight.device)
        made_of._take(bn)
        made_of._set_qparams(output_scale, output_zero_point)
        return made_of


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on quantized tensors."""

    _DIMS = 2


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on quantized tensors."""

    _DIMS = 3
