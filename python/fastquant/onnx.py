"""Export of quantized models to ONNX, as QuantizeLinear and DequantizeLinear.

Needs `pip install onnx onnxscript`. Not imported by `import fastquant`. docs/onnx.md says what
becomes of a model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from ._core.errors import QuantizationError
from ._onnx.grids import Grid
from ._onnx.lowering import FUNCTION, lowered, raise_named
from ._onnx.models import exportable, is_native, require_no_torch_ao_modules
from ._onnx.storage import store_four_bits
from ._torch.exporting import INT16_OPSET
from ._torch.private import tree_leaves
from .nn.quantized.float_layer import mapped
from .quantized_tensor import is_quantized
from .utils import check_is_module

__all__ = ["export"]

# The first opset whose QuantizeLinear and DequantizeLinear have an axis.
_MINIMUM_OPSET = 13


def export(
    model: nn.Module, args: tuple[Any, ...] | Tensor = (), f: Any = None, **options: Any
) -> Any:
    """Export a quantized model to ONNX, as runtimes take it for their integer kernels.

    A prepared model, calibrated or trained, is exported as `convert` with `backend="native"`
    makes it: with its int8 weights, batch norms folded in, int32 biases, and the scales and zero
    points of its observers. Results differ from those of the converted model by one step at
    most, where a number lies on the border between two. A converted native model is exported as
    it is.

    A prepared model is exported in floating point between QuantizeLinear and DequantizeLinear
    where it has no native form as a whole: with activations of 16 bits, with fake-quantizers that
    are switched off, and with `dynamo=False`. So are fake-quantizers that belong to no layer.
    Observers that belong to no layer become nothing. `model` itself is not changed.

    Args:
        model: from `prepare`, `prepare_qat` or `convert(backend="native")`, or any module with
            fake-quantizers, after it has seen data.
        args: example inputs.
        f: file to write.
        options: those of `torch.onnx.export`, such as `dynamic_shapes`, `input_names`,
            `opset_version` (13 or newer; from 21 on, integers of four bits are stored as int4 and
            uint4), and `dynamo=False` for its older exporter, which takes no converted models.

    Returns:
        The `torch.onnx.ONNXProgram`; None with `dynamo=False`.

    Raises:
        QuantizationError: the model has nothing that quantizes, an observer has seen no data, a
            range of integers has no ONNX dtype in this opset, an op no ONNX form, or the model is
            one of torch.ao's quantized modules; what it is about is named.
        ImportError: onnx or onnxscript are not installed.
    """
    check_is_module(FUNCTION, model)
    opset = options.get("opset_version")
    _require_onnx()
    if opset is not None:
        _check_opset(opset)
    require_no_torch_ao_modules(model)
    args, options["kwargs"] = _arguments(args, options.get("kwargs"))
    dynamo = options.setdefault("dynamo", True)
    model = exportable(copy.deepcopy(model).eval().cpu(), opset, dynamo)
    if opset is None and any(_has_16_bits(module) for module in model.modules()):
        options["opset_version"] = INT16_OPSET
    if not dynamo:
        torch.onnx.export(model, args, f, **options)
        return None
    if is_native(model):
        model = _lowered(model, args, options)
    to_file = {name: options.pop(name) for name in _OF_FILES if name in options}
    try:
        program: Any = torch.onnx.export(model, args, **options)
    except Exception as error:
        raise_named(error, model)
        raise
    _require_opset(program, options.get("opset_version"))
    store_four_bits(program)
    _save(program, f, **to_file)
    return program


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx and onnxscript ({error}): pip install onnx onnxscript"
        ) from error


def _check_opset(opset: Any) -> None:
    from onnx.defs import onnx_opset_version

    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset_version must be an int, got {opset!r}")
    if opset < _MINIMUM_OPSET:
        raise ValueError(f"opset_version must be at least {_MINIMUM_OPSET}, got {opset}")
    if opset > onnx_opset_version():
        raise ValueError(
            f"opset_version must be at most {onnx_opset_version()}, the newest of the installed "
            f"onnx, got {opset}"
        )


def _require_opset(program: Any, opset: int | None) -> None:
    """Raise if torch wrote another opset than it was asked for, of which it only warns."""
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise QuantizationError(
            f"{FUNCTION}: opset_version={opset}: an op of this model has no form there that torch "
            f"could convert it to; pass opset_version={written} or a newer one"
        )


def _arguments(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], Any]:
    """Positional and keyword arguments of the model, on the CPU, where the export takes place."""
    args = args if isinstance(args, tuple) else (args,)
    if not kwargs and args and isinstance(args[-1], dict):  # as torch.onnx.export has it
        args, kwargs = args[:-1], args[-1]
    for value in tree_leaves((args, kwargs)):
        if is_quantized(value):
            raise QuantizationError(
                f"{FUNCTION}: args has a quantized tensor, and ONNX's have no scale: export a "
                "model that begins with a QuantStub, with an ordinary tensor"
            )

    def on_cpu(value: Any) -> Any:
        return value.cpu() if isinstance(value, Tensor) else value

    return mapped(on_cpu, args), mapped(on_cpu, dict(kwargs or {}))


def _has_16_bits(module: nn.Module) -> bool:
    return isinstance(module, Grid) and module.dtype in (torch.int16, torch.uint16)


def _lowered(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> nn.Module:
    """The graph of a native model; options that name its dimensions become `dynamic_shapes`."""
    if options.get("verify"):
        raise ValueError(
            "verify=True compares with the results of an exported program, which has none for "
            "integers; compare the ONNX program's with those of the converted model"
        )
    kwargs = options["kwargs"]
    axes = options.pop("dynamic_axes", None)
    if axes is not None and options.get("dynamic_shapes") is None:
        options["dynamic_shapes"] = _shapes_of_axes(model, args, kwargs, axes, options)
    shapes = _without_names(options.get("dynamic_shapes"))
    opset = options.get("opset_version") or 0
    return lowered(model, args, kwargs, shapes, four_bits=opset >= INT16_OPSET)


def _shapes_of_axes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    axes: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """`dynamic_shapes` that say what `dynamic_axes` says of a model's inputs."""
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    names = options.get("input_names") or list(given)
    known = {*names, *(options.get("output_names") or ())}
    if not all(isinstance(value, Tensor) for value in given.values()) or not axes.keys() <= known:
        raise ValueError(
            "dynamic_axes must name inputs that are tensors of their own, or outputs, out of "
            f"{sorted(known)}, got {sorted(axes)}; dynamic_shapes takes inputs of all kinds"
        )
    shapes: dict[str, Any] = {}
    for parameter, name in zip(given, names, strict=False):
        of_input = axes.get(name)
        if of_input is not None and not isinstance(of_input, Mapping):
            of_input = {axis: f"{name}_{axis}" for axis in of_input}
        shapes[parameter] = of_input and dict(of_input)
    return shapes


def _without_names(shapes: Any) -> Any:
    """`dynamic_shapes` for torch.export, which lacks the names that torch.onnx gives dimensions."""
    if isinstance(shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(shapes, Mapping):
        return {key: _without_names(value) for key, value in shapes.items()}
    if isinstance(shapes, (tuple, list)):
        return type(shapes)(_without_names(value) for value in shapes)
    return shapes


# Options of torch.onnx.export on what is written.
_OF_FILES = ("export_params", "keep_initializers_as_inputs", "external_data")


def _save(
    program: Any,
    f: Any,
    export_params: bool = True,
    keep_initializers_as_inputs: bool = False,
    external_data: bool = True,
) -> None:
    if isinstance(f, BytesIO):
        f.write(program.model_proto.SerializeToString())
    elif f is not None:
        program.save(
            f,
            include_initializers=export_params,
            keep_initializers_as_inputs=keep_initializers_as_inputs,
            external_data=external_data,
        )
