"""Calls of the ops of embeddings in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastquant._native.packed_rows import pack_rows
from strategies import random_values, seeds

Call = tuple[str, tuple[Any, ...]]

SUM, MEAN, MAX = range(3)


def random_rows(rows: int, dim: int, bits: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and zero points: those of ordinary rows, and of rows far from zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, dim), dtype=torch.uint8, generator=generator)
    scales = random_values((rows,), torch.float32, seed, "positive") * 0.01
    zero_points = random_values((rows,), torch.float32, seed + 1, "outliers") * 20
    return values, scales, zero_points


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """packed, dim and bits"""
    bits, rows = draw(st.sampled_from([8, 4])), draw(st.integers(1, 40))
    dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 127, 128, 129, 300])))
    return pack_rows(*random_rows(rows, dim, bits, draw(seeds)), bits), dim, bits


integers = st.sampled_from([torch.int32, torch.int64])


@st.composite
def indices_of(draw: st.DrawFn, rows: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(seeds))
    values = torch.randint(0, rows, shape, generator=generator, dtype=draw(integers))
    if values.dim() == 2 and draw(st.booleans()):
        return values.t().contiguous().t()
    return values


@st.composite
def lookups(draw: st.DrawFn) -> Call:
    packed, dim, bits = draw(tables())
    shape = draw(st.lists(st.integers(0, 12), max_size=3))
    return "quantized_embedding", (packed, dim, bits, draw(indices_of(packed.shape[0], *shape)))


@st.composite
def bags(draw: st.DrawFn) -> Call:
    packed, dim, bits = draw(tables())
    rows, include_last, offsets = packed.shape[0], draw(st.booleans()), None
    mapping = None
    if draw(st.booleans()):
        mapping = torch.tensor(
            draw(st.lists(st.integers(-1, rows - 1), min_size=1, max_size=9)), dtype=draw(integers)
        )
        rows = rows if mapping.tolist() == [0] else len(mapping)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
        ends = torch.tensor([0, *lengths]).cumsum(0).to(draw(integers))
        offsets = ends if include_last else ends[:-1]
        # Those after the last offset, where it ends the last bag, are in no bag.
        extra = draw(st.integers(0, 3)) if include_last else 0
        indices = draw(indices_of(rows, int(ends[-1]) + extra))
    else:
        indices = draw(indices_of(rows, draw(st.integers(0, 8)), draw(st.integers(0, 9))))
    mode, weights = draw(st.sampled_from([SUM, SUM, MEAN, MAX])), None
    if mode == SUM and draw(st.booleans()):
        weights = random_values(indices.shape, torch.float32, draw(seeds))
    padding = draw(st.one_of(st.none(), st.integers(0, rows - 1)))
    settings = (mode, include_last, padding)
    table = (packed, dim, bits)
    return "quantized_embedding_bag", (*table, indices, offsets, weights, mapping, *settings)


def samples(bags: int = 7) -> Iterator[Call]:
    """A few calls of each op, of so many bags of 5 indices."""
    for bits, dim in ((8, 70), (4, 33)):
        table = (pack_rows(*random_rows(90, dim, bits, bits), bits), dim, bits)
        generator = torch.Generator().manual_seed(1)
        indices = torch.randint(0, 90, (bags, 5), generator=generator)
        flat, offsets = indices.flatten(), torch.arange(bags, dtype=torch.int32) * 5
        weights, mapping = flat / 90.0, torch.arange(90) - 1
        yield "quantized_embedding", (*table, indices)
        for mode in (SUM, MEAN, MAX):
            rest = (None, None, mode, False)
            yield "quantized_embedding_bag", (*table, flat, offsets, *rest, None)
            yield "quantized_embedding_bag", (*table, indices, None, *rest, 3)
        rest = (weights, mapping.int(), SUM, True, None)
        yield "quantized_embedding_bag", (*table, flat, offsets, *rest)
