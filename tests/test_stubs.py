"""Stubs mark where tensors are quantized, and pass them on until convert."""

from __future__ import annotations

import torch
import torch.ao.quantization as tq
import torch.quantization
from torch import nn

import fastquant as fq
from oracle import assert_same, quiet


def test_stubs_work_in_either_world() -> None:
    for name in ("QuantStub", "DeQuantStub", "QuantWrapper"):
        assert issubclass(getattr(fq, name), getattr(tq, name))
    stub = fq.QuantStub(fq.default_qconfig)
    assert stub.qconfig is fq.default_qconfig
    assert not hasattr(fq.DeQuantStub(), "qconfig")
    x = torch.randn(3)
    assert stub(x) is x
    linear = nn.Linear(3, 3).eval()
    linear.qconfig = fq.default_qconfig
    wrapper = fq.QuantWrapper(linear)
    assert not wrapper.training
    assert wrapper.quant.qconfig is wrapper.dequant.qconfig is fq.default_qconfig
    assert_same(wrapper(x), linear(x))
    # torch's compiler of scripts knows wrappers by their class.
    with quiet():
        scripted = torch.jit.script(fq.QuantWrapper(nn.Linear(3, 3).eval()))
    assert scripted(x).shape == x.shape
