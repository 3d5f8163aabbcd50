"""Fused layers that quantize their input at each call, as torch.ao.nn.intrinsic has them."""

from __future__ import annotations

from .linear_relu import LinearReLU

__all__ = ["LinearReLU"]
