"""What a call of a small int8 module costs, and what functions of torch cost on a quantized tensor.

Compares fastquant's native modules and quantized tensors with torch.ao's, in microseconds, on one
thread: each figure is the least of many short interleaved rounds, since other work only adds.

    python benchmarks/int8_calls.py
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.nn import functional as F

from fastquant.nn import quantized as native
from fastquant.quantized_tensor import QuantizedTensor

CHANNELS = 16
SCALE, ZERO_POINT = 0.1, 3


def microseconds(calls: dict[str, Callable[[], Any]], rounds: int, count: int) -> dict[str, float]:
    """The least time of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - begin) / count * 1e6)
    return {name: min(each) for name, each in times.items()}


def weight(*shape: int) -> torch.Tensor:
    """A quantized weight, as torch.ao's modules take it."""
    scales = torch.full((shape[0],), 0.01, dtype=torch.float64)
    zero_points = torch.zeros(shape[0], dtype=torch.int64)
    return torch.quantize_per_channel(torch.randn(shape), scales, zero_points, 0, torch.qint8)


def modules() -> dict[str, tuple[Callable[[Any, Any], Any], ...]]:
    """For each row, the call of ours and that of torch.ao, given a quantized tensor of each."""
    conv_weight, linear_weight = weight(CHANNELS, CHANNELS, 1, 1), weight(CHANNELS, CHANNELS)
    bias = torch.randn(CHANNELS)
    pairs: list[tuple[Any, Any]] = []
    for package in (native, nnq):
        conv = package.Conv2d(CHANNELS, CHANNELS, 1)
        conv.set_weight_bias(conv_weight, bias)
        linear = package.Linear(CHANNELS, CHANNELS)
        linear.set_weight_bias(linear_weight, bias)
        functional = package.QFunctional()
        quantize = package.Quantize(SCALE, ZERO_POINT, torch.quint8)
        for module in (conv, linear, functional):
            module.scale, module.zero_point = 0.2, 5
        pairs.append((conv, linear, functional, quantize))  # type: ignore[arg-type]
    (conv, linear, functional, quantize), (their_conv, their_linear, theirs, their_quantize) = pairs
    real = torch.randn(1, CHANNELS, 4, 4).contiguous(memory_format=torch.channels_last)
    pool, average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
    return {
        "Conv2d 1x1, 16 channels, 4x4": (conv, their_conv),
        "Linear 16x16": (
            lambda x: linear(x.as_row),
            lambda x: their_linear(x.as_row),
        ),
        "QFunctional.add": (lambda x: functional.add(x, x), lambda x: theirs.add(x, x)),
        "QFunctional.cat": (lambda x: functional.cat([x, x], 1), lambda x: theirs.cat([x, x], 1)),
        "Quantize": (lambda x: quantize(real), lambda x: their_quantize(real)),
        "x.dequantize()": (lambda x: x.dequantize(),) * 2,
        "MaxPool2d": (pool, pool),
        "AdaptiveAvgPool2d": (average, average),
        "F.relu": (F.relu,) * 2,
        "F.hardsigmoid": (F.hardsigmoid,) * 2,
        "x.flatten(1)": (lambda x: x.flatten(1),) * 2,
        "torch.flatten(x, 1)": (lambda x: torch.flatten(x, 1),) * 2,
        "x.permute(0, 2, 3, 1)": (lambda x: x.permute(0, 2, 3, 1),) * 2,
        "x[:, 1:]": (lambda x: x[:, 1:],) * 2,
        "x.chunk(2, 1)": (lambda x: x.chunk(2, 1),) * 2,
        "torch.cat([x, x], 1)": (lambda x: torch.cat([x, x], 1),) * 2,
        "x.mean([2, 3])": (lambda x: x.mean([2, 3]),) * 2,
        "x.shape": (lambda x: x.shape,) * 2,
        "x.size(0)": (lambda x: x.size(0),) * 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=100, help="calls in a round")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    values = torch.randint(0, 256, (1, CHANNELS, 4, 4), dtype=torch.uint8)
    values = values.contiguous(memory_format=torch.channels_last)
    ours = QuantizedTensor(values, SCALE, ZERO_POINT)
    theirs: Any = torch._make_per_tensor_quantized_tensor(values, SCALE, ZERO_POINT)
    theirs = theirs.contiguous(memory_format=torch.channels_last)
    for x in (ours, theirs):
        x.as_row = x[:, :, 0, 0].contiguous()
    print(f"{'µs':30s}{'native':>10s}{'torch.ao':>10s}")
    with torch.no_grad():
        for name, (our_call, their_call) in modules().items():

            def call_ours(call: Callable[[Any], Any] = our_call) -> Any:
                return call(ours)

            def call_theirs(call: Callable[[Any], Any] = their_call) -> Any:
                return call(theirs)

            times = microseconds(
                {"native": call_ours, "torch.ao": call_theirs}, args.rounds, args.calls
            )
            print(f"{name:30s}{times['native']:10.2f}{times['torch.ao']:10.2f}", flush=True)


if __name__ == "__main__":
    main()
