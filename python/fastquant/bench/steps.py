"""What is timed: a float or prepared copy of a model, and one forward or training step of it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastquant

from .. import patching
from .._torch.private import tree_leaves
from .errors import BenchError
from .models import as_call
from .report import OURS, THEIRS


@dataclass(frozen=True)
class Library:
    """One of the two libraries to prepare a model with."""

    name: str
    names: Any  # the namespace that holds prepare, prepare_qat and the qconfigs

    def prepared(self, model: nn.Module, mode: str, backend: str) -> nn.Module:
        """A prepared copy of a model; submodules whose qconfig is None stay in float."""
        model = copy.deepcopy(model)
        qat = mode == "qat"
        config = (
            self.names.get_default_qat_qconfig(backend)
            if qat
            else self.names.get_default_qconfig(backend)
        )
        for module in model.modules():
            if getattr(module, "qconfig", None) is not None:
                module.qconfig = config
        model.qconfig = config
        prepare = self.names.prepare_qat if qat else self.names.prepare
        prepared: nn.Module = prepare(model, inplace=True)
        return prepared


def libraries() -> tuple[Library, Library]:
    """fastquant and torch.ao.

    Raises:
        RuntimeError: torch.ao.quantization is patched, so both would be fastquant.
    """
    return Library(OURS, fastquant), Library(THEIRS, patching.original())


def fused(model: nn.Module, mode: str) -> nn.Module:
    """A copy of a model, fused by its own `fuse_model` where it has one.

    Args:
        model: float model, in the training mode that its `fuse_model` needs.
        mode: "calibrate" or "qat". For "qat", a `fuse_model` without a parameter `is_qat` is not
            called, because it fuses for calibration.
    """
    model = copy.deepcopy(model)
    fuse = getattr(model, "fuse_model", None)
    if callable(fuse):
        if "is_qat" in inspect.signature(fuse).parameters:
            fuse(is_qat=mode == "qat")
        elif mode == "calibrate":
            fuse()
    return model


class Step:
    """One forward without gradients (mode "calibrate"), or one training step ("qat").

    Calling it does the work once. A training step minimises the mean square of the outputs by SGD.

    Args:
        model: the model, which training steps change.
        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        mode: "calibrate" or "qat".

    Raises:
        BenchError: mode "qat" of a model without parameters to train or, when it is called,
            without an output that has a gradient.
    """

    def __init__(self, model: nn.Module, inputs: Any, mode: str) -> None:
        self.model = model
        self._args, self._kwargs = as_call(inputs)
        self._optimizer: torch.optim.SGD | None = None
        if mode == "qat":
            parameters = [p for p in model.parameters() if p.requires_grad]
            if not parameters:
                raise BenchError("mode 'qat' needs a model with parameters to train")
            # A tiny learning rate: the work must stay the same from step to step.
            self._optimizer = torch.optim.SGD(parameters, lr=1e-6)

    def __call__(self) -> None:
        if self._optimizer is None:
            with torch.no_grad():
                self.model(*self._args, **self._kwargs)
            return
        self._optimizer.zero_grad()
        output = self.model(*self._args, **self._kwargs)
        losses = [
            leaf.float().square().mean()
            for leaf in tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not losses:
            raise BenchError("mode 'qat' needs a model whose output has a gradient")
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
