"""Embeddings and bags of embeddings in 8 and 4 bits beside torch.ao's.

    python benchmarks/int8_embedding.py [--threads 1,2]

The value of a row is how many times as fast as torch.ao's module ours is, call and all. The table
has 100,000 rows; indices are random.
"""

from __future__ import annotations

import torch
import torch.ao.nn.quantized as nnq_torch
import torch.ao.quantization as tq
from torch import nn

import fastquant.nn.quantized as nnq
from harness import Suite, at_least, main, normal

ROWS = 100_000
DIMS = (64, 128)
# Bags, and indices in each of them.
BAGS = ((1, 20), (128, 20), (128, 80), (1024, 20), (1024, 80))
LOOKUPS = (1, 128, 2048, 20_480)
QCONFIGS = {8: tq.float_qparams_weight_only_qconfig, 4: tq.float_qparams_weight_only_qconfig_4bit}


def measure(suite: Suite) -> None:
    generator = torch.Generator().manual_seed(0)
    for bits, qconfig in QCONFIGS.items():
        for dim in DIMS:
            bag = nn.EmbeddingBag(ROWS, dim, _weight=normal(ROWS, dim), mode="sum")
            bag.qconfig = qconfig
            theirs = nnq_torch.EmbeddingBag.from_float(bag)
            ours = nnq.EmbeddingBag.from_float(bag)
            for count, size in BAGS:
                indices = torch.randint(0, ROWS, (count * size,), generator=generator)
                offsets = torch.arange(0, count * size, size)
                suite.compare(
                    f"embedding bag, {bits} bits",
                    f"{count} x {size}, {dim} elements",
                    lambda o=ours, i=indices, at=offsets: o(i, at),
                    lambda o=theirs, i=indices, at=offsets: o(i, at),
                    at_least(1),
                )
            # torch.ao's own from_float fails with 4 bits.
            weight = theirs.weight()
            table = nnq_torch.Embedding(ROWS, dim, _weight=weight, dtype=weight.dtype)
            own = nnq.Embedding(ROWS, dim, _weight=weight, dtype=weight.dtype)
            for count in LOOKUPS:
                indices = torch.randint(0, ROWS, (count,), generator=generator)
                suite.compare(
                    f"embedding, {bits} bits",
                    f"{count}, {dim} elements",
                    lambda o=own, i=indices: o(i),
                    lambda o=table, i=indices: o(i),
                    at_least(1),
                )


if __name__ == "__main__":
    main(measure)
