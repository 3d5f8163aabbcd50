"""Embeddings in 8 and 4 bits, packed row by row as the kernels read them.

A row holds its values, a byte or half a byte each (the lower half first), enough bytes for 16 of
them; then, in fp32, its scale and its zero point, negated. It does not depend on the processor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def value_bytes(dim: int, bits: int) -> int:
    """How many bytes of a row are values."""
    return (max(dim, 16) * bits + 7) // 8


def row_bytes(dim: int, bits: int) -> int:
    """How many bytes a row has."""
    return value_bytes(dim, bits) + 8


def in_bytes(values: Tensor, bits: int) -> Tensor:
    """uint8 values of a row, two in a byte if they have 4 bits."""
    if bits == 8:
        return values
    values = F.pad(values, (0, values.shape[1] % 2))
    return values[:, ::2] | (values[:, 1::2] << 4)


def from_bytes(packed: Tensor, dim: int, bits: int) -> Tensor:
    """The first `dim` values of `in_bytes`, one in a byte."""
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return packed[:, :dim]


def pack_rows(values: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Packed rows of uint8 values [rows, dim], and an fp32 scale and zero point of each row."""
    packed = in_bytes(values, bits)
    packed = F.pad(packed, (0, value_bytes(values.shape[1], bits) - packed.shape[1]))
    numbers = torch.stack((scales, -zero_points), 1).to(torch.float32)
    return torch.cat((packed, numbers.view(torch.uint8)), 1)


def unpack_rows(packed: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack_rows` was given, in new tensors."""
    layout = torch.contiguous_format
    numbers = packed[:, value_bytes(dim, bits) :].clone(memory_format=layout).view(torch.float32)
    values = from_bytes(packed, dim, bits).clone(memory_format=layout)
    return values, numbers[:, 0].clone(), -numbers[:, 1]
