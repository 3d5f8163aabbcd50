"""The ops of embeddings in 8 and 4 bits: beside the reference, torch.ao and floating embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import embedding_calls
from embedding_calls import MAX, MEAN, SUM, Call, random_rows
from fastquant._native import ops
from fastquant._native.packed_rows import pack_rows, unpack_rows
from strategies import seeds
from test_quantized_elementwise import (
    assert_as_reference,
    assert_equal,
    assert_same_with_threads,
)


@given(embedding_calls.lookups())
def test_lookups_as_reference(every_isa: list[str], call: Call) -> None:
    assert_as_reference(every_isa, *call)


@given(embedding_calls.bags())
def test_bags_as_reference(every_isa: list[str], call: Call) -> None:
    assert_as_reference(every_isa, *call)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes(every_isa: list[str]) -> None:
    for name, args in embedding_calls.samples(4000):
        assert_same_with_threads(2, 3, name=name, args=args)


def test_many_indices_as_reference(every_isa: list[str]) -> None:
    for name, args in embedding_calls.samples(600):
        assert_as_reference(every_isa, name, args)


@given(seeds, st.sampled_from([8, 4]), st.integers(1, 40))
def test_rows_are_packed_and_unpacked_exactly(seed: int, bits: int, dim: int) -> None:
    rows = random_rows(9, dim, bits, seed)
    for ours, given_ in zip(unpack_rows(pack_rows(*rows, bits), dim, bits), rows, strict=True):
        assert_equal(ours, given_)


# ------------------------------------------------------------------------------ torch.ao


def torchs(values: Any, scales: Any, zero_points: Any, bits: int) -> Any:
    """torch's packed weight of the same values."""
    real = (values - zero_points[:, None]) * scales[:, None]
    dtype = torch.quint8 if bits == 8 else torch.quint4x2
    weight = torch.quantize_per_channel(real, scales, zero_points, 0, dtype)
    assert torch.equal(weight.dequantize(), real)
    return torch.ops.quantized.embedding_bag_prepack(weight)


@given(seeds, st.sampled_from([8, 4]), st.integers(1, 70))
def test_as_torch_ao(seed: int, bits: int, half: int) -> None:
    dim = 2 * half
    generator = torch.Generator().manual_seed(seed)
    values, scales, _ = random_rows(30, dim, bits, seed)
    scales = (scales * 2**14).round().clamp(min=1) / 2**14  # exact in fp16, as torch keeps them
    zero_points = torch.randint(0, 2**bits, (30,), generator=generator).float()
    packed = pack_rows(values, scales, zero_points, bits)
    theirs = torchs(values, scales, zero_points, bits)
    name = "byte" if bits == 8 else "4bit"
    indices = torch.randint(0, 30, (40,), generator=generator)
    lookup = getattr(torch.ops.quantized, f"embedding_{name}")
    ours = ops.quantized_embedding(packed, dim, bits, indices)
    if bits == 8:
        assert_equal(ours, lookup(theirs, indices))
    else:
        torch.testing.assert_close(ours, lookup(theirs, indices), rtol=2e-3, atol=2e-3)
    bag = getattr(torch.ops.quantized, f"embedding_bag_{name}")
    offsets = torch.tensor([0, 3, 3, 17])
    weights = torch.rand(40, generator=generator)
    for w in (None, weights):
        expected = bag(theirs, indices, offsets, per_sample_weights=w)
        settings = (SUM, False, None)
        got = ops.quantized_embedding_bag(packed, dim, bits, indices, offsets, w, None, *settings)
        tolerance = 1e-5 if bits == 8 else 2e-3
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)
    mapping = torch.randint(-1, 30, (50,), generator=generator, dtype=torch.int32)
    indices = torch.randint(0, 50, (40,), generator=generator)
    expected = bag(
        theirs, indices, offsets, pruned_weights=True, compressed_indices_mapping=mapping
    )
    table = (packed, dim, bits)
    got = ops.quantized_embedding_bag(*table, indices, offsets, None, mapping, SUM, False, None)
    tolerance = 1e-5 if bits == 8 else 2e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)


# -------------------------------------------------------------------- floating embeddings


@given(embedding_calls.bags())
def test_bags_are_those_of_the_floating_rows(call: Call) -> None:
    packed, dim, bits, indices, offsets, weights, mapping, mode, include_last, padding = call[1]
    every_row = torch.arange(packed.shape[0])
    rows = ops.quantized_embedding(packed, dim, bits, every_row)
    if mapping is not None and mapping.tolist() != [0]:
        rows = torch.cat((rows, torch.zeros(1, dim)))[mapping.long()]
    if indices.dim() == 2 and (0 in indices.shape or include_last):
        return  # F.embedding_bag fails or leaves out the last bag
    if offsets is not None and include_last:
        indices = indices[: int(offsets[-1])]
        weights = None if weights is None else weights[: int(offsets[-1])]
    if offsets is not None and indices.dtype != offsets.dtype:
        offsets = offsets.to(indices.dtype)
    expected = F.embedding_bag(
        indices,
        rows,
        offsets,
        mode={SUM: "sum", MEAN: "mean", MAX: "max"}[mode],
        per_sample_weights=weights,
        include_last_offset=include_last,
        padding_idx=padding,
    )
    torch.testing.assert_close(getattr(ops, call[0])(*call[1]), expected, rtol=1e-5, atol=1e-3)


# ------------------------------------------------------------------------------ bad input


def test_what_does_not_fit_is_refused_in_words() -> None:
    packed = pack_rows(*random_rows(10, 16, 8, 0), 8)
    table, none = (packed, 16, 8), (None, None, SUM, False, None)
    three, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
    bad = torch.tensor([1, 10, -2])
    with pytest.raises(RuntimeError, match=r"indices\[1\] is 10, the embedding has 10 rows"):
        ops.quantized_embedding(*table, bad)
    with pytest.raises(RuntimeError, match=r"indices\[1\] is 10"):
        ops.quantized_embedding_bag(*table, bad, offsets, *none)
    with pytest.raises(RuntimeError, match=r"indices\[2\] is -2"):
        ops.quantized_embedding_bag(*table, bad, offsets, None, None, SUM, False, 10)
    mapping, weights = torch.tensor([0, -1, 10, 1]), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"mapping\[2\] is 10, the embedding has 10 rows"):
        ops.quantized_embedding_bag(*table, three, offsets, None, mapping, SUM, False, None)
    with pytest.raises(RuntimeError, match=r"offsets\[0\] must be 0, got 1"):
        ops.quantized_embedding_bag(*table, three, offsets + 1, *none)
    for wrong in ([0, 2, 1], [0, 4]):
        with pytest.raises(RuntimeError, match=r"offsets\[\d\] must be at least"):
            ops.quantized_embedding_bag(*table, three, torch.tensor(wrong), *none)
    with pytest.raises(RuntimeError, match="per_sample_weights must be float32"):
        ops.quantized_embedding_bag(*table, three, offsets, weights[:2], None, SUM, False, None)
    with pytest.raises(RuntimeError, match="need the mode sum"):
        ops.quantized_embedding_bag(*table, three, offsets, weights, None, MEAN, False, None)
    with pytest.raises(RuntimeError, match="must be int32 or int64"):
        ops.quantized_embedding(*table, three.float())
    with pytest.raises(RuntimeError, match="rows of"):
        ops.quantized_embedding(packed, 17, 8, three)
    with pytest.raises(RuntimeError, match="bits must be 8 or 4"):
        ops.quantized_embedding(packed, 16, 2, three)


def test_a_bag_of_nothing_is_zeros() -> None:
    packed = pack_rows(*random_rows(10, 16, 8, 0), 8)
    for mode in (SUM, MEAN, MAX):
        settings = (None, None, mode, False, 3)
        indices, offsets = torch.tensor([3, 3]), torch.tensor([0, 2, 2])
        got = ops.quantized_embedding_bag(packed, 16, 8, indices, offsets, *settings)
        assert_equal(got, torch.zeros(3, 16))
