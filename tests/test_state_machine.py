"""Any sequence of observing, toggling, saving, loading and converting, beside torch.ao's."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.ao.quantization as tq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import fastquant as fq
from oracle import assert_same, assert_same_state, quiet, rounded_past
from strategies import RANGES, random_values

KINDS: dict[str, Any] = {
    "minmax": lambda q: q.MinMaxObserver(),
    "average": lambda q: q.MovingAverageMinMaxObserver(averaging_constant=0.3),
    "histogram": lambda q: q.HistogramObserver(bins=32),
    "channels": lambda q: q.PerChannelMinMaxObserver(ch_axis=1),
    "fake quantize": lambda q: q.FakeQuantize(q.MinMaxObserver, 0, 127),
    "fake quantize by average": lambda q: q.FakeQuantize(q.MovingAverageMinMaxObserver, 0, 255),
    "fused": lambda q: (
        q.FusedMovingAvgObsFakeQuantize
        if q is fq
        # torch's fused module has qparams of its own; the unfused one is what it stands for.
        else q.FakeQuantize
    )(q.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8),
}
seeds = st.integers(0, 2**16)


class Beside(RuleBasedStateMachine):
    """A module of ours and torch.ao's, to which the same happens."""

    ours: Any
    theirs: Any

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: dict[str, tuple[bytes, bytes]] = {}
        self.kind = "minmax"
        self.make("minmax")

    def make(self, kind: str) -> None:
        self.kind = kind
        with quiet():
            self.ours, self.theirs = KINDS[kind](fq), KINDS[kind](tq)

    @property
    def is_fake_quant(self) -> bool:
        return isinstance(self.ours, fq.FakeQuantizeBase)

    @rule(kind=st.sampled_from(tuple(KINDS)))
    def starts_anew(self, kind: str) -> None:
        self.make(kind)

    @rule(
        seed=seeds,
        kind=st.sampled_from(tuple(RANGES)),
        rows=st.integers(1, 9),
        outer=st.sampled_from((0, 2)),
    )
    def observes(self, seed: int, kind: str, rows: int, outer: int) -> None:
        x = random_values((rows, 3) if not outer else (rows, 3, outer), torch.float32, seed, kind)
        with quiet():
            try:
                expected = self.theirs(x)
            except AssertionError:
                # Moving averages of one value have rounded past each other.
                assert rounded_past(getattr(self.theirs, "activation_post_process", self.theirs))
                self.make(self.kind)
                return
            assert_same(self.ours(x), expected, "output")

    @precondition(lambda self: self.is_fake_quant)
    @rule(observing=st.booleans(), quantizing=st.booleans())
    def toggles(self, observing: bool, quantizing: bool) -> None:
        for module in (self.ours, self.theirs):
            module.enable_observer(observing)
            module.enable_fake_quant(quantizing)

    @rule()
    def forgets(self) -> None:
        if self.kind in ("minmax", "average", "channels"):
            self.ours.reset_min_max_vals()
            self.theirs.reset_min_max_vals()

    @rule()
    def saves(self) -> None:
        files = []
        for module in (self.ours, self.theirs):
            file = io.BytesIO()
            torch.save(module.state_dict(), file)
            files.append(file.getvalue())
        self.checkpoints[self.kind] = (files[0], files[1])

    @precondition(lambda self: self.kind in self.checkpoints)
    @rule(crossed=st.booleans())
    def loads(self, crossed: bool) -> None:
        files = self.checkpoints[self.kind]
        mine, theirs = reversed(files) if crossed else files
        self.ours.load_state_dict(torch.load(io.BytesIO(mine)))
        self.theirs.load_state_dict(torch.load(io.BytesIO(theirs)))

    @rule()
    def is_copied(self) -> None:
        self.ours, self.theirs = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)

    @invariant()
    def states_agree(self) -> None:
        if self.kind == "fused":
            for (name, mine), theirs in zip(
                self.ours.state_dict().items(), self.theirs.state_dict().values(), strict=True
            ):
                assert_same(mine, theirs.to(mine.dtype), name)
        else:
            assert_same_state(self.ours, self.theirs)

    @invariant()
    def quantization_parameters_agree(self) -> None:
        with quiet():
            try:
                expected = self.theirs.calculate_qparams()
            except AssertionError:
                return
            for mine, theirs in zip(self.ours.calculate_qparams(), expected, strict=True):
                assert_same(mine, theirs, "qparams")


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
