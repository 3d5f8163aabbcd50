"""Exported int8 models in onnxruntime: how fast are they beside float there, and native int8?

    python benchmarks/onnx_models.py [--threads 1,2]

ResNet-18 and MobileNetV2 of torchvision, calibrated (PTQ) and trained for some steps (QAT), are
exported by fastquant.onnx.export and run by onnxruntime, beside the float model that torch.onnx
exports and the native int8 model. Needs torchvision, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastquant
from fastquant import bench
from harness import OURS, Suite, at_least, at_most, main, normal

MODELS = ("resnet18", "mobilenet_v2")
OVER_FLOAT, OF_NATIVE = 1.0, 1.3
MOST_ROUNDS = 15
FLOAT, NATIVE = "float in onnxruntime", "native int8"


def prepared(name: str, kind: str) -> tuple[nn.Module, nn.Module]:
    """The fused float model, and one that has been calibrated or trained for some steps."""
    torch.manual_seed(0)
    model: Any = bench.torchvision_model(name)
    float_model = bench.fused(bench.torchvision_model(name).eval(), "calibrate")
    if kind == "PTQ":
        model = bench.fused(model.eval(), "calibrate")
        model.qconfig = fastquant.get_default_qconfig("native")
        model = fastquant.prepare(model)
    else:
        model = bench.fused(model.train(), "qat")
        model.qconfig = fastquant.get_default_qat_qconfig("x86")
        model = fastquant.prepare_qat(model)
    with torch.no_grad():
        for _ in range(3):
            model(normal(2, 3, 224, 224))
    return float_model, model.eval()


def in_onnxruntime(program: Any, x: Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)


def cases(name: str, kind: str, threads: int) -> dict[str, Callable[[], object]]:
    """The exported model, the exported float model, and the native one, of a batch of 1."""
    import fastquant.onnx as to_onnx

    x = normal(1, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_model, model = prepared(name, kind)
        native = fastquant.convert(model, backend="native")
        float_program = torch.onnx.export(float_model, (x,), verbose=False)
        program = to_onnx.export(model, (x,), verbose=False)

    @torch.no_grad()
    def run_native() -> None:
        native(x)

    return {
        OURS: in_onnxruntime(program, x, threads),
        FLOAT: in_onnxruntime(float_program, x, threads),
        NATIVE: run_native,
    }


def measure(suite: Suite) -> None:
    for name in MODELS:
        for kind in ("PTQ", "QAT"):
            try:
                timed = cases(name, kind, suite.threads)
            except ImportError as error:
                raise SystemExit(f"onnx_models.py: {error}") from None
            work, shape = f"{name}, {kind}, in onnxruntime", "[1, 3, 224, 224]"
            suite.add(
                *(f"{work}: over float there", shape, timed),
                *(lambda t: t[FLOAT] / t[OURS], "x", at_least(OVER_FLOAT), MOST_ROUNDS),
            )
            suite.add(
                *(f"{work}: time over native int8", shape, timed),
                *(lambda t: t[OURS] / t[NATIVE], "x", at_most(OF_NATIVE), MOST_ROUNDS),
            )


if __name__ == "__main__":
    main(measure)
