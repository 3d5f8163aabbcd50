"""Markers of where a model's tensors become quantized and floating again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._torch import ao
from .qconfig import QConfig

__all__ = ["DeQuantStub", "QuantStub", "QuantWrapper"]

# torch's convert, its FX mode and its TorchScript compiler recognise stubs by torch.ao's
# classes, so ours derive from them; behaviour and state are defined here.


class _Stub(nn.Module):
    def __init__(self, qconfig: QConfig | None = None) -> None:
        nn.Module.__init__(self)
        if qconfig:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        return x


class QuantStub(_Stub, ao.QuantStub):
    """Where tensors become quantized: observed once prepared, `nnq.Quantize` once converted.

    Args:
        qconfig: how to observe; by default the parent module's.
    """


class DeQuantStub(_Stub, ao.DeQuantStub):
    """Where tensors become floating again: `nnq.DeQuantize` once converted.

    Args:
        qconfig: presence makes convert swap the stub; by default the parent module's.
    """


class QuantWrapper(ao.QuantWrapper):
    """A module between a `QuantStub` and a `DeQuantStub`.

    Args:
        module: the module to wrap; its `qconfig`, if any, is also the stubs'.
    """

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        qconfig: Any = getattr(module, "qconfig", None)
        self.add_module("quant", QuantStub(qconfig))
        self.add_module("dequant", DeQuantStub(qconfig))
        self.add_module("module", module)
        self.train(module.training)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 (the name is torch.ao's)
        return self.dequant(self.module(self.quant(X)))  # type: ignore[no-any-return]
