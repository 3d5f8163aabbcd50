"""States that are no statistics or do not fit: refused by name, with nothing changed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import fastquant as fq
from fastquant import observer as ob
from fastquant.observer import get_observer_state_dict, load_observer_state_dict
from oracle import assert_same, assert_same_state, assert_unchanged, snapshot
from zoo import OBSERVERS, every_observer

NAN, INF = float("nan"), float("inf")


def calibrated(name: str, seed: int = 0) -> Any:
    module = OBSERVERS[name]()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        module(torch.randn(6, 5, generator=generator))
    return module


CORRUPTIONS: dict[str, Any] = {
    "NaN": lambda low, high: (torch.full_like(low, NAN), high),
    "infinite": lambda low, high: (low, torch.full_like(high, INF)),
    "no tensor": lambda low, high: (low, "gone"),
    "integers": lambda low, high: (low.long(), high.long()),
    "too many axes": lambda low, high: (low.expand(2, 3, *low.shape), high),
    "one size too large": lambda low, high: (low, high.reshape(-1).repeat(2)),
}


@every_observer
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_state_is_refused_by_name_and_changes_nothing(name: str, corruption: str) -> None:
    model = nn.Sequential(calibrated(name, 1))
    before = snapshot(model)
    state = nn.Sequential(calibrated(name)).state_dict()
    low, high = CORRUPTIONS[corruption](state["0.min_val"], state["0.max_val"])
    state["0.min_val"], state["0.max_val"] = low, high
    with pytest.raises(RuntimeError, match=r"state of 0 does not fit.*(min|max)_val"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["minmax", "channels", "histogram"])
def test_a_minimum_above_the_maximum_is_refused(name: str) -> None:
    module = calibrated(name, 1)
    before = snapshot(module)
    state = calibrated(name).state_dict()
    state["min_val"], state["max_val"] = state["max_val"], state["min_val"]
    with pytest.raises(RuntimeError, match="in order"):
        module.load_state_dict(state)
    assert_unchanged(module, before)


@pytest.mark.parametrize("count", [-1.0, NAN, INF])
def test_counts_that_are_none_are_refused(count: float) -> None:
    module = calibrated("histogram", 1)
    before = snapshot(module)
    state = calibrated("histogram").state_dict()
    state["histogram"][3] = count
    with pytest.raises(RuntimeError, match="histogram must hold counts"):
        module.load_state_dict(state)
    assert_unchanged(module, before)


@every_observer
@pytest.mark.parametrize("strict", [True, False])
def test_a_truncated_state_changes_nothing(name: str, strict: bool) -> None:
    module = calibrated(name, 1)
    before = snapshot(module)
    state = calibrated(name).state_dict()
    del state["max_val"]
    if strict:
        with pytest.raises(RuntimeError, match=r'Missing key.*"max_val"'):
            module.load_state_dict(state)
    else:
        assert module.load_state_dict(state, strict=False).missing_keys == ["max_val"]
    assert_unchanged(module, before)


def test_propagated_nan_loads_where_it_may_be() -> None:
    written = ob.MinMaxObserver(nonfinite="propagate")
    written(torch.tensor([1.0, NAN]))
    read = ob.MinMaxObserver(nonfinite="propagate")
    read.load_state_dict(written.state_dict())
    assert bool(read.min_val.isnan())


def test_what_a_narrow_buffer_cannot_hold_is_refused() -> None:
    state = ob.MinMaxObserver(factory_kwargs={"dtype": torch.float64}).state_dict()
    state["min_val"].fill_(-1e300)
    state["max_val"].fill_(1e300)
    module = calibrated("minmax")
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="must be finite"):
        module.load_state_dict(state)
    assert_unchanged(module, before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scale", torch.tensor([NAN]), "scale must be finite"),
        ("scale", torch.tensor([-1.0]), "scale must be positive"),
        ("scale", torch.ones(2), "size mismatch for scale"),
        ("zero_point", 3, "zero_point must be a tensor"),
    ],
)
def test_qparams_that_are_none_are_refused(key: str, value: Any, message: str) -> None:
    module = fq.default_fused_act_fake_quant()
    module(torch.randn(5))
    before = snapshot(module)
    state = module.state_dict()
    state[key] = value
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert_unchanged(module, before)


FAULTS: dict[str, Any] = {
    "NaN": lambda v: torch.full_like(v, NAN) if v.is_floating_point() else "gone",
    "infinite": lambda v: torch.full_like(v, INF) if v.is_floating_point() else 3,
    "beyond fp32": lambda v: torch.full_like(v, 1e300, dtype=torch.float64),
    "of another shape": lambda v: v.reshape(1, -1).repeat(2, 3),
    "no tensor": lambda v: None,
    "without data": lambda v: v.to("meta"),
    "complex": lambda v: v.to(torch.complex64),
    "missing": lambda v: ...,
}
NUMBERS = ("min_val", "max_val", "histogram", "eps", "scale")
MODULES: dict[str, Any] = {
    **OBSERVERS,
    "fake quantize": lambda: fq.FakeQuantize(ob.MinMaxObserver),
    "per channel": fq.default_per_channel_weight_fake_quant,
    "by histogram": fq.default_histogram_fake_quant,
    "fused": fq.default_fused_act_fake_quant,
    "fixed": fq.default_fixed_qparams_range_0to1_fake_quant,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_fault_in_any_entry_leaves_all_of_the_module(name: str, fault: str, assign: bool) -> None:
    """A fake-quantizer and its observer load together or not at all."""
    read, written = MODULES[name](), MODULES[name]()
    read(torch.randn(6, 5))
    written(torch.randn(6, 5) * 3)
    before = snapshot(read)
    for key, value in written.state_dict().items():
        entry = key.split(".")[-1]
        if (
            # Flags may be any number, a meta tensor is one that can be assigned, and states
            # without eps are old ones.
            (entry not in NUMBERS and fault in ("NaN", "infinite", "beyond fp32", "complex"))
            or (assign and fault == "without data")
            or (entry == "eps" and fault == "missing")
        ):
            continue
        state = written.state_dict()
        kept = {k: v.clone() for k, v in state.items()}
        state[key] = FAULTS[fault](value)
        if state[key] is ...:
            del state[key]
        with pytest.raises(RuntimeError, match=entry):
            read.load_state_dict(state, assign=assign)
        assert_unchanged(read, before)
        # Nor does what was offered change.
        for other, v in kept.items():
            if other != key:
                assert_same(state[other], v, other)
    read.load_state_dict(written.state_dict(), assign=assign)
    assert_same_state(read, written)


def test_one_bad_observer_leaves_the_whole_model_as_it_was() -> None:
    def model(seed: int) -> nn.Sequential:
        result = nn.Sequential(*(nn.Linear(5, 5) for _ in OBSERVERS))
        for layer, name in zip(result, OBSERVERS, strict=True):
            layer.activation_post_process = calibrated(name, seed)
        return result

    read = model(1)
    before = snapshot(read)
    for broken in range(len(OBSERVERS)):
        state = get_observer_state_dict(model(0))
        state[f"{broken}.activation_post_process.min_val"] = torch.full((5,), NAN)
        with pytest.raises(RuntimeError, match=rf"{broken}\.activation_post_process"):
            load_observer_state_dict(read, state)
        assert_unchanged(read, before)
        cut = OrderedDict(list(get_observer_state_dict(model(0)).items())[: 3 * broken + 2])
        with pytest.raises(RuntimeError, match="missing keys"):
            load_observer_state_dict(read, cut)
        assert_unchanged(read, before)
