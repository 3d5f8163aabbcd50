"""Merge the statistics that observers have gathered apart: `merge`, and the core of `distributed`.

How the statistics of several observers of the same tensor become one:

- running ranges: the smallest minimum and the largest maximum, which is exact;
- histograms: each is resampled onto the common range, as it is where an observer's range grows,
  and counts add up. This is exact where the ranges agree;
- moving averages: their unweighted mean, channel by channel, since an observer does not keep how
  many tensors it has seen;
- counts of non-finite values add up.

Observers, and channels, that have seen nothing are left out.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._core.arguments import (
    check_averaging_constant,
    check_integer,
    check_nonfinite,
    check_percentile,
    check_quantized_range,
    check_range_method,
)
from ._core.ranges import INF, Range, is_unobserved, range_error
from ._core.schemes import RANGE_METHOD_CODES, Scheme
from ._core.state import eps_error, resized
from ._native.ops import choose_qparams
from ._native.reference.basics import _widest_dtype, moved_histogram
from ._native.routes import histogram_range
from .fake_quantize import is_range_observer, refresh_qparams
from .observer import _is_activation_post_process

__all__ = ["merge"]

_Mergeable = TypeVar("_Mergeable", nn.Module, Mapping[str, Any])
_Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """What one observer has gathered: its own tensors, or those of a state dict.

    Only observers with equal `traits`, which are named as in messages, can be merged.
    """

    name: str
    min_val: Tensor
    max_val: Tensor
    histogram: Tensor | None
    nonfinite_count: Tensor | None
    averages: bool
    upsample_rate: int
    traits: Mapping[str, Any]

    @property
    def channels(self) -> int | None:
        """How many channels; 0 before the first tensor, None per tensor."""
        return self.min_val.numel() if self.min_val.dim() else None

    def description(self) -> dict[str, Any]:
        """What `disagreement` compares; can be sent to other processes."""
        bins = None if self.histogram is None else self.histogram.shape[-1]
        return {"number of bins": bins, "moving average": self.averages, **self.traits}


def statistics_of(model: nn.Module) -> list[Statistics]:
    """The statistics of every observer in `model`, by the names of the observers."""
    found = []
    for name, module in model.named_modules():
        if not is_range_observer(module):
            continue
        observer: Any = module
        traits = {
            trait: str(getattr(module, attribute, None))
            for trait, attribute in (
                ("dtype", "dtype"),
                ("qscheme", "qscheme"),
                ("quant_min", "quant_min"),
                ("quant_max", "quant_max"),
                ("averaging constant", "averaging_constant"),
            )
        }
        found.append(
            Statistics(
                name=name,
                min_val=observer.min_val,
                max_val=observer.max_val,
                histogram=getattr(observer, "histogram", None),
                nonfinite_count=getattr(observer, "nonfinite_count", None),
                averages=getattr(observer, "averaging_constant", None) is not None,
                upsample_rate=int(getattr(observer, "upsample_rate", 1)),
                traits=traits,
            )
        )
    return found


# --------------------------------------------------------------------------------------------
# Do they go together?

Descriptions = Mapping[str, tuple[int | None, Mapping[str, Any]]]
"""Channels and description, by the name of the observer."""


def described(statistics: Iterable[Statistics]) -> Descriptions:
    return {s.name: (s.channels, s.description()) for s in statistics}


def disagreement(sources: Mapping[str, Descriptions]) -> str | None:
    """What keeps statistics from being merged, in words; None where nothing does.

    Args:
        sources: descriptions by what a source is called in messages.
    """
    (first, expected), *others = sources.items()
    for source, given in others:
        for here, there, names in (
            (first, source, [name for name in expected if name not in given]),
            (source, first, [name for name in given if name not in expected]),
        ):
            if names:
                listed = ", ".join(_named(name) for name in names[:10])
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                return f"{here} has observers that {there} lacks: {listed}{more}"
    for name, (_, traits) in expected.items():
        for source, given in others:
            for trait, value in traits.items():
                other = given[name][1].get(trait)
                if other != value:
                    return (
                        f"{_named(name)}: the {trait} is {value} in {first} and {other} in {source}"
                    )
        seen = {
            source: channels for source, given in sources.items() if (channels := given[name][0])
        }
        shapes = {given[name][0] is None for given in sources.values()}
        if len(set(seen.values())) > 1 or len(shapes) > 1:
            counts = ", ".join(f"{given[name][0]} in {s}" for s, given in sources.items())
            return f"{_named(name)}: the number of channels is {counts}"
    return None


def _named(name: str) -> str:
    return name or "the observer itself"


# --------------------------------------------------------------------------------------------
# Merging


@dataclass(frozen=True)
class Merged:
    """New values of one observer's statistics."""

    min_val: Tensor
    max_val: Tensor
    histogram: Tensor | None
    nonfinite_count: int


@dataclass(frozen=True)
class _Place:
    """Where statistics are put together."""

    device: torch.device
    dtype: torch.dtype

    def flat(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, self.dtype).reshape(-1)

    def range_of(self, s: Statistics, channels: int) -> tuple[Tensor, Tensor]:
        """The range of `s`; an unobserved one where `s` has no channels yet."""
        if s.min_val.numel() == channels:
            return self.flat(s.min_val), self.flat(s.max_val)
        nothing = torch.full((channels,), INF, dtype=self.dtype, device=self.device)
        return nothing, -nothing

    def extremes(self, s: Statistics, channels: int) -> list[Tensor]:
        """Four tensors whose maximum over all sources gives the common range of an observer."""
        low, high = self.range_of(s, channels)
        # nonfinite="propagate" lets NaN in, which has no place in a maximum.
        return [
            part
            for extreme in (-low, high)
            for part in (extreme.nan_to_num(-INF, INF, -INF), extreme.isnan().to(self.dtype))
        ]

    def range_from(self, extremes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The common range from the maxima of `extremes`."""
        low, low_is_nan, high, high_is_nan = extremes
        nan = torch.full_like(low, torch.nan)
        return torch.where(low_is_nan > 0, nan, -low), torch.where(high_is_nan > 0, nan, high)

    def summands(self, s: Statistics, channels: int, common: tuple[Tensor, Tensor]) -> list[Tensor]:
        """What of `s` is added up over all sources: counts, and the parts of an average."""
        count = s.nonfinite_count
        parts = [common[0].new_zeros(1) if count is None else self.flat(count)]
        low, high = self.range_of(s, channels)
        if s.averages:
            seen = ~Range(low, high).unobserved
            parts += [seen.to(self.dtype), low.where(seen, 0.0), high.where(seen, 0.0)]
        elif s.histogram is not None:
            compute = torch.float64 if s.histogram.dtype == torch.float64 else torch.float32
            counts = self.flat(s.histogram).reshape(-1, s.histogram.shape[-1])
            if len(counts) != channels:  # none yet
                counts = counts.new_zeros(channels, s.histogram.shape[-1])
            for row, a, b, to_a, to_b in zip(counts, low, high, *common, strict=True):
                moved = moved_histogram(row, a, b, to_a, to_b, s.upsample_rate, compute)
                parts.append(moved.where(a <= b, 0.0))
        return parts


def _reduced(
    parts: Sequence[Sequence[Sequence[Tensor]]], reduction: _Reduction
) -> list[list[Tensor]]:
    """Reduce, over sources, what each of them has for each observer, in one flat tensor."""
    lengths = [[part.numel() for part in of_observer] for of_observer in parts[0]]
    flats = [torch.cat([p for of_observer in source for p in of_observer]) for source in parts]
    flat = reduction(torch.stack(flats))
    pieces = iter(flat.split_with_sizes([n for of_observer in lengths for n in of_observer]))
    return [[next(pieces) for _ in of_observer] for of_observer in lengths]


def merged(
    sources: Sequence[Sequence[Statistics]],
    channels: Sequence[int | None],
    across_max: _Reduction = lambda flat: flat,
    across_sum: _Reduction = lambda flat: flat,
    device: torch.device | None = None,
) -> list[Merged]:
    """Put statistics together, observer by observer; nothing that is given is changed.

    Args:
        sources: for each source its observers, in the same order everywhere.
        channels: for each observer how many channels it has, None per tensor.
        across_max: the maximum of a flat tensor over all processes, element by element.
        across_sum: the sum likewise.
        device: where to do it; by default on the CPU.
    """
    device = device or torch.device("cpu")
    place = _Place(device, _widest_dtype(device))
    sizes = [1 if count is None else count for count in channels]
    extremes = [[place.extremes(s, n) for s, n in zip(own, sizes, strict=True)] for own in sources]
    maxima = _reduced(extremes, lambda flats: across_max(flats.amax(0)))
    ranges = [place.range_from(of_observer) for of_observer in maxima]
    summands = [
        [place.summands(s, n, common) for s, n, common in zip(own, sizes, ranges, strict=True)]
        for own in sources
    ]
    sums = _reduced(summands, lambda flats: across_sum(flats.sum(0)))
    results = []
    for s, common, (nonfinite, *rest), count in zip(
        sources[0], ranges, sums, channels, strict=True
    ):
        low, high = common
        histogram = None
        if s.averages:
            number, low_sum, high_sum = rest
            low = torch.where(number > 0, low_sum / number, low)
            high = torch.where(number > 0, high_sum / number, high)
        elif s.histogram is not None:
            bins = s.histogram.shape[-1]
            rows = torch.cat(rest) if rest else low.new_empty(0)
            histogram = rows.reshape((bins,) if count is None else (count, bins))
        shape = () if count is None else (count,)
        results.append(Merged(low.reshape(shape), high.reshape(shape), histogram, int(nonfinite)))
    return results


def agreed_channels(sources: Iterable[Descriptions]) -> list[int | None]:
    """For each observer how many channels those have that know it; None per tensor."""
    counts: dict[str, int | None] = {}
    for source in sources:
        for name, (channels, _) in source.items():
            counts[name] = channels if not counts.get(name) else counts[name]
    return list(counts.values())


@torch.no_grad()
def write(model: nn.Module, statistics: Sequence[Statistics], new: Sequence[Merged]) -> None:
    """Write merged statistics into the observers of `model`.

    Fake-quantizers get the scale and zero point that follow.
    """
    modules = dict(model.named_modules())
    for s, m in zip(statistics, new, strict=True):
        module = modules[s.name]
        for name, value in (("min_val", m.min_val), ("max_val", m.max_val)):
            resized(module, name, value.shape).copy_(value)
        if s.histogram is not None and m.histogram is not None:
            resized(module, "histogram", m.histogram.shape).copy_(m.histogram)
        if s.nonfinite_count is not None:
            s.nonfinite_count.fill_(m.nonfinite_count)
    for module in modules.values():
        refresh_qparams(module)


# --------------------------------------------------------------------------------------------
# merge


def merge(a: _Mergeable, b: _Mergeable, *more: _Mergeable) -> _Mergeable:
    """Merge statistics that several runs have gathered into one set.

    Running ranges and histograms of shards become those of one run over all the data: exactly for
    running ranges, and for histograms whose ranges agree; other histograms are resampled, as they
    are where an observer's range grows. Moving averages become the unweighted mean of those that
    have seen something. Pass all runs in one call, since a mean of means is another mean.

    Args:
        a: an observer, a fake-quantizer or a state dict from
            :func:`fastquant.get_observer_state_dict`, also one read back with `torch.load`.
        b: another of the same kind and configuration.
        more: any number of further ones.

    Returns:
        The merged statistics: a copy of `a` with these in it. A fake-quantizer's scale and
        zero point are those of the merged range. What is given is not changed.

    Raises:
        TypeError: the arguments are neither observers nor state dicts, or some of either.
        ValueError: they do not go together, or one is corrupt; the message names the observer.
    """
    sources = (a, b, *more)
    if all(isinstance(source, nn.Module) for source in sources):
        for source in sources:
            if not _is_activation_post_process(source):
                raise TypeError(
                    "merge takes observers, fake-quantizers or their state dicts, got "
                    f"{type(source).__name__}; for a model use get_observer_state_dict(model)"
                )
        return _merged_modules(sources)  # type: ignore[arg-type, return-value]
    if all(isinstance(source, Mapping) for source in sources):
        return _merged_states(sources)  # type: ignore[arg-type, return-value]
    kinds = ", ".join(type(source).__name__ for source in sources)
    raise TypeError(f"merge takes observers, or state dicts of observers, got {kinds}")


def _merge(sources: Sequence[Sequence[Statistics]]) -> list[Merged]:
    labels = ["a", "b", *(f"argument {i + 3}" for i in range(len(sources) - 2))]
    descriptions = {label: described(source) for label, source in zip(labels, sources, strict=True)}
    problem = disagreement(descriptions)
    if problem is not None:
        raise ValueError(f"cannot merge: {problem}")
    if not sources[0]:
        return []
    order = [s.name for s in sources[0]]
    aligned = [sorted(source, key=lambda s: order.index(s.name)) for source in sources]
    with torch.no_grad():
        return merged(aligned, agreed_channels(descriptions.values()))


def _merged_modules(sources: Sequence[nn.Module]) -> nn.Module:
    kinds = {type(source).__name__ for source in sources}
    if len(kinds) > 1:
        raise TypeError(f"merge takes observers of one class, got {', '.join(sorted(kinds))}")
    result = copy.deepcopy(sources[0])
    new = _merge([statistics_of(source) for source in sources])
    write(result, statistics_of(result), new)
    return result


def _recipe(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the state of a fastquant observer says about the observer; see its `_recipe`."""
    recipe = getattr(state, "_metadata", {}).get(name, {}).get("fastquant")
    if recipe is None:
        raise ValueError(
            f"cannot merge: the state of {_named(name)} does not say whether it is a moving "
            "average, as states from get_observer_state_dict of fastquant's observers do (copies "
            "of them as plain dicts do not); load the states into observers and merge those"
        )
    try:
        if recipe["averaging_constant"] is not None:
            check_averaging_constant(recipe["averaging_constant"])
        check_integer("upsample_rate", recipe["upsample_rate"], least=1)
        check_nonfinite(recipe["nonfinite"])
        quant_min, quant_max, scheme, symmetric_zero_point = recipe["scheme"]
        check_quantized_range(quant_min, quant_max, holds_zero=True)
        Scheme(scheme)
        check_integer("symmetric_zero_point", symmetric_zero_point)
        # States of earlier versions name none.
        check_range_method(recipe.get("range_method", "l2"))
        check_percentile(recipe.get("percentile", 100.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot merge: what the state of {_named(name)} says of its observer is wrong: {error}"
        ) from error
    return recipe  # type: ignore[no-any-return]


def _statistics_in(state: Mapping[str, Any], label: str) -> list[Statistics]:
    found = []
    for key in state:
        *path, leaf = key.split(".")
        if leaf != "min_val":
            continue
        name = ".".join(path)
        prefix = f"{name}." if name else ""
        recipe = _recipe(state, name)
        low, high = state[key], state.get(f"{prefix}max_val")
        histogram = state.get(f"{prefix}histogram")
        finite = recipe["nonfinite"] != "propagate"
        may_cross = recipe["averaging_constant"] is not None
        problem = range_error(
            low, high, histogram, finite=finite, may_cross=may_cross
        ) or eps_error(state.get(f"{prefix}eps"))
        if problem is not None:
            raise ValueError(f"cannot merge: {_named(name)} in {label}: {problem}")
        found.append(
            Statistics(
                name=name,
                min_val=low,
                max_val=high,  # type: ignore[arg-type]
                histogram=histogram,
                nonfinite_count=None,
                averages=recipe["averaging_constant"] is not None,
                upsample_rate=recipe["upsample_rate"],
                traits={
                    "averaging constant": recipe["averaging_constant"],
                    "scheme": tuple(recipe["scheme"]),
                },
            )
        )
    return found


def _range_of(
    histogram: Tensor, low: Tensor, high: Tensor, recipe: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The range that the observer of a state would choose."""
    method = RANGE_METHOD_CODES[recipe.get("range_method", "l2")]
    settings = (method, recipe.get("percentile", 100.0), recipe["levels"], *recipe["scheme"])
    return histogram_range(histogram, low, high, *settings)


def _merged_states(states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    sources = [_statistics_in(state, f"state {i + 1}") for i, state in enumerate(states)]
    new = _merge(sources)
    result: OrderedDict[str, Any] = OrderedDict(
        (key, value.clone() if isinstance(value, Tensor) else value)
        for key, value in states[0].items()
    )
    result._metadata = copy.deepcopy(getattr(states[0], "_metadata", {}))  # type: ignore[attr-defined]
    for s, m in zip(sources[0], new, strict=True):
        prefix = f"{s.name}." if s.name else ""
        low = m.min_val.to(s.min_val.dtype)
        high = m.max_val.to(s.max_val.dtype)
        result[f"{prefix}min_val"], result[f"{prefix}max_val"] = low, high
        if s.histogram is not None and m.histogram is not None:
            result[f"{prefix}histogram"] = m.histogram.to(s.histogram.dtype)
        owner = prefix.removesuffix("activation_post_process.")
        if owner != prefix and f"{owner}scale" in result and not is_unobserved(low, high):
            recipe = _recipe(states[0], s.name)
            if s.histogram is not None:
                low, high = _range_of(result[f"{prefix}histogram"], low, high, recipe)
            eps = result[f"{prefix}eps"]
            scale, zero_point = choose_qparams(low, high, eps, *recipe["scheme"])
            for name, value in (("scale", scale), ("zero_point", zero_point)):
                result[f"{owner}{name}"] = value.to(result[f"{owner}{name}"].dtype)
    return result
