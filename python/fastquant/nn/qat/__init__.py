"""Layers for quantization-aware training, under the names of torch.ao.nn.qat.

Where torch.ao exists they are its classes, otherwise those of `layers`.
"""

from __future__ import annotations

from ..._torch import ao
from ..._torch.counterparts import prefer_torch_ao
from .layers import Conv1d, Conv2d, Conv3d, Embedding, EmbeddingBag, Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "EmbeddingBag", "Linear"]

prefer_torch_ao(globals(), ao.nnqat, __all__)
