"""Layers to train for dynamic quantization, under the names of torch.ao.nn.qat.dynamic.

Where torch.ao exists they are its classes, otherwise those of `linear`.
"""

from __future__ import annotations

from ...._torch import ao
from ...._torch.counterparts import prefer_torch_ao
from .linear import Linear

__all__ = ["Linear"]

prefer_torch_ao(globals(), ao.nnqatd, __all__)
