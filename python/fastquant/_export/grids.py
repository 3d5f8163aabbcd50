"""Quantize and dequantize in the graph of an exported program, in the places where compilers look.

Reference modules (`reference.py`) have put them behind layers. What stands between layers (pooling,
reshaping, activations) computes on quantized tensors, too, and gives its result the scale and zero
point of its input, or those of its range: here it gets quantize and dequantize of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from .._conversion.checks import listed, warn_user
from .._core.errors import QuantizationError
from .._torch import decomposed
from ..nn.quantized.float_layer import FloatLayer
from ..nn.quantized.functional_modules import moved_qparams, multiplied_qparams

Grid: TypeAlias = tuple[float, int, int, int, torch.dtype]
"""Arguments of quantize_per_tensor: scale, zero point, smallest and largest integer, dtype."""

# Results that are values of the input, or lie between them; what leaves that range saturates.
_KEEP_GRID = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d amax amin avg_pool1d avg_pool2d avg_pool3d cat
    channel_shuffle chunk clamp clamp_max clamp_min clone constant_pad_nd contiguous dropout expand
    expand_as feature_dropout flatten flip gather gelu grid_sampler grid_sampler_2d grid_sampler_3d
    hardtanh index index_select leaky_relu lift_fresh_copy max max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d mean median min movedim narrow pad permute pixel_shuffle
    pixel_unshuffle prelu reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape roll select silu
    slice sort split split_with_sizes squeeze stack std t threshold topk transpose unbind unflatten
    unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d view _unsafe_view
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
_KEEPING_GRID = frozenset(_KEEP_GRID.split())
# Results within a fixed range: scale and zero point for uint8, as native quantized tensors have it.
_FIXED_GRIDS = {
    **dict.fromkeys(("sigmoid", "special_expit", "hardsigmoid"), (1 / 256, 0)),
    "tanh": (1 / 128, 128),
}
# Limiting before quantize does the same as after it.
_CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
_WEIGHTED = (
    *("linear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)


def op_name(node: Node) -> str:
    """The name of the op of aten that a node calls, without its overload; or nothing."""
    schema = getattr(node.target, "_schema", None)
    namespace, _, name = getattr(schema, "name", "").partition("::")
    return name if namespace == "aten" else ""


class QuantizedGraph:
    """The graph of a program that reference modules were exported to, while it is changed."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph: Graph = program.graph_module.graph
        ops = decomposed.ops()
        self._quantize = ops.quantize_per_tensor.default
        self._dequantize = ops.dequantize_per_tensor.default
        self._dequantize_weight = ops.dequantize_per_channel.default

    # --- changes, in the order in which they are made -----------------------------------------

    def round_between_layers(self) -> None:
        """Quantize what is computed of quantized tensors outside of layers."""
        grids: dict[Node, Grid] = {}
        for node in list(self.graph.nodes):
            if node.target is self._dequantize:
                grids[node] = node.args[1:]
            elif grid := self._grid_of_result(node, grids):
                if isinstance(node.meta["val"], (tuple, list)):
                    grids[node] = grid  # for getitem
                elif node.meta["val"].is_floating_point() and not self._is_quantized_next(node):
                    grids[self._insert_rounding(node, grid)] = grid

    def remove_boundaries(self) -> None:
        """Remove the marks that reference modules left where the quantized part ends."""
        for node in list(self.graph.nodes):
            if op_name(node) == "alias":
                self._replace(node, node.args[0])

    def quantize_behind_clamps(self) -> None:
        """Have ReLU and the like come before the quantize of the layer before them."""
        for clamp in self.graph.nodes:
            if op_name(clamp) not in _CLAMPS or len(clamp.users) != 1:
                continue
            rounded, (after,) = clamp.args[0], clamp.users
            if rounded.target is not self._dequantize or after.target is not self._quantize:
                continue
            quantized = rounded.args[0]
            alone = len(rounded.users) == 1 and len(quantized.users) == 1
            if alone and rounded.args[1:] == after.args[1:] == quantized.args[1:]:
                self._replace(rounded, quantized.args[0])
                self.graph.erase_node(quantized)

    def join_on_one_grid(self) -> None:
        """Give the parts of a concatenation the scale and zero point of the whole.

        Runtimes then copy integers, and XNNPACK refuses to do anything else.
        """
        for node in list(self.graph.nodes):
            grid = self._next_grid(node) if op_name(node) in ("cat", "stack") else None
            if grid is None:
                continue
            for part in list(dict.fromkeys(node.args[0])):
                if part.target is not self._dequantize or part.args[1:] == grid:
                    continue
                quantized = part.args[0]
                if self._may_change_grid(part):
                    quantized.args = (quantized.args[0], *grid)
                    part.args = (quantized, *grid)
                else:
                    node.replace_input_with(part, self._rounded(part, grid))

    def add_before_rounding(self) -> None:
        """Add to the real result of a layer, where its only use is a sum that is quantized."""
        for node in self.graph.nodes:
            if op_name(node) != "add" or not self._is_quantized_next(node):
                continue
            for rounded in node.args[:2]:
                if layer := self._layer_rounded_for(rounded):
                    quantized = rounded.args[0]
                    self._replace(rounded, layer)
                    self.graph.erase_node(quantized)
                    break

    def dequantize_for_each_use(self) -> None:
        """Give each use of a quantized tensor a dequantize of its own, as PT2E does."""
        for node in list(self.graph.nodes):
            if node.target is not self._dequantize:
                continue
            for user in list(node.users)[1:]:
                if user.op == "output":
                    continue
                with self.graph.inserting_after(node):
                    same = self._call(self._dequantize, node.args, node)
                user.replace_input_with(node, same)

    def floating_layers(self) -> list[str]:
        """The modules with an int8 weight whose input is not quantized."""
        return [
            _module_of(node)
            for node in self.graph.nodes
            if self._has_int8_weight(node) and node.args[0].target is not self._dequantize
        ]

    # --- finding -----------------------------------------------------------------------------

    def _grid_of_result(self, node: Node, grids: dict[Node, Grid]) -> Grid | None:
        """The grid for the result of an op on quantized tensors; None where it stays floating."""
        first: Any = node.args[0] if node.args else None
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        grid = grids.get(first) if isinstance(first, Node) else None
        name = op_name(node)
        if grid is None or name in _KEEPING_GRID or node.target is operator.getitem:
            return grid
        scale, zero_point, lowest, highest, dtype = grid
        if name in _FIXED_GRIDS:
            scale, zero_point = _FIXED_GRIDS[name]
            return scale, zero_point + lowest, lowest, highest, dtype
        number = node.args[1] if len(node.args) == 2 else None
        change = _OF_NUMBERS.get(name)
        if change is None or not isinstance(number, (int, float)):
            return None
        return *change(scale, zero_point, number, dtype), lowest, highest, dtype

    def _is_quantized_next(self, node: Node) -> bool:
        """Whether a node's result is only quantized, as it is or after a clamp."""
        return bool(node.users) and all(
            user.target is self._quantize
            or (op_name(user) in _CLAMPS and self._is_quantized_next(user))
            for user in node.users
        )

    def _next_grid(self, node: Node) -> Grid | None:
        """The grid on which the result of a node is quantized, if nothing else uses it."""
        if not self._is_quantized_next(node):
            return None
        user = next(iter(node.users))
        return user.args[1:] if user.target is self._quantize else self._next_grid(user)  # type: ignore[return-value]

    def _may_change_grid(self, rounded: Any) -> bool:
        """Whether nothing else uses what is rounded here, nor has to have the same grid."""
        quantized = rounded.args[0]
        computed = quantized.args[0]
        alone = len(rounded.users) == 1 and len(quantized.users) == 1
        # A ReLU, say, of a floating result takes any grid; of an integer it keeps the integer's.
        keeps_grid = computed.target is operator.getitem or (
            op_name(computed) in _KEEPING_GRID
            and (isinstance(computed.args[0], list) or self._is_rounded(computed.args[0]))
        )
        return alone and not keeps_grid

    def _is_rounded(self, node: Any) -> bool:
        return isinstance(node, Node) and node.target is self._dequantize

    def _layer_rounded_for(self, rounded: Any) -> Node | None:
        """The layer with an int8 weight whose result this is, if nothing else uses it."""
        if not self._is_rounded(rounded):
            return None
        quantized: Any = rounded.args[0]
        layer = quantized.args[0]
        alone = all(len(node.users) == 1 for node in (rounded, quantized, layer))
        return layer if alone and self._has_int8_weight(layer) else None

    def _has_int8_weight(self, node: Any) -> bool:
        if op_name(node) not in _WEIGHTED:
            return False
        weight: Any = node.args[1]
        return weight.target is self._dequantize_weight

    # --- changing ----------------------------------------------------------------------------

    def _call(self, op: Any, args: tuple[Any, ...], like: Node) -> Node:
        node = self.graph.call_function(op, args)
        node.meta = {key: value for key, value in like.meta.items() if key != "val"}
        node.meta["val"] = op(args[0].meta["val"], *args[1:])
        return node

    def _rounded(self, node: Node, grid: Grid) -> Node:
        """The result of a node quantized and dequantized, for a use of it."""
        with self.graph.inserting_after(node):
            quantized = self._call(self._quantize, (node, *grid), node)
        with self.graph.inserting_after(quantized):
            return self._call(self._dequantize, (quantized, *grid), node)

    def _insert_rounding(self, node: Node, grid: Grid) -> Node:
        """Quantize and dequantize the result of a node for all its uses."""
        users = list(node.users)
        rounded = self._rounded(node, grid)
        for user in users:
            user.replace_input_with(node, rounded)
        self.program.graph_signature.replace_all_uses(node.name, rounded.name)
        return rounded

    def _replace(self, node: Node, by: Any) -> None:
        node.replace_all_uses_with(by)
        self.program.graph_signature.replace_all_uses(node.name, by.name)
        self.graph.erase_node(node)


_OF_NUMBERS: dict[str, Callable[[float, int, float, torch.dtype], tuple[float, int]]] = {
    "add": moved_qparams,
    "mul": multiplied_qparams,
}


def arrange(program: ExportedProgram, adds_before_rounding: bool) -> ExportedProgram:
    """The program with the changes of this file.

    Args:
        program: exported from reference modules.
        adds_before_rounding: whether sums take the real results of layers, not the rounded ones.

    Raises:
        QuantizationError: it has ops of fastquant; their module is named.
    """
    _require_known_ops(program)
    if any(_changes_inputs(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # into ops that change nothing
    changed = QuantizedGraph(program)
    changed.round_between_layers()
    changed.remove_boundaries()
    changed.quantize_behind_clamps()
    changed.join_on_one_grid()
    if adds_before_rounding:
        changed.add_before_rounding()
    changed.dequantize_for_each_use()
    if names := changed.floating_layers():
        warn_user(
            f"export: {listed(names)} get floating inputs, so no runtime computes them with "
            "integers: something between them and the QuantStub has no quantized form, such as "
            "x + y, for which models use FloatFunctional"
        )
    program.graph_module.graph.lint()
    program.graph_module.recompile()
    return program


def _changes_inputs(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _require_known_ops(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name.startswith("fastquant::"):
            for path, name in _module_stack(node):
                if name.endswith(FloatLayer.__name__):
                    raise QuantizationError(
                        f"export: layer {path} has no quantized form and fake-quantizes its "
                        "weight, which other runtimes cannot: weights need 8 bits and zero points "
                        "of 0, as the default configs choose them"
                    )
            raise QuantizationError(
                f"export: {_module_of(node)} calls {schema.name.removeprefix('fastquant::')} of "
                "fastquant, which other runtimes do not have; observers and fake-quantizers that "
                "are used as layers have to be replaced or removed first"
            )


def called_modules(program: ExportedProgram) -> set[str]:
    """The paths of the modules whose calls a program is made of."""
    return {
        ".".join(parts[:depth])
        for node in program.graph.nodes
        for path, _ in _module_stack(node)
        for parts in [path.split(".")]
        for depth in range(1, len(parts) + 1)
    }


def _module_of(node: Node) -> str:
    """The path and class of the innermost module whose forward made the node."""
    modules = _module_stack(node)
    if not modules:
        return "the model"
    path, name = modules[-1]
    return f"{path or 'the model'} ({name})"


def _module_stack(node: Node) -> list[tuple[str, str]]:
    """Path and class of each module in whose forward the node was made, outermost first."""
    return [
        (path, name if isinstance(name, str) else name.__name__)
        for path, name in node.meta.get("nn_module_stack", {}).values()
    ]
