"""Integers of four bits, which torch has no tensors of, in an exported model."""

from __future__ import annotations

from typing import Any

import numpy as np

from .grids import FOUR_BITS


def store_four_bits(program: Any) -> None:
    """Make the integers of marked nodes int4 or uint4.

    Args:
        program: a `torch.onnx.ONNXProgram`, which is changed.
    """
    import ml_dtypes
    import onnx_ir as ir

    graph = program.model.graph
    made: dict[str, Any] = {}

    def stored(value: Any) -> Any:
        """The constant in four bits; others as they are."""
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            return value
        if value.name not in made:
            signed = tensor.dtype == ir.DataType.INT8
            dtype = ir.DataType.INT4 if signed else ir.DataType.UINT4
            integers = np.asarray(tensor.numpy()).astype(
                ml_dtypes.int4 if signed else ml_dtypes.uint4
            )
            name = f"{value.name}_4"
            constant = ir.Tensor(integers, dtype=dtype, name=name)
            made[value.name] = four = ir.Value(
                name=name,
                shape=ir.Shape(integers.shape),
                type=ir.TensorType(dtype),
                const_value=constant,
            )
            graph.initializers[name] = four
        return made[value.name]

    for node in graph:
        if FOUR_BITS not in node.metadata_props:
            continue
        quantizes = node.op_type == "QuantizeLinear"
        for i in (2,) if quantizes else (0, 2):
            node.replace_input_with(i, stored(node.inputs[i]))
        if quantizes:
            node.outputs[0].type = node.inputs[2].type
    for name in made:
        value = graph.initializers.get(name)
        if value is not None and not value.uses():
            del graph.initializers[name]
