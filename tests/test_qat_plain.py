"""Which fake-quantizers one op may stand for, together with what precedes their call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn

import fastquant as fq
from fastquant.nn.qat.plain import settings_per_tensor
from oracle import quiet

PER_CHANNEL = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}


@pytest.mark.parametrize(
    "make",
    [
        fq.default_fake_quant,
        fq.default_fused_act_fake_quant,
        fq.FakeQuantize.with_args(observer=fq.MinMaxObserver),
        fq.FakeQuantize.with_args(observer=fq.MinMaxObserver, nonfinite="raise"),
    ],
)
def test_a_fake_quantizer_of_a_range_per_tensor_is_plain(make: Callable[[], Any]) -> None:
    module = make()
    for _ in range(2):
        settings = settings_per_tensor(module)
        assert settings is not None
        assert settings.scale is module.scale
        assert settings.min_val is module.activation_post_process.min_val
        module(torch.randn(5))
    module.disable_observer()
    assert settings_per_tensor(module) is not None


class Doubling(fq.FakeQuantize):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnQParams(fq.FakeQuantize):
    def calculate_qparams(self) -> Any:
        return torch.tensor([1.0]), torch.tensor([0])


@pytest.mark.parametrize(
    "make",
    [
        nn.Identity,
        lambda: None,
        Doubling,
        OwnQParams,
        fq.default_fixed_qparams_range_0to1_fake_quant,
        fq.default_histogram_fake_quant,
        fq.FakeQuantize.with_args(observer=fq.MovingAveragePerChannelMinMaxObserver, **PER_CHANNEL),
        fq.default_fused_per_channel_wt_fake_quant,
        lambda: fq.LearnableFakeQuantize(fq.MovingAverageMinMaxObserver),
        fq.MovingAverageMinMaxObserver,
        tq.default_fake_quant,
        tq.default_fused_act_fake_quant,
    ],
)
def test_other_modules_are_not_plain(make: Callable[[], Any]) -> None:
    with quiet():
        module = make()
    assert settings_per_tensor(module) is None


def hook(module: Any, *_: Any) -> None:
    pass


REPLACED: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(hook),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(hook),
    "backward hook": lambda m: m.register_full_backward_hook(hook),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(hook),
    "observer's hook": lambda m: m.activation_post_process.register_forward_hook(hook),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
    "qparams": lambda m: setattr(m, "calculate_qparams", lambda: (m.scale, m.zero_point)),
    "observer's forward": lambda m: setattr(m.activation_post_process, "forward", lambda x: x),
    "observer": lambda m: setattr(m, "activation_post_process", fq.HistogramObserver()),
    "buffer": lambda m: m.register_parameter("scale", nn.Parameter(m._buffers.pop("scale"))),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_somebody_replaced_is_not_plain(what: str) -> None:
    module = fq.default_fake_quant()
    REPLACED[what](module)
    assert settings_per_tensor(module) is None
    assert settings_per_tensor(fq.default_fake_quant()) is not None


@pytest.fixture(
    params=[
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ]
)
def global_hook(request: pytest.FixtureRequest) -> Iterator[None]:
    handle = request.param(hook)
    yield
    handle.remove()


@pytest.mark.usefixtures("global_hook")
def test_a_global_hook_hears_every_call() -> None:
    assert settings_per_tensor(fq.default_fake_quant()) is None


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_sparse_gradients_of_embeddings_are_torch_aos(name: str) -> None:
    indices, gradients = torch.tensor([[1, 2], [2, 5]]), []
    for package in (tq, fq):
        torch.manual_seed(0)
        module = getattr(torch.ao.nn.qat, name)(
            10, 4, sparse=True, qconfig=package.default_embedding_qat_qconfig
        )
        module(indices).square().sum().backward()
        gradients.append(module.weight.grad)
    theirs, ours = gradients
    assert ours.is_sparse
    assert torch.equal(ours.to_dense(), theirs.to_dense())
