"""Dynamically quantized layers beside torch.ao's, and linear layers beside torchao's, eager.

    python benchmarks/int8_dynamic.py [--threads 1,2]

The value of a row is how many times as fast a module of fastquant is, call and all. The rows of
torchao are left out, and said to be, where it is not installed: `pip install --no-deps torchao`.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastquant as fq
from harness import OURS, Case, Suite, at_least, main, normal


def called(module: nn.Module, x: Tensor) -> Case:
    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return Case(run)


def quantized(module: nn.Module, backend: str, dtype: torch.dtype = torch.qint8) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fq.quantize_dynamic(
            nn.Sequential(module), {type(module)}, dtype=dtype, backend=backend
        )[0]


def torchao_linear() -> Callable[[nn.Linear], nn.Module] | None:
    """What quantizes a linear layer with torchao; None where that is not installed."""
    try:
        torchao: Any = importlib.import_module("torchao.quantization")
    except ImportError:
        return None

    def make(layer: nn.Linear) -> nn.Module:
        model = nn.Sequential(copy.deepcopy(layer))
        torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
        return model[0]

    return make


def measure(suite: Suite) -> None:
    torch.manual_seed(0)
    linear, fused = (
        nn.Linear(768, 3072),
        fq.nn.intrinsic.LinearReLU(nn.Linear(768, 3072), nn.ReLU()),
    )
    for batch in (1, 8, 32, 128):
        x = normal(batch, 768)
        target = None if batch == 8 else at_least(1.2)
        suite.compare(
            f"linear 768x3072 batch {batch}",
            f"fp32 {list(x.shape)}",
            called(quantized(linear, "native"), x),
            called(quantized(linear, "torch.ao"), x),
            target,
        )
    x = normal(32, 768)
    suite.compare(
        "linear with ReLU 768x3072 batch 32",
        f"fp32 {list(x.shape)}",
        called(quantized(fused, "native"), x),
        called(quantized(fused, "torch.ao"), x),
    )
    for batch in (1, 32):
        x = normal(batch, 768)
        suite.compare(
            f"linear of float16 weights 768x3072 batch {batch}",
            f"fp32 {list(x.shape)}",
            called(quantized(linear, "native", torch.float16), x),
            called(quantized(linear, "torch.ao", torch.float16), x),
        )
    for kind in (nn.LSTM, nn.GRU):
        for hidden in (256, 512):
            layer = kind(hidden, hidden)
            for steps, batch in ((1, 1), (16, 1), (64, 1), (1, 16), (16, 16), (64, 16)):
                x = normal(steps, batch, hidden)
                suite.compare(
                    f"{kind.__name__} {hidden}, {steps} steps, batch {batch}",
                    f"fp32 {list(x.shape)}",
                    called(quantized(layer, "native"), x),
                    called(quantized(layer, "torch.ao"), x),
                    at_least(1.2),
                )
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        x = normal(1, 256)
        suite.compare(
            f"{cell.__name__} 256 batch 1",
            f"fp32 {list(x.shape)}",
            called(quantized(cell(256, 256), "native"), x),
            called(quantized(cell(256, 256), "torch.ao"), x),
        )
    _beside_torchao(suite, linear)


def _beside_torchao(suite: Suite, linear: nn.Linear) -> None:
    make = torchao_linear()
    if make is None:
        print("no rows beside torchao: it is not installed (pip install --no-deps torchao)")
        return
    for batch, target in ((1, at_least(8)), (32, None), (128, at_least(2.5))):
        x = normal(batch, 768)
        suite.add(
            f"linear 768x3072 batch {batch}, beside torchao",
            f"fp32 {list(x.shape)}",
            {OURS: called(quantized(linear, "native"), x), "torchao": called(make(linear), x)},
            lambda t: t["torchao"] / t[OURS],
            "x",
            target,
        )


if __name__ == "__main__":
    main(measure)
