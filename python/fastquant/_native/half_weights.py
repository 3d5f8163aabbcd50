"""The layout of packed float16 weights of linear layers.

Panels of 16 outputs, the last of them filled up with zeros, each an array [inputs][16]: the kernel
reads the weights of one input for all outputs of a panel at once (csrc/cpu/kernels.h).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_PANEL = 16


def pack_half(weight: Tensor) -> Tensor:
    """A float16 weight [outputs, inputs], packed."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -outputs % _PANEL))
    panels = padded.view(len(padded) // _PANEL, _PANEL, inputs)
    return panels.transpose(1, 2).contiguous()


def unpack_half(packed: Tensor, outputs: int) -> Tensor:
    """The weight that was packed, in new memory."""
    weight = packed.transpose(1, 2).flatten(0, 1)[:outputs]
    return weight.clone(memory_format=torch.contiguous_format)
