"""Whole int8 models: how many times as fast as torch.ao's is a model of native modules?

    python benchmarks/int8_models.py [--threads 1,2]

torchvision's quantizable models, calibrated once with the x86 qconfig and converted to native
modules and to torch.ao's, which run on its x86 engine; also torch.ao's model traced and frozen by
torch.jit, the float model, memory, and convert. Needs torchvision; `pip install --no-deps
torchvision` is enough.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import fastquant
from fastquant import bench
from harness import OURS, THEIRS, Case, Suite, Target, at_least, at_most, main, normal
from memory import STATUS, resident

SIZES = {"inception_v3": 299}
# By model and batch, what is wanted of one thread and of two, over torch.ao's model.
TARGETS = {
    ("mobilenet_v2", 1): (1.6, 1.6),
    ("mobilenet_v2", 8): (1.25, 1.4),
    ("resnet18", 1): (1.2, 1.25),
    ("resnet18", 8): (1.05, 1.05),
    **{
        (name, 1): (1.3, 1.3)
        for name in ("mobilenet_v3_large", "shufflenet_v2_x1_0", "googlenet", "inception_v3")
    },
}
OVER_FLOAT, OVER_TRACED, OF_CONVERT, OF_MEMORY = 4.5, 1.0, 2.0, 0.02
# A call takes up to a second.
MOST_ROUNDS = 15


def prepared(ns: Any, name: str) -> nn.Module:
    """The fused float model, prepared by one of the libraries and calibrated."""
    model: Any = bench.fused(bench.torchvision_model(name).eval(), "calibrate")
    model.qconfig = ns.get_default_qconfig("x86")
    ns.prepare(model, inplace=True)
    with torch.no_grad():
        model(image(name, 2))
    return model  # type: ignore[no-any-return]


def image(name: str, batch: int) -> Tensor:
    size = SIZES.get(name, 224)
    return normal(batch, 3, size, size)


def converted(name: str) -> dict[str, nn.Module]:
    model = prepared(fastquant, name)
    return {
        OURS: fastquant.convert(model, backend="native"),
        THEIRS: fastquant.convert(model),
    }


def forward(model: Callable[[Tensor], object], x: Tensor) -> Case:
    @torch.no_grad()
    def run() -> None:
        model(x)

    return Case(run)


def over_torch_ao(suite: Suite, name: str, batch: int, models: dict[str, nn.Module]) -> None:
    x = image(name, batch)
    wanted = TARGETS[name, batch]
    target = at_least(wanted[suite.threads - 1]) if suite.threads <= len(wanted) else None
    ours, theirs = (forward(models[side], x) for side in (OURS, THEIRS))
    suite.compare(f"{name}, int8", str(list(x.shape)), ours, theirs, target, MOST_ROUNDS)


def over(
    suite: Suite, name: str, what: str, ours: nn.Module, other: Any, target: Target | None
) -> None:
    """A row over something other than torch.ao's model, batch 1."""
    x = image(name, 1)
    suite.add(
        f"{name}, int8 over {what}",
        str(list(x.shape)),
        {OURS: forward(ours, x), what: forward(other, x)},
        lambda t: t[what] / t[OURS],
        "x",
        target,
        MOST_ROUNDS,
    )


def traced(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(model, x).eval())
        for _ in range(3):  # torch.jit optimizes in the first calls
            frozen(x)
    return frozen


def held_kib(name: str, side: str, threads: int) -> float:
    """KiB that a process holds after the first forward, beyond what it held before the model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    warm = bench.small_cnn()  # what the libraries themselves load does not count
    with torch.no_grad():
        fastquant.convert(fastquant.prepare(warm.eval()))(normal(1, 3, 32, 32))
    before = resident("VmRSS")
    model = prepared(fastquant, name)
    model = fastquant.convert(model, backend="native" if side == OURS else "torch.ao")
    with torch.no_grad():
        model(image(name, 1))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS") - before


def memory(suite: Suite, name: str) -> None:
    """What a converted model holds; each in a process of its own."""
    if not STATUS.exists():
        return
    spawn = multiprocessing.get_context("spawn")
    held = {}
    for side in (OURS, THEIRS):
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            held[side] = fresh.submit(held_kib, name, side, suite.threads).result()
    more = held[OURS] / held[THEIRS] - 1
    work = f"{name}, int8: memory over torch.ao's"
    suite.add_value(work, str(list(image(name, 1).shape)), more, "more", at_most(OF_MEMORY))


def convert(suite: Suite, name: str) -> None:
    ours = functools.partial(fastquant.convert, prepared(fastquant, name), backend="native")
    theirs = functools.partial(torch_ao.convert, prepared(torch_ao, name))
    target = at_least(OF_CONVERT)
    suite.compare(f"{name}: convert to int8", "x86 qconfig", ours, theirs, target, MOST_ROUNDS)


def measure(suite: Suite) -> None:
    for name in dict.fromkeys(name for name, _ in TARGETS):
        try:
            models = converted(name)
        except ImportError as error:
            raise SystemExit(f"int8_models.py: {error}") from None
        for batch in (batch for model, batch in TARGETS if model == name):
            over_torch_ao(suite, name, batch, models)
        if (name, 8) not in TARGETS:
            continue
        float_model = bench.fused(bench.torchvision_model(name).eval(), "calibrate")
        target = at_least(OVER_FLOAT) if suite.threads == 1 else None
        over(suite, name, "float", models[OURS], float_model, target)
        frozen = traced(models[THEIRS], image(name, 1))
        over(suite, name, "torch.ao traced", models[OURS], frozen, at_least(OVER_TRACED))
        convert(suite, name)
        memory(suite, name)


if __name__ == "__main__":
    main(measure)
