"""Statistics gathered apart, put together: `merge`, and what `distributed` shares with it.

How the statistics of several observers of the same tensor become one:

- a running range: the smallest minimum and the largest maximum, which is exact;
- a histogram: over the common range, onto which each is resampled as observing does where the
  range grows; counts add up. Exact where the ranges agree;
- moving averages: the mean of those that have seen something, channel by channel, each weighed
  alike. An observer does not keep how many tensors it has seen;
- counts of non-finite values add up.

What has seen nothing takes no part.
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
    check_quantized_range,
)
from ._core.ranges import INF, is_unobserved, kinds_of_range, range_error
from ._core.schemes import Scheme
from ._core.state import eps_error, resized
from ._native.ops import choose_qparams, search_histogram_range
from ._native.reference import _widest_dtype, moved_histogram
from .fake_quantize import FakeQuantize, FakeQuantizeBase, LearnableFakeQuantize
from .observer import _is_activation_post_process

__all__ = ["merge"]

_Mergeable = TypeVar("_Mergeable", nn.Module, Mapping[str, Any])
_Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """What one observer has gathered; tensors of its own, or of a state dict.

    `traits` are what observers have to have in common to be merged, by names for messages.
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
        bins = None if self.histogram is None else self.histogram.numel()
        return {"number of bins": bins, "moving average": self.averages, **self.traits}


def is_range_observer(module: nn.Module) -> bool:
    """Whether a module keeps statistics that can be merged."""
    return (
        _is_activation_post_process(module)
        and not isinstance(module, FakeQuantizeBase)
        and all(isinstance(module._buffers.get(name), Tensor) for name in ("min_val", "max_val"))
    )


def statistics_of(model: nn.Module) -> list[Statistics]:
    """The statistics of every observer in `model`, by the names of the observers."""
    found = []
    for name, module in model.named_modules():
        if not is_range_observer(module):
            continue
        buffers = module._buffers
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
                min_val=buffers["min_val"],
                max_val=buffers["max_val"],
                histogram=buffers.get("histogram"),
                nonfinite_count=buffers.get("nonfinite_count"),
                averages=hasattr(module, "averaging_constant"),
                upsample_rate=int(getattr(module, "upsample_rate", 1)),
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
    wide = _widest_dtype(device)
    sizes = [1 if count is None else count for count in channels]

    def on_device(value: Tensor) -> Tensor:
        return value.detach().to(device, wide).reshape(-1)

    def range_of(s: Statistics, size: int) -> tuple[Tensor, Tensor]:
        if s.min_val.numel() == size:
            return on_device(s.min_val), on_device(s.max_val)
        nothing = torch.full((size,), INF, dtype=wide, device=device)
        return nothing, -nothing

    # The first round: extremes. NaN, which "propagate" lets in, is no number to be the larger of.
    flats = []
    for source in sources:
        parts = []
        for s, size in zip(source, sizes, strict=True):
            low, high = range_of(s, size)
            for extreme in (-low, high):
                parts += [extreme.nan_to_num(-INF, INF, -INF), extreme.isnan().to(wide)]
        flats.append(torch.cat(parts))
    extremes = across_max(torch.stack(flats).amax(0)).split_with_sizes(
        [size for size in sizes for _ in range(4)]
    )
    ranges = []
    for i in range(len(sizes)):
        low, low_is_nan, high, high_is_nan = extremes[4 * i : 4 * i + 4]
        nan = torch.tensor(float("nan"), dtype=wide, device=device)
        ranges.append(
            (torch.where(low_is_nan > 0, nan, -low), torch.where(high_is_nan > 0, nan, high))
        )

    # The second round: sums.
    flats = []
    lengths: list[int] = []
    for source in sources:
        parts = []
        for s, size, (low, high) in zip(source, sizes, ranges, strict=True):
            parts.append(_count(s.nonfinite_count, device, wide))
            own_low, own_high = range_of(s, size)
            if s.averages:
                seen = ~kinds_of_range(own_low, own_high).unobserved
                zero = torch.zeros((), dtype=wide, device=device)
                parts += [
                    seen.to(wide),
                    torch.where(seen, own_low, zero),
                    torch.where(seen, own_high, zero),
                ]
            elif s.histogram is not None:
                compute = torch.float64 if s.histogram.dtype == torch.float64 else torch.float32
                old = on_device(s.histogram)
                moved = moved_histogram(
                    old,
                    own_low.reshape(()),
                    own_high.reshape(()),
                    low.reshape(()),
                    high.reshape(()),
                    s.upsample_rate,
                    compute,
                )
                parts.append(torch.where(own_low <= own_high, moved, 0.0))
        lengths = [part.numel() for part in parts]
        flats.append(torch.cat(parts))
    sums = list(across_sum(torch.stack(flats).sum(0)).split_with_sizes(lengths))

    results = []
    for s, (lowest, highest), count in zip(sources[0], ranges, channels, strict=True):
        low, high = lowest, highest
        nonfinite = int(sums.pop(0))
        histogram = None
        if s.averages:
            number, low_sum, high_sum = sums.pop(0), sums.pop(0), sums.pop(0)
            low = torch.where(number > 0, low_sum / number, low)
            high = torch.where(number > 0, high_sum / number, high)
        elif s.histogram is not None:
            histogram = sums.pop(0)
        shape = () if count is None else (count,)
        results.append(Merged(low.reshape(shape), high.reshape(shape), histogram, nonfinite))
    return results


def _count(nonfinite_count: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    if nonfinite_count is None:
        return torch.zeros(1, dtype=dtype, device=device)
    return nonfinite_count.detach().to(device, dtype).reshape(1)


def agreed_channels(sources: Iterable[Descriptions]) -> list[int | None]:
    """For each observer how many channels those have that know it; None per tensor."""
    counts: dict[str, int | None] = {}
    for source in sources:
        for name, (channels, _) in source.items():
            counts[name] = channels if not counts.get(name) else counts[name]
    return list(counts.values())


@torch.no_grad()
def write(model: nn.Module, statistics: Sequence[Statistics], new: Sequence[Merged]) -> None:
    """Give the observers of `model` new statistics, and fake-quantizers the qparams of these."""
    modules = dict(model.named_modules())
    for s, m in zip(statistics, new, strict=True):
        module = modules[s.name]
        for name, value in (("min_val", m.min_val), ("max_val", m.max_val)):
            resized(module, name, value.shape).copy_(value)
        if s.histogram is not None and m.histogram is not None:
            s.histogram.copy_(m.histogram.reshape(s.histogram.shape))
        if s.nonfinite_count is not None:
            s.nonfinite_count.fill_(m.nonfinite_count)
    for module in modules.values():
        _refresh_qparams(module)


def _refresh_qparams(module: nn.Module) -> None:
    """Scale and zero point of a fake-quantizer that takes them from what was observed."""
    observer = getattr(module, "activation_post_process", None)
    if not isinstance(observer, nn.Module) or not is_range_observer(observer):
        return
    low, high = observer._buffers["min_val"], observer._buffers["max_val"]
    assert low is not None
    assert high is not None
    if is_unobserved(low, high):
        return
    if isinstance(module, LearnableFakeQuantize):
        if module.static_enabled:
            scale, zero_point = observer.calculate_qparams()  # type: ignore[operator]
            module.scale.data.copy_(scale)
            module.zero_point.data.copy_(zero_point)
    elif isinstance(module, FakeQuantize) or (
        isinstance(module, FakeQuantizeBase) and {"scale", "zero_point"} <= module._buffers.keys()
    ):
        scale, zero_point = module.calculate_qparams()
        resized(module, "scale", scale.shape).copy_(scale)
        resized(module, "zero_point", zero_point.shape).copy_(zero_point)


# --------------------------------------------------------------------------------------------
# merge


def merge(a: _Mergeable, b: _Mergeable, *more: _Mergeable) -> _Mergeable:
    """One set of statistics out of those that separate runs have gathered.

    Running ranges and histograms of shards become those of one run over all of it: exactly for
    running ranges, and for histograms where the ranges agree; where not, to within the
    resampling that observing does too. Moving averages become the mean of those that have seen
    something, each weighed alike, so give all runs in one call: a mean of means is another one.

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
                low, high = search_histogram_range(
                    result[f"{prefix}histogram"], low, high, recipe["levels"]
                )
            eps = result[f"{prefix}eps"]
            scale, zero_point = choose_qparams(low, high, eps, *recipe["scheme"])
            for name, value in (("scale", scale), ("zero_point", zero_point)):
                result[f"{owner}{name}"] = value.to(result[f"{owner}{name}"].dtype)
    return result
