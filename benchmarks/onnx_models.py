"""Exported int8 models in onnxruntime: how fast are they beside float there, and native int8?

    python benchmarks/onnx_models.py [--threads 1,2]

ResNet-18 and MobileNetV2 of torchvision, calibrated (PTQ) and trained for some steps (QAT), are
exported by fastquant.onnx.export and run by onnxruntime, beside the float model that torch.onnx
exports and the native int8 model. Needs torchvision, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastquant
from fastquant import bench
from harness import OURS, Case, Suite, at_least, at_most, main, normal, time_rounds

MODELS = ("resnet18", "mobilenet_v2")
KINDS = ("PTQ", "QAT")
SHAPE = (1, 3, 224, 224)
OVER_FLOAT, OF_NATIVE = 1.0, 1.3
FLOAT, NATIVE = "float in onnxruntime", "native int8"
WORDS = {OURS: "int8 in onnxruntime", FLOAT: FLOAT, NATIVE: NATIVE}


def fused_float(name: str) -> nn.Module:
    torch.manual_seed(0)
    return bench.fused(bench.torchvision_model(name).eval(), "calibrate")


def prepared(name: str, kind: str) -> nn.Module:
    """A model that has been calibrated, or trained for some steps."""
    if kind == "PTQ":
        model: Any = fused_float(name)
        model.qconfig = fastquant.get_default_qconfig("native")
        model = fastquant.prepare(model)
    else:
        torch.manual_seed(0)
        model = bench.fused(bench.torchvision_model(name).train(), "qat")
        model.qconfig = fastquant.get_default_qat_qconfig("x86")
        model = fastquant.prepare_qat(model)
    with torch.no_grad():
        for _ in range(3):
            model(normal(2, *SHAPE[1:]))
    result: nn.Module = model.eval()
    return result


# Exporting takes longer than timing, and does not depend on the number of threads.
@functools.cache
def exported_float(name: str) -> bytes:
    program: Any = torch.onnx.export(fused_float(name), (normal(*SHAPE),), verbose=False)
    data: bytes = program.model_proto.SerializeToString()
    return data


@functools.cache
def exported_and_native(name: str, kind: str) -> tuple[bytes, nn.Module]:
    import fastquant.onnx

    model = prepared(name, kind)
    program = fastquant.onnx.export(model, (normal(*SHAPE),), verbose=False)
    return program.model_proto.SerializeToString(), fastquant.convert(model, backend="native")


def in_onnxruntime(model: bytes, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Within a call its threads wait as they do by default; after it they take no time from others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: normal(*SHAPE).numpy()}
    return lambda: session.run(None, inputs)


def with_threads_of_its_own(run: Callable[[], object], threads: int) -> Case:
    """A case that is timed once no other runtime's threads run, and its own have a core each."""

    def until_then() -> None:
        if threads > 1:
            # The others' threads spin for some milliseconds after a call. Its own share a core when
            # they wake up, until the system moves one of them.
            time.sleep(0.02)
            end = time.perf_counter() + 0.03
            while time.perf_counter() < end:
                run()

    return Case(run, until_then)


def cases(name: str, kind: str, threads: int) -> dict[str, Case]:
    """The exported model, the exported float model, and the native one, of a batch of 1."""
    x = normal(*SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, native = exported_and_native(name, kind)
        float_model = exported_float(name)

    @torch.no_grad()
    def run_native() -> None:
        native(x)

    runs = {
        OURS: in_onnxruntime(exported, threads),
        FLOAT: in_onnxruntime(float_model, threads),
        NATIVE: run_native,
    }
    return {case: with_threads_of_its_own(run, threads) for case, run in runs.items()}


def measure(suite: Suite) -> None:
    for name in MODELS:
        for kind in KINDS:
            try:
                timed_cases = cases(name, kind, suite.threads)
            except ImportError as error:
                raise SystemExit(f"onnx_models.py: {error}") from None
            timed = time_rounds(timed_cases, suite.rounds, patience=suite.patience)
            model, shape = f"{name}, {kind}", str(list(SHAPE))
            for case, words in WORDS.items():
                suite.add_rounds(
                    f"{model}: {words}", shape, timed, lambda t, case=case: t[case] * 1e6, "µs"
                )
            for work, value, target in (
                ("over float there", lambda t: t[FLOAT] / t[OURS], at_least(OVER_FLOAT)),
                ("time over native", lambda t: t[OURS] / t[NATIVE], at_most(OF_NATIVE)),
            ):
                suite.add_rounds(
                    f"{model}, in onnxruntime: {work}", shape, timed, value, "x", target
                )


if __name__ == "__main__":
    main(measure)
