"""Hooks that users register keep their order and flags through prepare and convert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import nn

import fastquant as fq
from fastquant.quantize import (
    _register_activation_post_process_hook,
)
from zoo import (
    STATIC_CASES,
    Recurrent,
    Stubbed,
)

# Models are small here: threads would cost them more than they give.
pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """Hooks that write down when they run."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def add(self, module: nn.Module, name: str) -> None:
        def note(suffix: str) -> Callable[..., None]:
            return lambda *args: self.calls.append(f"{name} {suffix} {len(args)}")

        module.register_forward_pre_hook(note("pre"))
        module.register_forward_pre_hook(note("pre kwargs"), with_kwargs=True)
        module.register_forward_hook(note("post"))
        module.register_forward_hook(note("post kwargs"), with_kwargs=True)
        module.register_forward_hook(note("always"), always_call=True)


EXPECTED_CALLS = ["pre 2", "pre kwargs 3", "post 3", "post kwargs 4", "always 3"]


@pytest.mark.parametrize("training", [False, True])
def test_hooks_keep_their_order_and_flags_through_prepare_and_convert(training: bool) -> None:
    recorder = Recorder()
    model = Stubbed(fq, nn.Linear(4, 4)).train(training)
    recorder.add(model.body, "body")
    expected = [f"body {call}" for call in EXPECTED_CALLS]
    model.qconfig = fq.get_default_qat_qconfig() if training else fq.default_qconfig
    model = fq.prepare_qat(model) if training else fq.prepare(model)
    model(torch.randn(3, 4))
    assert recorder.calls == expected
    recorder.calls.clear()
    model = fq.convert(model.eval())
    assert type(model.body) is nnq.Linear
    model(torch.randn(3, 4))
    assert recorder.calls == expected
    recorder.calls.clear()
    with pytest.raises(RuntimeError):
        model.body(torch.randn(3, 4))  # a quantized module takes no float tensor
    assert recorder.calls == [expected[0], expected[1], expected[4]]


@pytest.mark.parametrize(
    "build", [lambda: Recurrent(fq), lambda: STATIC_CASES["attention"].build(fq)]
)
def test_hooks_of_custom_modules_run_once(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    module = model.lstm if hasattr(model, "lstm") else model.attention
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("post"))
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.qconfig = fq.default_qconfig
    x = torch.randn(3, 2, 6 if hasattr(model, "lstm") else 8)
    model = fq.prepare(model)
    model(x)
    assert calls == ["pre", "post"]
    fq.convert(model)(x)
    assert calls == ["pre", "post"] * 2


def test_a_hook_needs_an_observer() -> None:
    with pytest.raises(AssertionError, match="no activation_post_process"):
        _register_activation_post_process_hook(nn.Linear(2, 2))
