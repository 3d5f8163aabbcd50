"""Elementwise operations and pooling of quantized tensors beside torch.ao's.

    python benchmarks/int8_elementwise.py [--threads 1,2]

The value of a row is how many times as fast as torch.ao an operation is, call and all: ours as
models call it, by modules and functions of quantized tensors; torch.ao's by the ops that its
modules call. Inputs lie in memory as convolutions leave them, channels last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastquant.nn import quantized as nnq
from fastquant.quantized_tensor import QuantizedTensor
from harness import INPUT, Suite, at_least, main, normal

SHAPES = (INPUT, (8, 256, 56, 56))
LAST = torch.channels_last
SCALE, ZERO_POINT = 0.03, 128
OUTPUT = (0.04, 100)

Pair = tuple[Callable[[], object], Callable[[], object], float]


def operations(shape: tuple[int, ...]) -> dict[str, Pair]:
    """What is measured: ours, torch.ao's, and how much faster ours is to be."""
    theirs = torch.ops.quantized
    x, y = (normal(*shape).roll(k).contiguous(memory_format=LAST) for k in range(2))
    contiguous = x.contiguous()
    qx, qy = (torch.quantize_per_tensor(t, SCALE, ZERO_POINT, torch.quint8) for t in (x, y))
    a, b = (QuantizedTensor(q.int_repr(), SCALE, ZERO_POINT) for q in (qx, qy))
    quantize = nnq.Quantize(SCALE, ZERO_POINT, torch.uint8)
    functional = nnq.QFunctional()
    functional.scale, functional.zero_point = OUTPUT
    hardswish = nnq.Hardswish(*OUTPUT)
    gate = torch.quantize_per_tensor(x[:, :, :1, :1], SCALE, ZERO_POINT, torch.quint8)
    our_gate = QuantizedTensor(gate.int_repr(), SCALE, ZERO_POINT)

    def quantized(t: Tensor) -> Tensor:
        return torch.quantize_per_tensor(t, SCALE, ZERO_POINT, torch.quint8)

    return {
        "quantize": (lambda: quantize(x), lambda: quantized(x), 1.0),
        "quantize to channels_last": (
            lambda: quantize(contiguous),
            lambda: quantized(contiguous).contiguous(memory_format=LAST),
            2.0,
        ),
        "dequantize": (a.dequantize, qx.dequantize, 1.0),
        "add": (lambda: functional.add(a, b), lambda: theirs.add(qx, qy, *OUTPUT), 2.5),
        "add, ReLU": (
            lambda: functional.add_relu(a, b),
            lambda: theirs.add_relu(qx, qy, *OUTPUT),
            2.5,
        ),
        "mul": (lambda: functional.mul(a, b), lambda: theirs.mul(qx, qy, *OUTPUT), 2.0),
        "mul by a number per channel": (
            lambda: functional.mul(a, our_gate),
            lambda: theirs.mul(qx, gate, *OUTPUT),
            2.0,
        ),
        "cat": (lambda: functional.cat([a, b], 1), lambda: theirs.cat([qx, qy], 1, *OUTPUT), 3.0),
        "table (sigmoid)": (
            lambda: torch.sigmoid(a),
            lambda: theirs.sigmoid(qx, 1 / 256, 0),
            10.0,
        ),
        "table (hardswish)": (lambda: hardswish(a), lambda: theirs.hardswish(qx, *OUTPUT), 10.0),
        "max pool 3x3, stride 2": (
            lambda: F.max_pool2d(a, 3, 2, 1),
            lambda: F.max_pool2d(qx, 3, 2, 1),
            1.0,
        ),
        "average pool 2x2": (lambda: F.avg_pool2d(a, 2, 2), lambda: F.avg_pool2d(qx, 2, 2), 1.0),
        "adaptive average pool to 1x1": (
            lambda: F.adaptive_avg_pool2d(a, 1),
            lambda: F.adaptive_avg_pool2d(qx, 1),
            1.0,
        ),
    }


def measure(suite: Suite) -> None:
    image = normal(1, 3, 224, 224)
    quantize = nnq.Quantize(SCALE, ZERO_POINT, torch.uint8)
    suite.compare(
        "quantize to channels_last",
        "fp32 [1, 3, 224, 224]",
        lambda: quantize(image),
        lambda: torch.quantize_per_tensor(image, SCALE, ZERO_POINT, torch.quint8).contiguous(
            memory_format=LAST
        ),
        at_least(2),
    )
    for shape in SHAPES:
        for name, (ours, theirs, target) in operations(shape).items():
            suite.compare(name, f"uint8 {list(shape)}", ours, theirs, at_least(target))


if __name__ == "__main__":
    main(measure)
