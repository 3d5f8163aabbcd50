"""What a prepared model's observers saw, to be compared between the two libraries."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fake_quantize import disable_fake_quant, enable_fake_quant
from ..observer import _is_activation_post_process
from .steps import Step

# The min_val and max_val of each layer's observers.
Ranges = dict[str, list[Tensor]]

# By mode, how far apart two ranges may be, as a fraction of their width. In calibration both
# libraries observe the same float model. In training they do not: fastquant's QAT modules undo the
# batch norm's scaling on the weight, torch.ao's on the output, and the two round differently.
TOLERANCE = {"calibrate": 0.0, "qat": 1e-4}


def observers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost observers and fake-quantizers, by the name of their layer."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if _is_activation_post_process(module):
            inside.append(f"{name}.")
            layer = re.sub(r"(^|\.)activation_post_process$", "", name)
            found[re.sub(r"weight_fake_quant$", "weight", layer) or "the model itself"] = module
    return found


def first_ranges(step: Step) -> Ranges:
    """What the first step observes, with fake-quantize off; then one step with it on.

    With fake-quantize on, torch.ao's fused modules would use scales that differ from what their
    `calculate_qparams` says, so all layers behind the first would see other values.
    """
    step.model.apply(disable_fake_quant)
    step()
    ranges = {
        layer: [
            buffer.clone()
            for name, buffer in sorted(observer.named_buffers())
            if name.split(".")[-1] in ("min_val", "max_val")
        ]
        for layer, observer in observers_of(step.model).items()
    }
    step.model.apply(enable_fake_quant)
    step()
    return ranges


def differences(ours: Ranges, theirs: Ranges) -> dict[str, float]:
    """By layer, how far its ranges are apart."""
    return {
        layer: _difference(ours.get(layer, ()), theirs.get(layer, ()))
        for layer in sorted(ours.keys() | theirs.keys())
    }


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest distance of two ranges' ends, as a fraction of the width; 0 for equal bits."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return math.inf
    if all(map(torch.equal, ours, theirs)):
        return 0.0
    a, b = torch.stack(tuple(ours)), torch.stack(tuple(theirs))
    apart = (a - b).abs() / (b[0] - b[-1]).abs()
    # Channels that observed nothing are infinite on both sides: equal, though their difference is
    # NaN.
    return float(apart[a != b].nan_to_num(nan=math.inf).max())
