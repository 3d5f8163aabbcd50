"""Cross-layer equalization: neighbouring layers share out the ranges of their channels."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .._conversion.plan import has_qconfig
from .._core.batches import checked_data, run_batch
from .._torch import ao
from ..calibrate import calibrate
from ..nn.intrinsic import _FusedModule
from ..quantize import prepare
from .analyzing import Forward, Subject
from .errors import AnalysisError
from .measuring import first
from .reading import core
from .repairs import Repair, quality
from .sums import OutputError

# What leaves a positive factor on a channel as it is, and channels where they are.
_TRANSPARENT = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool2d, nn.Flatten,
)  # fmt: skip
_TRANSPARENT_FUNCTIONS = {
    F.relu, torch.relu, F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, torch.flatten, "relu", "flatten", "contiguous",
}  # fmt: skip
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_ROUNDS = 20
_CLOSE = 1e-3
# In dB. Rounding alone leaves more than 100.
_SAME = 60


def equalize(
    float_model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Forward | None = None,
) -> Repair:
    """Scale channels between neighbouring layers so that both have the same ranges for each.

    Between two layers that only ReLU, pooling or the like separate, a channel of the first may be
    divided by a positive number by which the second multiplies it again: the model computes the
    same. Where both have the same range in each channel, one scale for a whole weight fits best.
    That is the cross-layer equalization of Nagel et al., "Data-Free Quantization Through Weight
    Equalization and Bias Correction" (2019), arXiv:1906.04721, section 4.1; torch.ao has it as
    `torch.ao.quantization._equalize`, for pairs that are named. Here they are found by torch.fx.

    Args:
        float_model: with its batch norms fused, and `qconfig` set; a copy is equalized.
        data: batches, by which the effect is measured.
        batches: use only this many.
        forward: as for `analyze`.

    Returns:
        The equalized float model, to be prepared and calibrated.

    Raises:
        TypeError: an argument has a wrong type.
        AnalysisError: torch.fx cannot trace the model; it has no pair of such layers, or no
            `qconfig`.
    """
    if not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model must be a torch.nn.Module, got {type(float_model).__name__}")
    if not any(has_qconfig(module) for module in float_model.modules()):
        raise AnalysisError("equalize measures what it does, for which the model needs a qconfig")
    equalized = copy.deepcopy(float_model).eval()
    pairs = _pairs(equalized)
    if not pairs:
        raise AnalysisError(
            "equalize: the model has no two layers that only ReLU, pooling or the like separate; "
            "batch norms between them have to be fused before"
        )
    with torch.no_grad():
        for _ in range(_ROUNDS):
            if max(_equalize(earlier, later) for _, earlier, later in pairs) < _CLOSE:
                break
    data = list(islice(checked_data(data), batches))
    _require_same_function(float_model, equalized, first(data), forward or run_batch)
    scores = []
    for model in (float_model, equalized):
        with ao.quiet():
            prepared = prepare(copy.deepcopy(model).eval(), inplace=True)
            calibrate(prepared, data, forward=forward, progress=False)
        # Both are compared with the model as it was.
        scores.append(quality(Subject.of(model, prepared, data, None, forward)))
    return Repair(equalized, tuple(name for name, _, _ in pairs), scores[0], scores[1])


def _require_same_function(before: nn.Module, after: nn.Module, batch: Any, run: Forward) -> None:
    """Raise if the models differ by more than rounding: the trace has then missed something."""
    error = OutputError()
    with torch.no_grad():
        error.add(run(copy.deepcopy(before).eval(), batch), run(after, batch))
    if error.sqnr < _SAME:
        raise AnalysisError(
            "equalize: the equalized model does not compute what the model does "
            f"({error.sqnr:.1f} dB), so its forward does something that torch.fx does not see, "
            "such as using a layer's weight"
        )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Layers and what separates them are leaves, whatever module they were defined in."""
        known = (*_LAYERS, *_TRANSPARENT, _FusedModule)
        return isinstance(module, known) or super().is_leaf_module(module, name)


def _pairs(model: nn.Module) -> list[tuple[str, Any, Any]]:
    """Name of the first layer, first and second layer, of all that can be equalized."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise AnalysisError(
            f"equalize: torch.fx cannot trace the model: {type(error).__name__}: {error}"
        ) from error
    modules = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or calls.count(str(node.target)) != 1:
            continue
        first = modules[node.target]
        if not isinstance(core(first), _LAYERS) or not _only_relu_is_fused(first):
            continue
        following = _next_layer(node, modules)
        if following is None or calls.count(str(following.target)) != 1:
            continue
        second = modules[following.target]
        if _fits(core(first), core(second)):
            pairs.append((str(node.target), core(first), core(second)))
    return pairs


def _only_relu_is_fused(module: nn.Module) -> bool:
    rest = list(module)[1:] if isinstance(module, _FusedModule) else []
    return all(isinstance(part, nn.ReLU) for part in rest)


def _next_layer(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The layer that alone gets a node's output, through nothing that does not let factors by."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(core(module), _LAYERS):
                return node
            if isinstance(module, _TRANSPARENT):
                continue
        elif node.op in ("call_function", "call_method") and node.target in _TRANSPARENT_FUNCTIONS:
            continue
        return None
    return None


def _fits(first: Any, second: Any) -> bool:
    """Whether each output channel of the first layer is an input channel of the second."""
    if isinstance(first, nn.Linear) and not isinstance(second, nn.Linear):
        return False
    outputs: int = len(first.weight)
    groups = getattr(second, "groups", 1)
    return outputs == second.weight.shape[1] * groups and outputs % groups == 0


def _by_input_channel(layer: Any) -> Tensor:
    """A view of a weight as `[groups, outputs of a group, inputs of a group, rest]`."""
    weight: Tensor = layer.weight
    groups = getattr(layer, "groups", 1)
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1)


def _equalize(first: Any, second: Any) -> float:
    """Equalize a pair, in place; how far the largest factor was from 1."""
    range1 = first.weight.flatten(1).abs().amax(1)
    weights = _by_input_channel(second)
    range2 = weights.abs().amax((1, 3)).flatten()
    factors = (range1 / range2).sqrt()
    factors = torch.where((range1 > 0) & (range2 > 0), factors, torch.ones_like(factors))
    first.weight.div_(factors.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(factors)
    weights.mul_(factors.view(weights.shape[0], 1, weights.shape[2], 1))
    return float((factors - 1).abs().max())
