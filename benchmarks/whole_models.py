"""What do calibration, QAT and convert cost on whole models, compared with the float model?

    python benchmarks/whole_models.py

torchvision's quantizable MobileNetV2 and ResNet-18, batch 8 at 224 x 224, the x86 qconfigs.
Needs torchvision; `pip install --no-deps torchvision` is enough.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import nn

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

BATCH = (8, 3, 224, 224)
# A call takes up to seconds.
MOST_ROUNDS = 7

# Time beyond the float model's, as a fraction of it.
TARGETS: dict[str, dict[str, Target | None]] = {
    "mobilenet_v2": {"calibrate": at_most(0.30), "qat": at_most(0.25)},
    "resnet18": {"calibrate": at_most(0.06), "qat": None},
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


def qat_modules(suite: Suite, name: str, model: nn.Module) -> None:
    """What a QAT step costs beyond float when all fake-quantizers are off: the modules alone."""
    prepared: Any = bench.fused(model, "qat")
    prepared.qconfig = fastquant.get_default_qat_qconfig("x86")
    fastquant.prepare_qat(prepared, inplace=True)
    prepared.apply(fastquant.disable_fake_quant)
    prepared.apply(fastquant.disable_observer)
    cases = {
        key: Case(bench.Step(module.train(), normal(*BATCH), "qat"))
        for key, module in (("float", model), (OURS, prepared))
    }
    suite.add(
        f"{name}: QAT step, fake-quantizers off",
        str(list(BATCH)),
        cases,
        lambda t: t[OURS] / t["float"] - 1,
        "more",
        most_rounds=MOST_ROUNDS,
    )


def convert(suite: Suite, name: str, mode: str, model: nn.Module) -> None:
    runs = []
    for ns in (fastquant, torch_ao):
        prepared = bench.fused(model.train(mode == "qat"), mode)
        if mode == "qat":
            prepared.qconfig = ns.get_default_qat_qconfig("x86")
            ns.prepare_qat(prepared, inplace=True)
            bench.Step(prepared, normal(2, *BATCH[1:]), "qat")()
        else:
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
        qat_modules(suite, name, model)


if __name__ == "__main__":
    main(measure)
