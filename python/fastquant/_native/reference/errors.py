"""The error of what quantization made of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .basics import fake_quantize


def observe_error_(
    reference: Tensor,
    x: Tensor,
    scale: float | None,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    sums: Tensor,
    integers: Tensor,
) -> None:
    """Add to `sums`: pairs of finite elements, signal, noise, signal times error, clipped."""
    if x.is_floating_point():
        real = x if scale is None else _rounded(x, scale, zero_point, quant_min, quant_max)
    else:
        real = (x.float() - zero_point) * torch.tensor(scale, dtype=torch.float32)
    finite = reference.isfinite() & real.isfinite()
    signal = torch.where(finite, reference, 0).double()
    error = torch.where(finite, real, 0).double() - signal
    clipped = torch.zeros((), dtype=torch.float64, device=x.device)
    if integers.numel():
        assert scale is not None
        q = (reference / scale).round() + zero_point
        limited = q.clamp(quant_min, quant_max)
        counted = reference.isfinite()
        clipped = ((q != limited) & counted).double().sum()
        # What is not finite goes to one entry more.
        index = torch.where(counted, limited - quant_min, len(integers)).long().flatten()
        used = torch.cat([integers, integers.new_zeros(1)])
        integers.copy_(used.index_fill(0, index, 1)[:-1])
    new = (finite.double().sum(), signal.square().sum(), error.square().sum())
    sums.add_(torch.stack([*new, (signal * error).sum(), clipped]))


def _rounded(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    qparams = (
        torch.tensor([scale], dtype=torch.float32, device=x.device),
        torch.tensor([zero_point], dtype=torch.int32, device=x.device),
    )
    return fake_quantize(x, *qparams, None, None, quant_min, quant_max)
