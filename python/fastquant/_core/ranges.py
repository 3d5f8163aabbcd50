"""What is this range: observed, unobserved, crossed by rounding, or none at all?"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from .errors import QuantizationError
from .schemes import FLOATING

INF = float("inf")
UNOBSERVED = (("min_val", INF), ("max_val", -INF))
"""What the buffers of a range hold before anything was observed."""

# Moving averages of one and the same value take the same steps but for rounding, which may put
# the minimum above the maximum by a few units in the last place. The distance then shrinks as
# slowly as the averages move, so allow for more than a few, but for no real disorder.
_ROUNDING = 2.0**-10


class Range:
    """What each pair of ends is, as masks of one element per tensor or channel.

    Each pair is of one kind at most, and no range at all where it is of none: with NaN or an
    infinity in it, or with its minimum above its maximum for another reason than rounding.
    Every question about a range is answered from these masks.
    """

    def __init__(self, min_val: Tensor, max_val: Tensor) -> None:
        self._min_val = min_val
        self._max_val = max_val

    @property
    def observed(self) -> Tensor:
        """Finite and in order."""
        low, high = self._min_val, self._max_val
        return (low > -INF) & (low <= high) & (high < INF)

    @property
    def unobserved(self) -> Tensor:
        """inf and -inf, where observers begin."""
        return (self._min_val == INF) & (self._max_val == -INF)

    @property
    def crossed(self) -> Tensor:
        """Finite, and out of order by no more than rounding can do."""
        low, high = self._min_val, self._max_val
        # Halves, whose difference does not overflow.
        near = low / 2 - high / 2 <= _ROUNDING * low.abs().maximum(high.abs())
        return (low < INF) & (high > -INF) & (low > high) & near

    def valid(self, *, may_cross: bool) -> Tensor:
        """What can be quantized to; crossed ranges only where they are moving averages."""
        return self.observed | self.crossed if may_cross else self.observed


def is_unobserved(min_val: Tensor, max_val: Tensor) -> bool:
    """Whether nothing at all was observed: no channels yet, or none with a value."""
    if min_val.numel() == 1 == max_val.numel():
        # The usual case, without tensor operations.
        return bool(min_val.item() == INF and max_val.item() == -INF)
    return min_val.numel() == 0 or bool(Range(min_val, max_val).unobserved.all())


def has_seen_nothing(observer: object) -> bool:
    """Whether an observer keeps a range in which nothing was observed."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    return isinstance(low, Tensor) and isinstance(high, Tensor) and is_unobserved(low, high)


def is_observed(
    min_val: Tensor, max_val: Tensor, may_cross: Callable[[], bool], stacklevel: int
) -> bool:
    """Whether there is a range to quantize to; warns where nothing, or not all, was observed.

    Args:
        min_val: smallest values, 0-dim or one per channel.
        max_val: largest values, likewise.
        may_cross: says whether they are moving averages; asked where it matters.
        stacklevel: whom a warning points to, 1 for the caller.

    Raises:
        QuantizationError: a range that is none.
    """
    if min_val.numel() == 1:
        # The usual case, without the launch of a dozen tensor operations.
        low, high = min_val.item(), max_val.item()
        if -INF < low <= high < INF:
            return True
    the_range = Range(min_val, max_val)
    observed = the_range.observed
    if observed.numel() and bool(observed.all()):
        return True
    valid = the_range.valid(may_cross=may_cross())
    unobserved = the_range.unobserved
    if valid.numel() and bool(valid.all()):
        return True
    wrong = ~(valid | unobserved)
    if bool(wrong.any()):
        raise QuantizationError(
            "cannot quantize a range that is not finite or has its minimum above its maximum: "
            f"min_val={min_val[wrong].tolist()}, max_val={max_val[wrong].tolist()}"
            + (f" at channels {wrong.nonzero().flatten().tolist()}" if wrong.dim() else "")
        )
    if min_val.dim() == 0 or not min_val.numel():
        warn_of_unobserved(stacklevel + 1)
        return False
    warnings.warn(
        f"channels {unobserved.nonzero().flatten().tolist()} never had a finite value; "
        "they get a default scale",
        stacklevel=stacklevel + 1,
    )
    return True


def warn_of_unobserved(stacklevel: int) -> None:
    """torch.ao's warning, which code filters by its words."""
    warnings.warn(
        "must run observer before calling calculate_qparams. Returning default values.",
        stacklevel=stacklevel + 1,
    )


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
        may_cross: whether they are moving averages.
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
    the_range = Range(min_val, max_val)
    wrong = ~(the_range.valid(may_cross=may_cross) | the_range.unobserved)
    if finite and bool(wrong.any()):
        return (
            "min_val and max_val must be finite and in order, or inf and -inf where nothing was "
            f"observed, got {_first_few(min_val[wrong])} and {_first_few(max_val[wrong])}"
            + (f" at channels {_first_few(wrong.nonzero())}" if wrong.dim() else "")
        )
    if isinstance(histogram, Tensor) and not histogram.is_meta:
        negative = ~((histogram >= 0) & (histogram < INF))
        if bool(negative.any()):
            return f"histogram must hold counts of 0 or more, got {_first_few(histogram[negative])}"
    return None


def _first_few(values: Tensor) -> list[float]:
    return values.flatten()[:5].tolist()
