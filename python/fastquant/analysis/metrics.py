"""A user's metric of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .errors import AnalysisError

Metric = Callable[[nn.Module], Any]


def score(metric: Metric, model: nn.Module, which: str) -> float:
    """A user's metric of a model, as a number.

    Args:
        metric: called with the model.
        model: in eval mode.
        which: names the model in an error.

    Raises:
        AnalysisError: it returns no number.
    """
    value = metric(model)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise AnalysisError(
            f"metric must return a number, and returned {value!r} for {which}"
        ) from None
    if math.isnan(number):
        raise AnalysisError(f"metric must return a number, and returned NaN for {which}")
    return number
