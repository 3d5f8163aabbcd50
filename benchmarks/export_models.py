"""Exported int8 models in the runtimes that take torch.export's programs: how fast are they?

    python benchmarks/export_models.py [--threads 1,2]

ResNet-18 and MobileNetV2 of torchvision, calibrated and exported by fastquant.export.export, run by
AOTInductor, OpenVINO and ExecuTorch's XNNPACK, beside the float model in the same runtime and the
native int8 model. Programs of trained models consist of the same operations. Needs torchvision;
runtimes that are not installed are left out. Compiling takes minutes.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastquant
import fastquant.export
from harness import OURS, Case, Suite, main, normal, time_rounds
from onnx_models import SHAPE, fused_float, prepared, with_threads_of_its_own

MODELS = ("resnet18", "mobilenet_v2")
FLOAT, NATIVE = "float", "native int8"

Run = Callable[[Tensor], object]


def in_inductor(program: Any, threads: int) -> Run:
    """What AOTInductor makes of a program; it runs with torch's threads."""
    run: Run = torch._inductor.aoti_load_package(compiled_by_inductor(program))
    return run


@functools.cache
def compiled_by_inductor(program: Any) -> str:
    with torch._inductor.config.patch(freezing=True):
        return torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(tempfile.mkdtemp()) / "model.pt2")
        )


def in_openvino(program: Any, threads: int) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(
        openvino.convert_model(program),
        "CPU",
        {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
    )
    request = compiled.create_infer_request()
    return lambda x: request.infer([x.numpy()])


def in_executorch(program: Any, threads: int) -> Run:
    from executorch.extension.pybindings import portable_lib

    buffer = lowered_to_xnnpack(program)
    module = portable_lib._load_for_executorch_from_buffer(buffer)
    portable_lib._unsafe_reset_threadpool(threads)
    return lambda x: module.run_method("forward", [x])


@functools.cache
def lowered_to_xnnpack(program: Any) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    buffer: bytes = lowered.to_executorch().buffer
    return buffer


# By the name that fastquant.export knows a runtime by: what it is called, and how to run in it.
RUNTIMES: dict[str, tuple[str, Callable[[Any, int], Run]]] = {
    "inductor": ("AOTInductor", in_inductor),
    "openvino": ("OpenVINO", in_openvino),
    "executorch": ("ExecuTorch", in_executorch),
}


def is_installed(runtime: str) -> bool:
    return runtime == "inductor" or importlib.util.find_spec(runtime) is not None


@functools.cache
def native_and_prepared(name: str) -> tuple[nn.Module, nn.Module]:
    model = prepared(name, "PTQ")
    return fastquant.convert(model, backend="native"), model


@functools.cache
def programs(name: str, runtime: Any) -> dict[str, Any]:
    """The int8 program in the runtime's form, and the float model's."""
    x = normal(*SHAPE)
    _, model = native_and_prepared(name)
    return {
        OURS: fastquant.export.export(model, (x,), runtime=runtime),
        FLOAT: torch.export.export(fused_float(name), (x,)),
    }


def cases(name: str, runtime: str, threads: int) -> dict[str, Case]:
    x = normal(*SHAPE)
    run_by = RUNTIMES[runtime][1]
    native, _ = native_and_prepared(name)
    runs: dict[str, Run] = {
        **{case: run_by(program, threads) for case, program in programs(name, runtime).items()},
        NATIVE: native,
    }

    @torch.no_grad()
    def once(run: Run) -> None:
        run(x)

    return {
        case: with_threads_of_its_own(functools.partial(once, run), threads)
        for case, run in runs.items()
    }


def measure(suite: Suite) -> None:
    for name in MODELS:
        for runtime, (words, _) in RUNTIMES.items():
            if not is_installed(runtime):
                print(f"{name}, {words}: left out, it is not installed")
                continue
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                timed_cases = cases(name, runtime, suite.threads)
            timed = time_rounds(timed_cases, suite.rounds, patience=suite.patience)
            shape = str(list(SHAPE))
            for case, work in ((OURS, "int8"), (FLOAT, FLOAT), (NATIVE, NATIVE)):
                suite.add_rounds(
                    f"{name}, {words}: {work}",
                    shape,
                    timed,
                    lambda t, case=case: t[case] * 1e6,
                    "µs",
                )


if __name__ == "__main__":
    main(measure)
