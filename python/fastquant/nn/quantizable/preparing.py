"""Observers for the parts of a module that is made of them.

`from_float` gives the parts observers, as torch.ao's does. Only `fastquant.quantize` can, which
imports this package; so it leaves here what to call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# What gives a module's parts observers, by whether it is in training mode.
_WAYS: dict[bool, Callable[[Any], nn.Module]] = {}


def prepare_parts_by(
    prepare: Callable[[Any], nn.Module], prepare_qat: Callable[[Any], nn.Module]
) -> None:
    """Say what prepares the parts of modules, in place, for calibration and for training."""
    _WAYS.update({False: prepare, True: prepare_qat})


def with_observers(module: Any) -> Any:
    """The module, whose parts have observers, or fake-quantizers in training mode."""
    return _WAYS[module.training](module)
