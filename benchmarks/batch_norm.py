"""How fast are batch norm + ReLU + fake-quantize, and add + ReLU + fake-quantize, as one op?

    python benchmarks/batch_norm.py

Forward and backward, in training: the op that QAT modules use, compared with the same work by
single modules (of torch.ao, of fastquant, and in float, which has no fake-quantize), and with the
reads and writes of memory that no implementation can do without:

- Batch norm. Forward reads x for its statistics and range, then reads it again, because scale and
  zero point depend on all of it, and writes y. Backward reads x and the gradient and writes the
  gradient of x; a channel stays in the cache between its sums and its gradients.
- Add. Forward reads a and b for the range of their sum, reads them again, and writes y. Backward
  reads the gradient and writes that of a and b, which is the same.

These reads and writes are a case of their own, measured in the same rounds: `torch.sum`,
`Tensor.copy_` and `torch.add`, on as many tensors as the op has, of the same size, one after the
other, into memory written before. So they find as much of their tensors in the caches as the op
does: what the cases before have left there. A read repeated alone would find all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor
from torch.nn import functional as F

import fastquant
from fastquant._native import routes
from fastquant.nn.qat.plain import settings_per_tensor
from harness import (
    OURS,
    THEIRS,
    Case,
    Rounds,
    Suite,
    Target,
    Value,
    at_least,
    at_most,
    describe,
    main,
    normal,
    time_rounds,
)

# Activations of MobileNetV2 and ResNet-18, batch 8 at 224 x 224. The first has targets, and is
# measured in bf16, too.
TARGET_SHAPE = (8, 144, 56, 56)
SHAPES = (TARGET_SHAPE, (8, 96, 112, 112), (8, 32, 112, 112), (8, 192, 28, 28))
SUMS = ((8, 64, 56, 56), (8, 256, 14, 14))
MOST_ROUNDS = 15
MOMENTUM, EPS = 0.1, 1e-5
RELU = (0.0, math.inf)

MODULES, FLOAT, MEMORY = "modules", "float", "memory"
Run = Callable[..., Tensor]


def fake_quantizer(ns: Any) -> Any:
    """As the x86 qconfig has it for activations."""
    return ns.get_default_qat_qconfig("x86").activation()


def one_op(module: Any) -> Any:
    """What an op takes in the place of a call of this fake-quantizer."""
    settings = settings_per_tensor(module)
    assert settings is not None
    return settings


def batch_norms(channels: int) -> tuple[list[Tensor], dict[str, Run]]:
    """Weight and bias, and functions of x, weight and bias that do the work."""
    mean, var = torch.zeros(channels), torch.ones(channels)
    ours, alone, theirs = (fake_quantizer(ns) for ns in (fastquant, fastquant, torch_ao))

    def in_float(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS))

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (mean, var, True, MOMENTUM, EPS)
        return routes.batch_norm_observe_fake_quantize(
            x, weight, bias, *statistics, *RELU, one_op(ours)
        )

    return [torch.rand(channels) + 0.5, torch.randn(channels) * 0.1], {
        OURS: fused,
        MODULES: lambda *args: alone(in_float(*args)),
        FLOAT: in_float,
        THEIRS: lambda *args: theirs(in_float(*args)),
    }


def sums() -> dict[str, Run]:
    """Functions of a and b that do the work."""
    ours, alone, theirs = (fake_quantizer(ns) for ns in (fastquant, fastquant, torch_ao))

    def in_float(a: Tensor, b: Tensor) -> Tensor:
        return F.relu(a + b)

    return {
        OURS: lambda a, b: routes.add_observe_fake_quantize(a, b, *RELU, one_op(ours)),
        MODULES: lambda *args: alone(in_float(*args)),
        FLOAT: in_float,
        THEIRS: lambda *args: theirs(in_float(*args)),
    }


def forward_backward(run: Run, *inputs: Tensor) -> Case | None:
    """None where torch.ao refuses the tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradient = torch.ones_like(inputs[0])

    def step() -> None:
        torch.autograd.grad(run(*leaves), leaves, gradient)

    try:
        step()
    except RuntimeError:
        return None
    return Case(step)


def batch_norm_memory(x: Tensor, grad: Tensor, y: Tensor, grad_x: Tensor) -> None:
    """The reads and writes of batch norm, forward and backward."""
    x.sum()
    y.copy_(x)
    torch.add(x, grad, out=grad_x)


def sum_memory(a: Tensor, b: Tensor, grad: Tensor, y: Tensor, grad_a: Tensor) -> None:
    """The reads and writes of a sum, forward and backward."""
    a.sum()
    b.sum()
    torch.add(a, b, out=y)
    grad_a.copy_(grad)


def memory_case(traffic: Callable[..., None], x: Tensor) -> Case:
    """The reads and writes on fp32 tensors of as many bytes as x."""
    tensors = [normal(x.nbytes // 4) for _ in signature(traffic).parameters]
    return Case(lambda: traffic(*tensors))


def add_rows(
    suite: Suite, work: str, runs: dict[str, Run], traffic: Callable[..., None], *inputs: Tensor
) -> None:
    """Time all ways of doing the work in the same rounds, and add a row for each comparison."""
    x = inputs[0]
    found = {name: forward_backward(run, *inputs) for name, run in runs.items()}
    cases = {name: case for name, case in found.items() if case is not None}
    cases[MEMORY] = memory_case(traffic, x)
    timed = time_rounds(cases, min(suite.rounds, MOST_ROUNDS), patience=suite.patience)

    def add(what: str, others: tuple[str, ...], value: Value, unit: str, target: Target) -> None:
        if not timed.seconds.keys() >= set(others):
            return
        seconds = {name: timed.seconds[name] for name in (OURS, *others)}
        rounds = Rounds(seconds, timed.undisturbed)
        aimed = target if x.shape == TARGET_SHAPE else None
        suite.add_rounds(f"{work}{what}", describe(x), rounds, value, unit, aimed)

    for other, what, target in (
        (THEIRS, "", at_least(3.5)),
        (MODULES, ", against modules", at_least(3.5)),
        (FLOAT, ", against float", at_least(1)),
    ):
        add(what, (other,), lambda t, other=other: t[other] / t[OURS], "x", target)

    add(", against memory", (MEMORY,), lambda t: t[OURS] / t[MEMORY], "of limit", at_most(1.5))


def inputs_like(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    layouts = (torch.contiguous_format, torch.channels_last)
    return [x.to(dtype, memory_format=layout) for dtype in dtypes for layout in layouts]


def measure(suite: Suite) -> None:
    for shape in SHAPES:
        dtypes = (torch.float32, torch.bfloat16)[: 2 if shape == TARGET_SHAPE else 1]
        for x in inputs_like(normal(*shape), dtypes):
            parameters, runs = batch_norms(shape[1])
            add_rows(
                suite, "batch norm + ReLU + fake-quantize", runs, batch_norm_memory, x, *parameters
            )
    for shape in SUMS:
        for x in inputs_like(normal(*shape), (torch.float32,)):
            add_rows(suite, "add + ReLU + fake-quantize", sums(), sum_memory, x, x.flip(0))


if __name__ == "__main__":
    main(measure)
