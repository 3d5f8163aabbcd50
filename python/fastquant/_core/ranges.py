"""What a range is: observed, unobserved, crossed by rounding, or none at all."""

from __future__ import annotations

from torch import Tensor

from .schemes import FLOATING


def range_error(
    min_val: object,
    max_val: object,
    histogram: object = None,
    *,
    finite: bool = True,
    may_cross: bool = False,
) -> str | None:
    """What makes a saved range, and its histogram, no range; None where nothing does.

    Args:
        min_val: smallest values, one element or one per channel.
        max_val: largest values, likewise.
        histogram: counts over the range; None where there is no histogram.
        finite: whether NaN and infinities are wrong in a range that is not an unobserved one.
        may_cross: whether the ends may have passed each other, as moving averages of one value.
    """
    named = {"min_val": min_val, "max_val": max_val}
    if histogram is not None:
        named["histogram"] = histogram
    for name, value in named.items():
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value.dtype not in FLOATING:
            return f"{name} must have a floating dtype, got {value.dtype}"
    assert isinstance(min_val, Tensor)
    assert isinstance(max_val, Tensor)
    if min_val.shape != max_val.shape or min_val.dim() > 1:
        return (
            "min_val and max_val must both be 0-dim, or 1-dim with as many channels, got shapes "
            f"{list(min_val.shape)} and {list(max_val.shape)}"
        )
    if min_val.is_meta or max_val.is_meta:
        return None
    right = (min_val == float("inf")) & (max_val == -float("inf"))
    right |= (
        (min_val.abs() < float("inf"))
        & (max_val.abs() < float("inf"))
        & ((min_val <= max_val) | may_cross)
    )
    if finite and not bool(right.all()):
        return (
            "min_val and max_val must be finite and in order, or inf and -inf where nothing was "
            f"observed, got {_first_few(min_val[~right])} and {_first_few(max_val[~right])}"
            + (f" at channels {_first_few((~right).nonzero())}" if right.dim() else "")
        )
    if isinstance(histogram, Tensor) and not histogram.is_meta:
        wrong = ~((histogram >= 0) & (histogram < float("inf")))
        if bool(wrong.any()):
            return f"histogram must hold counts of 0 or more, got {_first_few(histogram[wrong])}"
    return None


def _first_few(values: Tensor) -> list[float]:
    return values.flatten()[:5].tolist()
