"""Observers, histogram and fake-quantizers on a GPU, for tensors of 128 elements to 2^30.

Beside each module of fastquant's: torch.ao's, the same as one function by torch.compile, and, from
64 M elements on, what the memory allows: copying the tensor, or reading it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization as torch_ao
from torch import Tensor, nn

import fastquant
import gpu_formulas as formulas
from gpu_formulas import Compiler, Formula, View
from gpu_timing import Bench, Job
from harness import OURS, THEIRS, Run, Suite, at_least, at_most

COMPILED, COPY = "torch.compile", "copy"
# Which of the two is the faster depends on the dtype.
READS: dict[str, Callable[[Tensor], object]] = {"sum": torch.sum, "amax": torch.amax}

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sizes:
    """Which sizes are measured, as images with channels.

    Attributes:
        shapes: all of them.
        usual: numbers of elements of activations in CNNs, for which the targets are higher.
        large: number of elements from which on memory is the limit.
        few: for fewer elements than these, reductions are compiled once more.
        compiled_for: what they are compiled for, few elements and more.
    """

    shapes: Sequence[Shape]
    usual: tuple[int, int]
    large: int
    few: int
    compiled_for: tuple[Shape, Shape]


SIZES = Sizes(
    shapes=(
        *((2, 4, 4, 4), (2, 8, 8, 8), (2, 32, 8, 16), (4, 64, 16, 16)),  # 128 to 64 K
        *((4, 64, 28, 28), (4, 64, 56, 56), (16, 64, 56, 56), (32, 128, 56, 56)),  # 200 k to 13 M
        *((32, 128, 128, 128), (256, 64, 128, 128), (1024, 64, 128, 128)),  # 64 M to 1 G
    ),
    usual=(200_000, 13_000_000),
    large=1 << 26,
    few=400_000,
    compiled_for=((4, 64, 28, 28), (32, 128, 128, 128)),
)
REHEARSED = Sizes(
    shapes=((2, 4, 4, 4), (4, 8, 8, 8), (8, 16, 16, 8)),
    usual=(2048, 2048),
    large=1 << 14,
    few=4096,
    compiled_for=((4, 8, 8, 8), (8, 16, 16, 8)),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """Where channels are: `place` gives a shape of images the order that the tensor has."""

    name: str
    axis: int | None
    place: Callable[[Shape], Shape] = lambda shape: shape
    memory_format: torch.memory_format = torch.contiguous_format

    def empty(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(
            self.place(shape), dtype=dtype, device=device, memory_format=self.memory_format
        )


LAYOUTS = (
    Layout("per tensor", None),
    Layout("axis 1", 1),
    Layout("axis 1", 1, memory_format=torch.channels_last),
    Layout("axis 0", 0, lambda shape: (shape[1], shape[0], shape[2], shape[3])),
    Layout("last axis", 3, lambda shape: (shape[0], shape[2], shape[3], shape[1])),
)

PER_CHANNEL: dict[str, Any] = {
    "quant_min": -128,
    "quant_max": 127,
    "dtype": torch.qint8,
    "qscheme": torch.per_channel_symmetric,
}


def observer(ns: Any, axis: int | None) -> nn.Module:
    if axis is None:
        module: nn.Module = ns.MinMaxObserver()
    else:
        module = ns.PerChannelMinMaxObserver(ch_axis=axis)
    return module


def fake_quantizer(make: Any, ns: Any, axis: int | None) -> Any:
    if axis is None:
        return make(ns.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    return make(ns.MovingAveragePerChannelMinMaxObserver, ch_axis=axis, **PER_CHANNEL)


def call(function: Callable[[Tensor], object], x: Tensor) -> Run:
    """Forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            function(x)

    return run


def for_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    """Forward of a tensor that needs a gradient."""
    leaf = x.detach().requires_grad_()
    return lambda: function(leaf)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    """Forward and backward."""
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, x)


# --------------------------------------------------------------------- what is done to tensors


@dataclass(frozen=True)
class Hint:
    """The size that something is compiled for."""

    name: str
    make: Callable[[], View]


class Kind:
    """One thing that is done to a tensor, by each side.

    Attributes:
        name: of it.
        copies: how many copies of the tensor move as many bytes, reading it alone being half.
        formula: what torch.compile gets.
        variant: what is compiled for itself, of those kinds that have the same formula.
        reduces: whether it has a reduction, for which torch.compile chooses by the size.
    """

    name: str
    copies: float
    formula: Formula
    variant = ""
    reduces = True

    def module(self, ns: Any, x: Tensor, axis: int | None) -> Run:
        """By a library's module, or by the steps that one is made of."""
        raise NotImplementedError

    def by(self, formula: Formula, view: View, compiling: bool = False) -> Run:
        """By the formula, or one that was made of it."""
        raise NotImplementedError

    def compiled(self, compiler: Compiler, view: View, hint: Hint) -> Run | None:
        """By torch.compile."""
        size = hint.name if self.reduces else "any size"
        made = compiler.get(
            self.formula,
            (view.kind, str(view.x.dtype), size, self.variant),
            lambda compiled: self.by(compiled, hint.make(), compiling=True)(),
        )
        return None if made is None else self.by(made, view)


def state(view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A minimum, a maximum, a scale and a zero point, each for all channels."""
    shape = [size for axis, size in enumerate(view.x.shape) if axis not in view.reduced]
    values = (-4.0, 4.0, 8 / 255, 0.0 if shape else 128.0)
    low, high, scale, zero_point = (torch.full(shape, v, device=view.x.device) for v in values)
    return low, high, scale, zero_point


def levels(view: View) -> tuple[int, int]:
    return (-128, 127) if view.channels else (0, 255)


class Observe(Kind):
    name = "observer"
    copies = 0.5
    formula = staticmethod(formulas.observe)

    def module(self, ns: Any, x: Tensor, axis: int | None) -> Run:
        return call(observer(ns, axis).to(x.device), x)

    def by(self, formula: Formula, view: View, compiling: bool = False) -> Run:
        low, high, *_ = state(view)
        return lambda: formula(view.x, view.reduced, low, high)


class Histogram(Kind):
    copies = 0.5
    formula = staticmethod(formulas.histogram)

    def __init__(
        self, name: str = "histogram", values: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        self.name = name
        self._values = values

    def module(self, ns: Any, x: Tensor, axis: int | None) -> Run:
        return call(ns.HistogramObserver().to(x.device), self._values(x))

    def by(self, formula: Formula, view: View, compiling: bool = False) -> Run:
        x, (low, high, *_) = self._values(view.x), state(view)
        counts = torch.zeros(formulas.BINS, device=x.device)
        return lambda: formula(x, counts, low, high)


class FakeQuantize(Kind):
    """Without observing: as in evaluation, or with the gradient."""

    formula = staticmethod(formulas.fake_quantize)
    reduces = False

    def __init__(self, backward: bool) -> None:
        self.variant = "forward + backward" if backward else "forward"
        self.name = f"fake-quantize, {self.variant}"
        self.copies = 2.0 if backward else 1.0
        self._run = with_gradient if backward else call

    def module(self, ns: Any, x: Tensor, axis: int | None) -> Run:
        module = fake_quantizer(ns.FakeQuantize, ns, axis).to(x.device)
        module(x)
        module.disable_observer()
        return self._run(module, x)

    def by(self, formula: Formula, view: View, compiling: bool = False) -> Run:
        _, _, scale, zero_point = state(view)
        rest = (view.channels, scale, zero_point, *levels(view))
        return self._run(lambda x: formula(x, *rest), view.x)


class Fused(Kind):
    """Observing and fake-quantize in training: forward alone, or with the gradient."""

    formula = staticmethod(formulas.fused)

    def __init__(self, backward: bool) -> None:
        self.name = "fused, forward + backward" if backward else "fused, forward"
        self.copies = 2.5 if backward else 1.5
        self._run = with_gradient if backward else for_gradient

    def module(self, ns: Any, x: Tensor, axis: int | None) -> Run:
        module = fake_quantizer(ns.FusedMovingAvgObsFakeQuantize, ns, axis).to(x.device)
        try:
            module(x)
        except RuntimeError:
            if ns is fastquant:
                raise
            # torch.ao's fused op takes fp32 alone; its other module does the same in steps.
            module = fake_quantizer(ns.FakeQuantize, ns, axis).to(x.device)
        return self._run(module, x)

    def by(self, formula: Formula, view: View, compiling: bool = False) -> Run:
        rest = (view.reduced, view.channels, *state(view), *levels(view))
        run = with_gradient if compiling else self._run  # compiles forward alone, too
        return run(lambda x: formula(x, *rest), view.x)


KINDS: tuple[Kind, ...] = (
    Observe(),
    Histogram(),
    FakeQuantize(backward=False),
    FakeQuantize(backward=True),
    Fused(backward=False),
    Fused(backward=True),
)
# Many threads count in one bin, which takes longer; at most that many times as long as reading.
UNEVEN = (
    (Histogram("histogram of rectified values", torch.relu), 2.0),
    (Histogram("histogram of equal values", lambda x: torch.full_like(x, 1.5)), 5.0),
)


# -------------------------------------------------------------------------------- measuring


class Sweep:
    """Adds the rows."""

    def __init__(self, suite: Suite, bench: Bench, sizes: Sizes, compiler: Compiler) -> None:
        self._suite, self._bench, self._sizes, self._compiler = suite, bench, sizes, compiler
        self._key: tuple[Layout, Shape, torch.dtype] | None = None
        self._x = torch.empty(0)

    def jobs(self) -> list[Job]:
        jobs = []
        for layout in LAYOUTS:
            for dtype in DTYPES:
                for shape in self._sizes.shapes:
                    for kind in KINDS:
                        if layout.axis is None or not isinstance(kind, Histogram):
                            jobs.append(self._job(kind, layout, shape, dtype))
        for kind, limit in UNEVEN:
            for dtype in DTYPES:
                shape = self._sizes.compiled_for[1]
                jobs.append(self._job(kind, LAYOUTS[0], shape, dtype, limit))
        return jobs

    def _job(
        self, kind: Kind, layout: Layout, shape: Shape, dtype: torch.dtype, limit: float = 2.0
    ) -> Job:
        run = functools.partial(self._measure, kind, layout, shape, dtype, limit)
        return Job(f"{kind.name}, {layout.name}, {dtype}, {list(shape)}", run)

    def _input(self, layout: Layout, shape: Shape, dtype: torch.dtype) -> Tensor:
        key = (layout, shape, dtype)
        if key != self._key:
            large = self._x.numel() >= self._sizes.large
            self._key, self._x = None, torch.empty(0)
            if large:
                self._bench.gpu.free()
            self._x = layout.empty(shape, dtype, self._bench.device).normal_()
            self._key = key
        return self._x

    def _compiled(self, kind: Kind, layout: Layout, x: Tensor) -> Run | None:
        # Channels in fp32 alone, since compiling takes long.
        if layout.axis is not None and x.dtype != torch.float32:
            return None
        name, shape = ("large", self._sizes.compiled_for[1])
        if x.numel() < self._sizes.few:
            name, shape = ("small", self._sizes.compiled_for[0])

        def make() -> View:
            like = layout.empty(shape, x.dtype, x.device)
            return View.of(like.zero_(), layout.axis)

        return kind.compiled(self._compiler, View.of(x, layout.axis), Hint(name, make))

    def _attempt(self, side: str, kind: Kind, make: Callable[[], Run | None]) -> Run | None:
        """None where a side refuses the tensor."""
        try:
            run = make()
            if run is not None:
                run()
        except Exception as error:
            if not self._bench.gpu.works():
                raise
            reason = (str(error).splitlines() or [repr(error)])[0]
            print(f"{side} fails in {kind.name} of {self._x.dtype}: {reason}", flush=True)
            return None
        return run

    def _measure(
        self, kind: Kind, layout: Layout, shape: Shape, dtype: torch.dtype, limit: float
    ) -> None:
        x = self._input(layout, shape, dtype)
        cases: dict[str, Run | None] = {
            OURS: kind.module(fastquant, x, layout.axis),
            THEIRS: self._attempt(THEIRS, kind, lambda: kind.module(torch_ao, x, layout.axis)),
            COMPILED: self._attempt(COMPILED, kind, lambda: self._compiled(kind, layout, x)),
        }
        is_large = x.numel() >= self._sizes.large
        if is_large and isinstance(kind, Histogram):
            cases |= {name: functools.partial(read, x) for name, read in READS.items()}
        elif is_large:
            cases[COPY] = functools.partial(torch.empty_like(x).copy_, x)
        runs = {name: run for name, run in cases.items() if run is not None}
        timed = self._bench.timed(runs, self._suite.rounds)
        work, input = f"{kind.name}, {layout.name}", self._bench.describe(x)
        add = functools.partial(self._suite.add_rounds, input=input, timed=timed)
        if THEIRS in runs:
            least, most = self._sizes.usual
            target = at_least(2 if least <= x.numel() <= most else 1)
            add(work, value=lambda t: t[THEIRS] / t[OURS], unit="x", target=target)
        else:
            add(work, value=lambda t: t[OURS] * 1e6, unit="µs")
        if COMPILED in runs:
            value = lambda t: t[COMPILED] / t[OURS]  # noqa: E731
            add(f"{work}: against {COMPILED}", value=value, unit="x", target=at_least(1))
        if cases.keys() >= READS.keys():
            value = lambda t: t[OURS] / min(t[name] for name in READS)  # noqa: E731
            add(f"{work}: against a read", value=value, unit="of limit", target=at_most(limit))
        if COPY in runs:
            value = lambda t: t[OURS] / (kind.copies * t[COPY])  # noqa: E731
            name = f"{work}: against {kind.copies:g} copies"
            add(name, value=value, unit="of limit", target=at_most(1 / 0.85))


def measure(suite: Suite, bench: Bench, compile_seconds: float = 60.0) -> None:
    """All rows of the sweep."""
    rehearses = bench.gpu.rehearses
    compiler = Compiler(compile_seconds, "eager" if rehearses else "inductor")
    bench.run(Sweep(suite, bench, REHEARSED if rehearses else SIZES, compiler).jobs())
