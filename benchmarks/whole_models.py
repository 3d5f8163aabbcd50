"""What do calibration, QAT and convert cost on whole models, compared with the float model?

    python benchmarks/whole_models.py

torchvision's quantizable MobileNetV2 and ResNet-18, batch 8 at 224 x 224, the x86 qconfigs.
Needs torchvision; `pip install --no-deps torchvision` is enough. Under autocast, QAT is compared
with float training under autocast: torch.ao's fused fake-quantize refuses bf16 on the CPU.
"""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import fastquant
from fastquant import bench
from harness import (
    OURS,
    THEIRS,
    Case,
    Rounds,
    Suite,
    Target,
    at_least,
    at_most,
    main,
    normal,
)
from memory import CLEAR_REFS, RESET_PEAK, resident

BATCH = (8, 3, 224, 224)
# A call takes up to seconds.
MOST_ROUNDS = 7

# Time, or memory, beyond the float model's, as a fraction of it. Below 0 is less than float.
TARGETS: dict[str, dict[str, Target | None]] = {
    "mobilenet_v2": {
        "calibrate": at_most(0.15),
        "qat": at_most(-0.20),
        "autocast": at_most(0),
        "off": at_most(-0.15),
        "evaluation": at_most(0),
        "memory": at_most(0.03),
    },
    "resnet18": {
        "calibrate": at_most(0.06),
        "qat": at_most(-0.03),
        "autocast": at_most(0),
        "off": None,
        "evaluation": at_most(0),
        "memory": at_most(0.03),
    },
}
WHAT = {"calibrate": "calibration forward", "qat": "QAT step"}
CONVERT = {"calibrate": "convert", "qat": "convert after QAT"}


def overheads(suite: Suite, name: str, mode: str, model: nn.Module) -> None:
    """Both libraries' prepared models against the float model, and their observers alone."""
    rounds = min(suite.rounds, MOST_ROUNDS)
    report = bench.run(model, normal(*BATCH), mode=mode, rounds=rounds, progress=False)
    if not report.same_ranges:
        raise SystemExit(report.table())
    add = suite.add_rounds
    work, batch, target = f"{name}: {WHAT[mode]}", str(list(BATCH)), TARGETS[name][mode]
    whole = Rounds(report.seconds, report.undisturbed)
    add(f"{work} over float", batch, whole, lambda t: t[OURS] / t["float"] - 1, "more", target)
    add(f"{work}, torch.ao's", batch, whole, lambda t: t[THEIRS] / t["float"] - 1, "more")
    total = {
        side: [math.fsum(layer.seconds[side].median for layer in report.layers)]
        for side in (OURS, THEIRS)
    }
    add(f"{work}, its observers alone", batch, Rounds(total, 1), lambda t: t[THEIRS] / t[OURS], "x")


def prepared_qat(ns: Any, model: nn.Module) -> nn.Module:
    """A copy, prepared for QAT by one of the libraries."""
    prepared: Any = bench.fused(model.train(), "qat")
    prepared.qconfig = ns.get_default_qat_qconfig("x86")
    result: nn.Module = ns.prepare_qat(prepared, inplace=True)
    return result


def qat_step(suite: Suite, name: str, what: str, key: str, models: dict[str, nn.Module]) -> None:
    """A training step of fastquant's prepared model over the float model's."""
    suite.add(
        f"{name}: QAT step, {what}",
        str(list(BATCH)),
        {side: Case(bench.Step(model, normal(*BATCH), "qat")) for side, model in models.items()},
        lambda t: t[OURS] / t["float"] - 1,
        "more",
        TARGETS[name][key],
        most_rounds=MOST_ROUNDS,
    )


def switched_off(suite: Suite, name: str, model: nn.Module) -> None:
    """What a QAT step costs beyond float when all fake-quantizers are off: the modules alone."""
    prepared = prepared_qat(fastquant, model)
    prepared.apply(fastquant.disable_fake_quant).apply(fastquant.disable_observer)
    qat_step(suite, name, "fake-quantizers off", "off", {"float": model, OURS: prepared})


class Autocast(nn.Module):
    """A model whose forward runs under autocast to bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.model(x)
        return result


def autocast(suite: Suite, name: str, model: nn.Module) -> None:
    models = {"float": Autocast(model), OURS: Autocast(prepared_qat(fastquant, model))}
    qat_step(suite, name, "bf16 autocast", "autocast", models)


def evaluation(suite: Suite, name: str, model: nn.Module) -> None:
    """A forward of the QAT model in evaluation, as after each epoch, over the float model's."""
    prepared = prepared_qat(fastquant, model)
    x = normal(*BATCH)
    bench.Step(prepared, x, "qat")()  # its ranges

    def forward(evaluated: nn.Module) -> None:
        with torch.no_grad():
            evaluated(x)

    models = {"float": copy.deepcopy(model), OURS: prepared}
    suite.add(
        f"{name}: QAT model in evaluation",
        str(list(BATCH)),
        {side: Case(functools.partial(forward, each.eval())) for side, each in models.items()},
        lambda t: t[OURS] / t["float"] - 1,
        "more",
        TARGETS[name]["evaluation"],
        most_rounds=MOST_ROUNDS,
    )


# The first step allocates what later ones reuse. The peak then differs from step to step by several
# percent, with how malloc has cut up its memory.
_FIRST_STEPS, _PEAKS = 1, 7


def peak_kib(name: str, side: str, threads: int) -> float:
    """Peak KiB of a training step beyond what the process held before it made the model."""
    warnings.simplefilter("ignore")  # torch.ao's, in a process that does not have our filters
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    model = bench.torchvision_model(name).train()
    if side != "float":
        model = prepared_qat({OURS: fastquant, THEIRS: torch_ao}[side], model)
    step = bench.Step(model, normal(*BATCH), "qat")
    peaks = []
    for _ in range(_FIRST_STEPS + _PEAKS):
        CLEAR_REFS.write_text(RESET_PEAK)
        step()
        peaks.append(resident("VmHWM") - before)
    return statistics.median(peaks[_FIRST_STEPS:])


def memory(suite: Suite, name: str) -> None:
    """What a training step needs at its peak; each model in a process of its own."""
    if not CLEAR_REFS.exists():
        return
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for side in ("float", OURS, THEIRS):
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            peaks[side] = fresh.submit(peak_kib, name, side, suite.threads).result()
    work, batch = f"{name}: peak memory of a QAT step", str(list(BATCH))
    ours, theirs = (peaks[side] / peaks["float"] - 1 for side in (OURS, THEIRS))
    suite.add_value(f"{work} over float", batch, ours, "more", TARGETS[name]["memory"])
    suite.add_value(f"{work}, torch.ao's", batch, theirs, "more")


def convert(suite: Suite, name: str, mode: str, model: nn.Module) -> None:
    runs = []
    for ns in (fastquant, torch_ao):
        if mode == "qat":
            prepared: Any = prepared_qat(ns, model)
            bench.Step(prepared, normal(2, *BATCH[1:]), "qat")()
        else:
            prepared = bench.fused(model.eval(), mode)
            prepared.qconfig = ns.get_default_qconfig("x86")
            ns.prepare(prepared, inplace=True)
            with torch.no_grad():
                prepared(normal(1, *BATCH[1:]))
        runs.append(functools.partial(ns.convert, prepared.eval()))
    ours, theirs = runs
    suite.compare(f"{name}: {CONVERT[mode]}", "x86 qconfig", ours, theirs, at_least(3), MOST_ROUNDS)


def measure(suite: Suite) -> None:
    for name in TARGETS:
        try:
            model = bench.torchvision_model(name)
        except ImportError as error:
            raise SystemExit(f"whole_models.py: {error}") from None
        for mode in WHAT:
            overheads(suite, name, mode, model)
            convert(suite, name, mode, model)
        model.train()
        switched_off(suite, name, model)
        autocast(suite, name, model)
        evaluation(suite, name, model)
        memory(suite, name)


if __name__ == "__main__":
    main(measure)
