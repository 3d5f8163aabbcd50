"""Observes the output of a fused module in one call, where torch.ao makes two.

A fused module is a Sequential, and `prepare` makes the observer its last child: the Sequential's
forward calls it, and then the module's hook does so again. One call leaves the same statistics:
a running range does not change the second time, and a histogram counts each element twice.
Whether a second call would do more is decided at each call, because methods, hooks and observers
may be replaced at any time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from .._torch.hooks import feeds_observers, replace_observer_hook
from .._torch.overrides import Written
from .._torch.private import is_called_plainly
from ..observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver

# What a call of a Sequential or of an observer runs, as it is when fastquant is imported.
_forward = Written(nn.Sequential, "forward")
_observing: dict[Any, Written] = {
    MinMaxObserver: Written(MinMaxObserver, "forward"),
    PerChannelMinMaxObserver: Written(PerChannelMinMaxObserver, "forward", "_forward"),
    HistogramObserver: Written(
        HistogramObserver,
        *("forward", "reset_histogram", "_combine_histograms", "_upscale_histogram"),
    ),
}


def observe_sequentials_once(model: nn.Module) -> None:
    """Put the hooks of this file in the place of torch.ao's on a model's Sequentials.

    Moving averages move twice, and observers that several modules share, or that are of a class of
    the user's, may do anything: these keep torch.ao's hook.
    """
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())
    for module in model.modules():
        observer: Any = getattr(module, "activation_post_process", None)
        if (
            isinstance(module, nn.Sequential)
            and type(observer) in _observing
            and uses[observer] == 1
        ):
            counts = type(observer) is HistogramObserver
            pre_hook = count_output_twice if counts else None
            replace_observer_hook(module, observe_output_once, pre_hook)


def _is_observed_by_forward(module: Any) -> bool:
    """Whether forward calls the observer in such a way that another call would change nothing."""
    observer: Any = module._modules.get("activation_post_process")
    observing = _observing.get(type(observer))
    return (
        observing is not None
        and not _forward.is_replaced(module)
        and next(reversed(module._modules.values())) is observer
        and is_called_plainly(observer)
        and not observing.is_replaced(observer)
        # An earlier hook may change the output.
        and next(iter(module._forward_hooks.values())) is observe_output_once
    )


# The two hooks. Pickled models hold them by name.


@feeds_observers
def count_output_twice(self: Any, input: Any) -> None:
    """A pre-hook that tells a histogram how often a tensor counts."""
    observer: Any = self._modules.get("activation_post_process")
    if type(observer) is HistogramObserver:
        times = 2 if _is_observed_by_forward(self) else 1
        if observer._times != times:
            observer._times = times


@feeds_observers
def observe_output_once(self: Any, input: Any, output: Any) -> Any:
    """A hook that calls the observer where forward has not, or where a second call counts."""
    observer: Any = self._modules.get("activation_post_process")
    if observer is None:  # torch.ao's convert leaves this hook on the module that it makes
        return None
    if _is_observed_by_forward(self) and getattr(observer, "_times", 2) == 2:
        return None
    return observer(output)
