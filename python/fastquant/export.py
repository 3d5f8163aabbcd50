"""Export of quantized models by torch.export, as programs that Inductor and other runtimes know.

Not imported by `import fastquant`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ._conversion import checks
from ._conversion.plan import Plan
from ._core.errors import QuantizationError
from ._export.grids import arrange, called_modules
from ._export.reference import Form, References
from .nn import quantized as native
from .nn.quantized.weighted import Weighted
from .quantization_mappings import (
    DEFAULT_STATIC_QUANT_MODULE_MAPPINGS,
    get_default_native_quant_module_mappings,
)
from .quantize import _check_and_convert
from .quantized_tensor import is_quantized
from .utils import check_is_module

__all__ = ["export"]

_FORMS = {
    "inductor": Form(torch.uint8, int8_constants=True, adds_before_rounding=True),
    # XNNPACK has signed integers only, and adds integers to integers.
    "executorch": Form(torch.int8, int8_constants=True, adds_before_rounding=False),
    # OpenVINO takes each quantize for the rounding, and leaves each dequantize out.
    "openvino": Form(torch.uint8, int8_constants=False, adds_before_rounding=True),
}


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
    runtime: str = "inductor",
) -> ExportedProgram:
    """Export a quantized model to ops of aten between quantize and dequantize ops.

    The program has the form that torch's PT2E quantization gives it: int8 weights behind
    `quantized_decomposed.dequantize_per_channel`, floating biases, batch norms folded, and
    `quantize_per_tensor` and `dequantize_per_tensor` between layers. It computes what
    `convert(model, backend="native")` computes, up to rounding, from floating tensors to floating
    tensors, and has no ops of fastquant. `model` is not changed.

    Args:
        model: prepared by `prepare` and calibrated; trained after `prepare_qat`; or converted with
            `backend="native"`.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: as `torch.export.export` takes it.
        strict: likewise.
        runtime: what the program is for: "inductor" (torch.compile and AOTInductor), "executorch"
            (its XNNPACK backend), or "openvino". Programs differ in the dtype of activations, in
            where residual sums are rounded, and in how weights are stored; PyTorch runs any of
            them.

    Raises:
        QuantizationError: `runtime` is unknown; `model` is not quantized, its observers have seen
            no data, or modules in it, which are named, have no static quantized form.
        TypeError: `model` is no module, or an input is a quantized tensor.
    """
    check_is_module("export", model)
    if runtime not in _FORMS:
        raise QuantizationError(
            f"export: runtime must be one of {', '.join(map(repr, _FORMS))}, got {runtime!r}"
        )
    if any(map(is_quantized, (*args, *(kwargs or {}).values()))):
        raise TypeError(
            "export: args and kwargs must be floating tensors, got a quantized one; the program "
            "quantizes them where the model has its QuantStub"
        )
    quantized, unobserved = _native(model)
    references = References(_activation_dtype(quantized), _FORMS[runtime])
    with torch.no_grad():
        program = torch.export.export(
            references.of("", quantized), args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict
        )
    if names := sorted(called_modules(program) & unobserved):
        raise QuantizationError(
            f"export: the observers of these layers have seen no data: {checks.listed(names)}. "
            "Run data through the prepared model first"
        )
    return arrange(program, _FORMS[runtime].adds_before_rounding)


def _native(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A copy of the model with native modules, in eval mode; where observers have seen no data."""
    _require_static(model)
    plan = Plan("export", model, get_default_native_quant_module_mappings(), {})
    if any(map(checks.has_observer, model.modules())):
        quantized = _check_and_convert("export", model, inplace=False, backend="native")
    elif any(isinstance(module, _NATIVE) for module in model.modules()):
        quantized = copy.deepcopy(model)
    else:
        raise QuantizationError(
            "export: the model has neither observers nor quantized modules; prepare it (prepare or "
            "prepare_qat) and run data through it first"
        )
    return quantized.eval(), set(checks.uncalibrated(plan, functionals=True))


# Classes of quantized modules that stand for layers, whatever they are made of.
_NATIVE = (Weighted, native.Quantize, native.QFunctional, native.Embedding)
_OF_TORCH_AO = tuple(
    {*DEFAULT_STATIC_QUANT_MODULE_MAPPINGS.values()}
    - {*get_default_native_quant_module_mappings().values()}
)


def _require_static(model: nn.Module) -> None:
    """Raise where a model has modules that are dynamic, or that torch.ao has quantized."""
    paths = dict(model.named_modules())
    dynamic = [p for p, m in paths.items() if ".quantized.dynamic" in type(m).__module__]
    if dynamic:
        raise QuantizationError(
            f"export: {checks.listed(dynamic)} are quantized dynamically: they choose scales at "
            "each call, and a program has them as constants. Quantize the model statically: "
            "prepare, run data through it, export"
        )
    of_torch_ao = [path for path, module in paths.items() if isinstance(module, _OF_TORCH_AO)]
    if of_torch_ao:
        raise QuantizationError(
            f"export: {checks.listed(of_torch_ao)} are quantized modules of torch.ao. Export the "
            "prepared model, or what convert(model, backend='native') makes of it"
        )


def _activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the integers that the layers of a native model get, as its stubs make them."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, native.Quantize):
            by_dtype.setdefault(module.dtype, []).append(path)
    if len(by_dtype) > 1:
        found = "; ".join(f"{dtype}: {checks.listed(p)}" for dtype, p in by_dtype.items())
        raise QuantizationError(
            f"export: the model has activations of several dtypes, a program has one ({found})"
        )
    return next(iter(by_dtype), torch.uint8)
