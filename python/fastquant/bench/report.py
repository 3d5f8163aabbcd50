"""What a measurement found, as values, as JSON and as a table for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .machine import machine
from .timing import Summary, readable_time

FLOAT, OURS, THEIRS = "float", "fastquant", "torch.ao"

# Quartiles that are further apart than this, as a share of the median, make a comparison doubtful.
_WIDE = 0.2


_ALONE = (
    "Here each observer runs alone. In whole steps, fastquant runs them as one with batch norm, "
    "ReLU or a sum where it can."
)


@dataclass(frozen=True)
class Layer:
    """What one layer, or its observers or its weight's, cost in one forward.

    Attributes:
        name: path in the model.
        kind: its class.
        shape: of the first tensor that the layer, or its observer, gets.
        calls: how many calls one forward makes.
        seconds: time of all these calls, as median and quartiles over the rounds, for "fastquant"
            and, where torch.ao ran, "torch.ao".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: int
    seconds: dict[str, Summary]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: times in seconds, as median and quartiles of the rounds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "calls": self.calls,
            "seconds": {name: vars(summary) for name, summary in self.seconds.items()},
        }


def caveats(seconds: Mapping[str, list[float]], rounds: int, undisturbed: int) -> list[str]:
    """Why times may mislead, one sentence each; empty if nothing suggests that they do.

    Args:
        seconds: one number per round, by what was timed.
        rounds: how many there were.
        undisturbed: how many of them had the processors to themselves.
    """
    found = []
    if 2 * undisturbed < rounds:
        found.append(
            f"other work took the processors away during {rounds - undisturbed} of "
            f"{rounds} rounds, so the times are too long; measure on an idle machine"
        )
    summaries = {name: Summary.of(times) for name, times in seconds.items()}
    varying = [n for n, s in summaries.items() if s.high - s.low > _WIDE * s.median]
    if varying:
        found.append(
            f"the times of {', '.join(varying)} vary much from round to round (see their "
            "quartiles), so the comparison is uncertain; measure more rounds, or on an idle "
            "machine"
        )
    return found


def conditions(threads: int, machine: Mapping[str, Any], rounds: int, undisturbed: int) -> str:
    """On what, and how, times were measured."""
    return (
        f"{threads} thread{'s' * (threads != 1)}, {machine['isa']}, torch {machine['torch']}; "
        f"median of {rounds} rounds (quartiles), {undisturbed} of them undisturbed by other "
        "processes"
    )


def time_line(label: str, summary: Summary) -> str:
    """A median and its quartiles."""
    return (
        f"{label:<26}{readable_time(summary.median):>9}"
        f"  ({readable_time(summary.low)} to {readable_time(summary.high)})"
    )


def layer_lines(
    what: str, layers: Sequence[Layer], names: Sequence[str], top: int
) -> Iterator[str]:
    """A table of the first `top` layers' times, and of the sum of all.

    Args:
        what: heading of the layers.
        layers: costliest first.
        names: what was timed; where there are two, their ratio is shown, too.
        top: how many layers.
    """
    rows = [*layers[:top], _total(layers, names)]
    width = max(len(layer.name) for layer in rows)
    yield (
        f"{what:<{width + 24}}"
        + "".join(f"{name:>11}" for name in names)
        + ("    ratio" if len(names) > 1 else "")
    )
    for layer in rows:
        sizes = "x".join(map(str, layer.shape))
        calls = f" ({layer.calls} calls)" if layer.calls > 1 else ""
        times = [layer.seconds[name].median for name in names]
        yield (
            f"{layer.name:<{width}}  {sizes + calls:<22}"
            + "".join(f"{readable_time(time):>11}" for time in times)
            + (f"{times[1] / times[0]:8.1f}x" if len(times) > 1 else "")
        )


def _total(layers: Sequence[Layer], names: Sequence[str]) -> Layer:
    """A row that sums up all layers."""
    sums = {name: math.fsum(layer.seconds[name].median for layer in layers) for name in names}
    count = f"all {len(layers)}"
    return Layer(count, "", (), 1, {name: Summary(s, s, s) for name, s in sums.items()})


@dataclass(frozen=True)
class Report:
    """What :func:`fastquant.bench.run` found.

    Attributes:
        model: the model's name.
        mode: "calibrate" or "qat".
        qconfig: the backend whose default qconfig was used.
        inputs: shape and dtype of each input.
        threads: torch's threads meanwhile.
        rounds: how often everything was measured.
        undisturbed: during how many of the rounds no other work took the processors away.
        seconds: time of one forward (mode "calibrate") or training step ("qat") in each round, of
            the model in "float", and prepared by "fastquant" and "torch.ao".
        layers: what the observers of each layer cost, costliest first.
        same_ranges: whether both observed the same ranges: bit for bit in calibration, up to the
            rounding of QAT modules in training; None where torch.ao failed.
        largest_difference: of the ranges' ends, as a fraction of the range's width.
        differences: the layers whose ranges are not the same.
        torch_ao_error: how torch.ao failed; None where it did not.
        machine: processor, instruction set and versions.
    """

    model: str
    mode: str
    qconfig: str
    inputs: list[str]
    threads: int
    rounds: int
    undisturbed: int
    seconds: dict[str, list[float]]
    layers: list[Layer]
    same_ranges: bool | None
    largest_difference: float | None
    differences: list[str]
    torch_ao_error: str | None
    machine: dict[str, Any] = field(default_factory=machine)

    def overhead(self, name: str) -> Summary:
        """Time beyond the float model's in the same round, as a fraction of it.

        Args:
            name: "fastquant" or "torch.ao".

        Returns:
            Median and quartiles over the rounds: 0.25 is a quarter more.

        Raises:
            KeyError: `name` was not timed.
        """
        pairs = zip(self.seconds[name], self.seconds[FLOAT], strict=True)
        return Summary.of([prepared / plain - 1 for prepared, plain in pairs])

    def caveats(self) -> list[str]:
        """Why the times may mislead, one sentence each; empty if nothing suggests that they do."""
        return caveats(self.seconds, self.rounds, self.undisturbed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: times in seconds, as median and quartiles of the rounds."""
        apart = math.inf if self.largest_difference is None else self.largest_difference
        return {
            "model": self.model,
            "mode": self.mode,
            "qconfig": self.qconfig,
            "inputs": self.inputs,
            "threads": self.threads,
            "rounds": self.rounds,
            "undisturbed": self.undisturbed,
            "caveats": self.caveats(),
            "seconds": {name: vars(Summary.of(s)) for name, s in self.seconds.items()},
            "overhead": {name: vars(self.overhead(name)) for name in self._prepared},
            "same_ranges": self.same_ranges,
            # Infinite where ranges cannot be compared; JSON has no infinity.
            "largest_difference": apart if math.isfinite(apart) else None,
            "differences": self.differences,
            "torch_ao_error": self.torch_ao_error,
            "layers": [layer.as_dict() for layer in self.layers],
            "machine": self.machine,
        }

    def table(self, top: int = 10) -> str:
        """The same as text in lines, with the `top` costliest layers."""
        lines = [
            f"{self.model}, {', '.join(self.inputs)}; {self.mode}, {self.qconfig} qconfig; "
            + conditions(self.threads, self.machine, self.rounds, self.undisturbed),
            "",
            *self._model_lines(),
            "",
            *layer_lines(f"observers in one {self._what}", self.layers, self._prepared, top),
            *([_ALONE] if self.mode == "qat" else []),
            "",
            self._verdict(),
            *(f"WARNING: {caveat}." for caveat in self.caveats()),
        ]
        return "\n".join(lines)

    @property
    def _prepared(self) -> list[str]:
        """The libraries whose prepared model was timed."""
        return [name for name in self.seconds if name != FLOAT]

    @property
    def _what(self) -> str:
        return "forward" if self.mode == "calibrate" else "training step"

    def _model_lines(self) -> Iterator[str]:
        for name, seconds in self.seconds.items():
            summary = Summary.of(seconds)
            line = time_line(f"{self._what}, {name}", summary)
            if name != FLOAT:
                line += f"  {self.overhead(name).median:+.0%}"
            yield line

    def _verdict(self) -> str:
        if self.torch_ao_error is not None:
            return f"torch.ao cannot do this: {self.torch_ao_error}"
        if self.same_ranges:
            apart = self.largest_difference
            exactly = f"to within {apart:.0e} of their width" if apart else "bit for bit"
            return f"Both observed the same ranges, {exactly}, in all {len(self.layers)} layers."
        return "RANGES DIFFER in: " + ", ".join(self.differences)
