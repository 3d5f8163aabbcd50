"""What quantization made of each layer, read from a prepared or a converted model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._conversion.checks import listed
from .._conversion.plan import How, Plan
from .._core.dtypes import INT8, QUINT8
from .._core.ranges import has_seen_nothing
from .._torch import ao
from .._torch.ao import nnqd
from ..nn.quantized import FloatFunctional
from ..observer import _is_activation_post_process
from ..quantization_mappings import get_default_static_quant_module_mappings, no_observer_set
from .errors import AnalysisError
from .grids import Grid, grid_of, grid_of_tensor, output_grid

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED = (*CONVOLUTIONS, nn.Linear, nn.Embedding, nn.EmbeddingBag)
"""The modules whose weight is quantized."""


CUSTOM = tuple(no_observer_set())
"""Modules that consist of layers, which the float modules they are made from do not have."""


@dataclass(frozen=True)
class Quantized:
    """A layer as it was quantized.

    Attributes:
        kind: class of the module.
        weight: the values that its weight is stored as; None where it has none.
        weight_grid: what the weight was rounded to; None for floating weights.
        bias: its bias, which may differ from the float layer's.
        output: what its output is rounded to; None where it is not.
        dynamic: whether each input is rounded to its own range.
        state: parameters and buffers of a layer whose weight stays floating, by name; a batch
            norm's, for example, may differ from the float model's.
    """

    kind: str
    weight: Tensor | None = None
    weight_grid: Grid | None = None
    bias: Tensor | None = None
    output: Grid | None = None
    dynamic: bool = False
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_something(self) -> bool:
        """Whether quantization did anything to the layer."""
        return self.weight is not None or self.output is not None


def is_prepared(model: nn.Module) -> bool:
    """Whether a model has observers."""
    return any(map(_is_activation_post_process, model.modules()))


def core(module: nn.Module) -> Any:
    """The module that has the weight: the first one of fused modules."""
    return module[0] if isinstance(module, nn.Sequential) and len(module) else module


def read(model: nn.Module) -> dict[str, Quantized]:
    """Each quantized layer by its name, in the order of the model's definition.

    Raises:
        AnalysisError: the model is neither prepared nor converted, or was not calibrated.
    """
    with torch.no_grad(), ao.quiet():
        layers = _read_prepared(model) if is_prepared(model) else _read_converted(model)
    if not layers:
        raise AnalysisError(
            f"quantized ({type(model).__name__}) has no quantized layer: it must be a model that "
            "fastquant.prepare and a calibration, or fastquant.convert, have gone over"
        )
    return layers


def _with_state(layer: Quantized, module: nn.Module) -> Quantized:
    if layer.weight is not None:
        return layer
    tensors = (*module.named_parameters(), *module.named_buffers())
    return replace(layer, state={name: tensor.detach() for name, tensor in tensors})


# --- prepared ---------------------------------------------------------------------------------


def _read_prepared(model: nn.Module) -> dict[str, Quantized]:
    plan = Plan("analyze", model, get_default_static_quant_module_mappings(), {})
    swapped = {entry.path for entry in plan.entries if entry.how is not How.SKIPPED}
    layers: dict[str, Quantized] = {}
    unseen: list[str] = []
    for name, module in model.named_modules():
        if name not in swapped:
            continue
        observer: Any = getattr(module, "activation_post_process", None)
        if not _is_activation_post_process(observer):
            observer = None
        elif has_seen_nothing(getattr(observer, "activation_post_process", observer)):
            # Models may have one in each block and use it in some.
            if not isinstance(module, FloatFunctional):
                unseen.append(name)
            continue
        layer = Quantized(
            type(module).__name__,
            *_prepared_weight(module),
            output=None if observer is None else grid_of(observer),
        )
        if layer.is_something:
            layers[name] = _with_state(layer, module)
    if unseen:
        raise AnalysisError(
            f"the observers of these layers have seen no data: {listed(unseen)}. Calibrate the "
            "prepared model first, with data that reaches them, or set their qconfig to None"
        )
    return layers


def _prepared_weight(module: Any) -> tuple[Tensor | None, Grid | None, Tensor | None]:
    """The weight's values, its grid, and the bias, as convert would store them."""
    observer = getattr(module, "weight_fake_quant", None)
    if observer is not None and hasattr(module, "to_float"):
        module = module.to_float()  # folds a batch norm into the weight
    layer: Any = core(module)
    qconfig: Any = getattr(module, "qconfig", None)
    if not isinstance(layer, WEIGHTED) or (observer is None and qconfig is None):
        return None, None, None
    weight = layer.weight.detach()
    if observer is None:
        if qconfig.weight is None:
            return None, None, None
        observer = qconfig.weight()
        observer(weight)
    bias = getattr(layer, "bias", None)
    bias = None if bias is None else bias.detach()
    grid = grid_of(observer)
    if grid is not None:
        return grid.quantized(weight), grid, bias
    if getattr(observer, "dtype", None) is torch.float16:
        return weight.half().to(weight.dtype), None, bias
    return None, None, None


# --- converted --------------------------------------------------------------------------------


def _read_converted(model: nn.Module) -> dict[str, Quantized]:
    layers: dict[str, Quantized] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, CUSTOM):
            inside.append(f"{name}.")
            continue
        layer = _converted_layer(module)
        if layer is not None and layer.is_something:
            layers[name] = _with_state(layer, module)
            inside.append(f"{name}.")
    return layers


def left_out(model: nn.Module) -> list[str]:
    """Names of converted modules whose layers the float model does not have."""
    if is_prepared(model):
        return []
    return [name for name, module in model.named_modules() if isinstance(module, CUSTOM)]


def _converted_layer(module: Any) -> Quantized | None:
    weight: Any = getattr(module, "weight", None)
    values = grid = bias = None
    if callable(weight) and not isinstance(weight, Tensor):
        weight = weight()
        if isinstance(weight, Tensor):
            values, grid = weight.dequantize(), grid_of_tensor(weight)
            bias = getattr(module, "bias", None)
            bias = bias() if callable(bias) and not isinstance(bias, Tensor) else bias
    kind = type(module).__name__
    if isinstance(module, ao.named(nnqd, "Linear")):
        return Quantized(kind, values, grid, bias, dynamic=grid is not None)
    scale = getattr(module, "scale", getattr(module, "output_scale", None))
    zero_point = getattr(module, "zero_point", getattr(module, "output_zero_point", None))
    is_number = isinstance(scale, float | int | Tensor) and isinstance(zero_point, int | Tensor)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        is_number = False
    output = None
    # A float module may have a scale of its own.
    if is_number and "quantized" in type(module).__module__:
        dtype = getattr(module, "dtype", None)
        dtype = dtype if dtype in (*INT8, torch.uint8) else QUINT8
        output = output_grid(scale, zero_point, dtype)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or values is None:
        bias = None
    return Quantized(kind, values, grid, bias, output)
