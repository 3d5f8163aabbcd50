"""Merging observers, and the states of observers, that have seen different data."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import fastquant as fq
from fastquant import observer as ob
from oracle import assert_same_state, assert_unchanged, snapshot
from shards import EXACT, Model, observe, one_process, shards


def gathered_apart(ranks: int, *, alike: bool) -> list[Model]:
    models = []
    for tensors in shards(ranks, alike=alike):
        model = Model()
        observe(model, tensors)
        models.append(model)
    return models


@pytest.mark.parametrize("name", EXACT)
def test_merge_of_observers_is_one_run_over_all(name: str) -> None:
    parts = [getattr(model, name) for model in gathered_apart(3, alike=True)]
    before = [snapshot(part) for part in parts]
    merged = fq.merge(*parts)
    assert_same_state(merged, getattr(one_process(3, alike=True), name))
    for part, state in zip(parts, before, strict=True):
        assert_unchanged(part, state)


def as_read_back(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("alike", [True, False])
def test_merge_of_states_is_merge_of_observers(alike: bool) -> None:
    models = gathered_apart(2, alike=alike)
    state = fq.merge(*(as_read_back(model) for model in models))
    read = Model()
    read.load_state_dict(state)
    for name, part in models[0].named_children():
        if name != "fixed":
            assert_same_state(getattr(read, name), fq.merge(part, getattr(models[1], name)))


def test_merge_with_something_unobserved_is_the_other() -> None:
    model = gathered_apart(1, alike=False)[0]
    for name, part in model.named_children():
        if name != "fixed":
            for pair in ((part, getattr(Model(), name)), (getattr(Model(), name), part)):
                assert_same_state(fq.merge(*pair), part)


def test_merge_refuses_what_does_not_go_together() -> None:
    a, b = gathered_apart(2, alike=False)
    with pytest.raises(ValueError, match="number of bins is 64 in a and 32 in b"):
        fq.merge(a.histogram, ob.HistogramObserver(bins=32))
    with pytest.raises(TypeError, match="one class"):
        fq.merge(a.histogram, b.minmax)
    with pytest.raises(TypeError, match="get_observer_state_dict"):
        fq.merge(a, b)
    with pytest.raises(TypeError, match="observers, or state dicts"):
        fq.merge(a.minmax, b.minmax.state_dict())  # type: ignore[type-var]
    with pytest.raises(ValueError, match="does not say whether it is a moving average"):
        fq.merge(dict(a.minmax.state_dict()), dict(b.minmax.state_dict()))
    state = as_read_back(b)
    state["minmax.min_val"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"minmax in state 2: .*must be finite"):
        fq.merge(as_read_back(a), state)
