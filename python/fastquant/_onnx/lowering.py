"""From a model of native quantized modules to a graph that torch.onnx can export."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._core.errors import QuantizationError
from .._quantized.tables import without_tables
from .._quantized.tensor import is_quantized
from .patterns import PATTERNS, TAKES_FOUR_BITS

FUNCTION = "onnx.export"
"""What users call, for messages."""


def lowered(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    four_bits: bool,
) -> fx.GraphModule:
    """The model as a graph of ONNX's ops and torch's floating ones, with its signature.

    Args:
        model: of native quantized modules.
        args: example inputs.
        kwargs: likewise.
        dynamic_shapes: as `torch.export.export` takes them.
        four_bits: whether weights that fit are to be stored as int4.

    Raises:
        QuantizationError: an op has no ONNX form, or the model returns quantized tensors.
    """
    handle = model.register_forward_hook(_require_floating)
    try:
        with without_tables():
            program = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
    finally:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of guards, which the second export makes anew
        graph_module: Any = program.module()
    for op in list(graph_module.graph.nodes):
        if str(op.target).startswith("aten._assert_tensor_metadata"):
            # It would keep alive what only tables are computed from.
            graph_module.graph.erase_node(op)
        elif op.op == "call_function" and getattr(op.target, "namespace", "") == "fastquant":
            _replace(graph_module, op, four_bits)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    for module in graph_module.modules():
        module.training = False
    return graph_module  # type: ignore[no-any-return]


def _require_floating(module: nn.Module, args: Any, output: Any) -> None:
    outputs = output.values() if isinstance(output, dict) else output
    for value in outputs if isinstance(output, (tuple, list, dict)) else (output,):
        if is_quantized(value):
            raise QuantizationError(
                f"{FUNCTION}: the model returns a quantized tensor, and ONNX's have no scale: end "
                "its quantized part with a DeQuantStub"
            )


def module_path(op: fx.Node) -> str:
    """Where a node comes from: the dotted name of the module whose forward called the op."""
    stack = op.meta.get("nn_module_stack") or {}
    path = ""
    for path, _ in stack.values():  # noqa: B007 (the last one)
        pass
    return path


def named(path: str) -> str:
    """A module's path, for messages."""
    return path or "the model itself"


_UNKNOWN_OP = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def raise_named(error: BaseException, model: nn.Module) -> None:
    """Raise an error that names the op that torch.onnx does not know, and the modules with it.

    Args:
        error: of `torch.onnx.export`; one with another cause is left to the caller.
        model: what it was given.
    """
    cause: BaseException | None = error
    while cause is not None:
        found = _UNKNOWN_OP.search(str(cause))
        if found is not None:
            nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
            paths = {named(module_path(n)) for n in nodes if str(n.target).startswith(found[1])}
            where = ", ".join(sorted(paths)) or "the model"
            raise QuantizationError(
                f"{FUNCTION}: {where} calls {found[1]}, which has no ONNX form in torch.onnx"
            ) from error
        cause = cause.__cause__


def _replace(graph_module: fx.GraphModule, op: fx.Node, four_bits: bool) -> None:
    """Put the ONNX pattern of a native op in its place."""
    name = str(op.target).split(".")[1]
    path = module_path(op)
    if name not in PATTERNS:
        if not op.users:
            return  # nothing reads it: a packed weight, for one, that patterns have unpacked
        raise QuantizationError(
            f"{FUNCTION}: {named(path)} calls {name}, which has no ONNX form: leave it floating, "
            "with None as its qconfig, or out of the classes that quantize_dynamic is given"
        )
    normalized: Any = op.normalized_arguments(graph_module, normalize_to_only_use_kwargs=True)
    arguments = dict(normalized.kwargs)
    inputs = [arguments.pop(key) for key in ("x", "a", "b", "tensors") if key in arguments]
    first = fx.map_arg(inputs[0], lambda n: n.meta["val"])
    if name == "quantized_interpolate":  # whose sizes may depend on the input's
        inputs.append(arguments["output_size"])
        constants = fx.map_arg(arguments, lambda n: n.meta["val"])
    else:
        constants = _constants(graph_module, arguments)
    if name in TAKES_FOUR_BITS:
        constants["four_bits"] = four_bits
    try:
        pattern = PATTERNS[name](first, **constants)
    except QuantizationError as error:
        raise QuantizationError(f"{FUNCTION}: {named(path)}: {error}") from error
    place = _free_name(graph_module, f"{path}.{name}" if path else name)
    graph_module.add_submodule(place, pattern)
    with graph_module.graph.inserting_before(op):
        call = graph_module.graph.call_module(place, tuple(inputs))
    call.meta = dict(op.meta)
    op.replace_all_uses_with(call)
    graph_module.graph.erase_node(op)


def _free_name(graph_module: fx.GraphModule, name: str) -> str:
    taken = {path for path, _ in graph_module.named_modules()}
    number, free = 1, name
    while free in taken:
        number, free = number + 1, f"{name}_{number}"
    return free


def _constants(graph_module: fx.GraphModule, arguments: dict[str, Any]) -> dict[str, Any]:
    """The values of arguments that no input of the model has a part in."""

    def computed(node: fx.Node) -> Any:
        if node.op == "get_attr":
            found: Any = graph_module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found.detach() if isinstance(found, Tensor) else found
        if node.op != "call_function" or not callable(node.target):
            raise QuantizationError(
                f"{FUNCTION}: {named(module_path(node))} computes a weight, or a scale, from the "
                "model's inputs; ONNX export takes constants"
            )
        args, kwargs = fx.map_arg((node.args, node.kwargs), computed)
        return node.target(*args, **kwargs)

    with torch.no_grad():
        return {key: fx.map_arg(value, computed) for key, value in arguments.items()}
