"""Embeddings in 8 and 4 bits, and bags of them.

An element of a row is `value * scale - zero_point * scale`, of which the last product, and then all
of it, is rounded once to fp32. Rows are added in the order of their indices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packed_rows import row_bytes, unpack_rows
from .basics import _check
from .quantized import multiplied_and_added

SUM, MEAN, MAX = range(3)  # modes of quantized_embedding_bag, numbered as torch does


def _elements(packed: Tensor, dim: int, bits: int) -> Tensor:
    _check(bits in (4, 8), f"bits must be 8 or 4, got {bits}")
    _check(
        packed.dtype == torch.uint8 and packed.shape[1:] == (row_bytes(dim, bits),),
        f"packed must be uint8 with rows of {row_bytes(dim, bits)} bytes",
    )
    values, scales, zero_points = unpack_rows(packed, dim, bits)
    biases = -(zero_points * scales)
    return multiplied_and_added(values, scales.unsqueeze(1), biases.unsqueeze(1).double())


def quantized_embedding(packed: Tensor, dim: int, bits: int, indices: Tensor) -> Tensor:
    return F.embedding(indices, _elements(packed, dim, bits))


def _bags(
    indices: Tensor, offsets: Tensor | None, include_last_offset: bool
) -> tuple[Tensor, Tensor, int]:
    """For each index: the bag that it is in, -1 for none. How many bags there are."""
    if offsets is None:
        _check(indices.dim() == 2, "indices must have 2 dimensions where there are no offsets")
        bags = torch.arange(indices.shape[0], device=indices.device)
        return indices.flatten(), bags.repeat_interleave(indices.shape[1]), indices.shape[0]
    _check(indices.dim() == 1, "indices must have 1 dimension where there are offsets")
    offsets = offsets.long()
    ends = offsets if include_last_offset else F.pad(offsets, (0, 1), value=indices.numel())
    _check(ends.numel() > 0, "offsets must have an element, the last offset")
    lengths = ends.diff()
    count = lengths.numel()
    begins_at_0 = offsets.numel() == 0 or int(offsets[0]) == 0
    _check(begins_at_0, "offsets[0] must be 0")
    _check(
        not bool((lengths < 0).any()) and int(ends[-1]) <= indices.numel(),
        "offsets must ascend, and end at most at the number of indices",
    )
    bags = torch.arange(count, device=indices.device).repeat_interleave(lengths)
    return indices, F.pad(bags, (0, indices.numel() - bags.numel()), value=-1), count


def quantized_embedding_bag(
    packed: Tensor,
    dim: int,
    bits: int,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mapping: Tensor | None,
    mode: int,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    elements = _elements(packed, dim, bits)
    flat, bags, count = _bags(indices, offsets, include_last_offset)
    counted = bags >= 0
    if padding_idx is not None:
        counted = counted & (flat != padding_idx)
    flat, bags = flat[counted].long(), bags[counted]
    if per_sample_weights is not None:
        _check(mode == SUM, "per_sample_weights need the mode sum")
        _check(per_sample_weights.numel() == counted.numel(), "each index needs a weight")
        per_sample_weights = per_sample_weights.flatten()[counted].unsqueeze(1)
    if mapping is not None and not (mapping.numel() == 1 and int(mapping) == 0):
        _check(not flat.numel() or int(flat.min()) >= 0, "indices must not be negative")
        # A row that was removed, -1, is the last one here: zeros.
        numbers = mapping.long()[flat]
        elements = torch.cat((elements, elements.new_zeros(1, dim)))
        flat = torch.where(numbers == -1, packed.shape[0], numbers)
    rows = F.embedding(flat, elements)
    lengths = torch.bincount(bags, minlength=count)
    position = torch.arange(flat.numel(), device=flat.device) - (lengths.cumsum(0) - lengths)[bags]
    result = elements.new_full((count, dim), -torch.inf if mode == MAX else 0.0)
    for k in range(int(lengths.max()) if count else 0):
        now = position == k
        bag, row = bags[now], rows[now]
        if mode == MAX:
            result[bag] = torch.maximum(result[bag], row)
        elif per_sample_weights is not None:
            result[bag] = multiplied_and_added(row, per_sample_weights[now], result[bag].double())
        else:
            result[bag] += row
    if mode == MEAN:
        result /= lengths.clamp(min=1).unsqueeze(1)
    return result.masked_fill_((lengths == 0).unsqueeze(1), 0.0)


QUANTIZED_EMBEDDINGS = (quantized_embedding, quantized_embedding_bag)
