"""Forward hooks: those that call observers, and the copying of users' own to another module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
from torch import nn

from .ao import observer_forward_hook, observer_forward_pre_hook
from .compiling import when_compiling

_OF_TORCH_AO = (observer_forward_hook, observer_forward_pre_hook)
_OBSERVER_HOOKS: list[Any] = [*_OF_TORCH_AO]

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def feeds_observers(hook: _Hook) -> _Hook:
    """Mark a hook as one that `prepare` adds: it is not copied to other modules, but removed."""
    _OBSERVER_HOOKS.append(hook)
    return hook


def _observe_output(self: Any, input: Any, output: Any) -> Any:
    return self.activation_post_process(output)


def _observe_input(self: Any, input: Any) -> Any:
    return self.activation_post_process(input[0])


@when_compiling
def _show_dynamo_the_hooks() -> None:
    """Make torch.compile trace these functions in place of torch.ao's, which it does not enter."""
    for hook, same in zip(_OF_TORCH_AO, (_observe_output, _observe_input), strict=True):
        # Dynamo refuses a second registration, as when this module is reloaded.
        with suppress(ValueError):
            cast(Any, torch.compiler.substitute_in_graph)(hook)(same)


def copy_forward_pre_hooks(source: nn.Module, target: nn.Module) -> None:
    """Register on `target` the forward pre-hooks of `source`, except those of observers.

    Order and flags are kept. A target made by copying the source has its hooks already, under
    the same keys; these are not registered twice.
    """
    for key, hook in source._forward_pre_hooks.items():
        if hook not in _OBSERVER_HOOKS and key not in target._forward_pre_hooks:
            target.register_forward_pre_hook(
                hook,
                with_kwargs=key in source._forward_pre_hooks_with_kwargs,
            )


def copy_forward_hooks(source: nn.Module, target: nn.Module) -> None:
    """Do what `copy_forward_pre_hooks` does for the forward hooks, which run after `forward`."""
    for key, hook in source._forward_hooks.items():
        if hook not in _OBSERVER_HOOKS and key not in target._forward_hooks:
            target.register_forward_hook(
                hook,
                with_kwargs=key in source._forward_hooks_with_kwargs,
                always_call=key in source._forward_hooks_always_called,
            )


def add_observer_hook(module: nn.Module, pre_hook: bool) -> None:
    """Make a first hook call `module.activation_post_process` on each input or each output."""
    if pre_hook:
        if observer_forward_pre_hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(observer_forward_pre_hook, prepend=True)
    elif not any(hook in _OBSERVER_HOOKS for hook in module._forward_hooks.values()):
        module.register_forward_hook(observer_forward_hook, prepend=True)


def replace_observer_hook(
    module: nn.Module, hook: Callable[..., Any], pre_hook: Callable[..., Any] | None
) -> None:
    """Put another hook in the place of the one that calls the observer on each output, if any.

    Args:
        module: keeps its other hooks, and their order.
        hook: takes the place.
        pre_hook: becomes the first of the pre-hooks.
    """
    for key, old in module._forward_hooks.items():
        if old is observer_forward_hook:
            module._forward_hooks[key] = hook
            if pre_hook is not None:
                module.register_forward_pre_hook(pre_hook, prepend=True)


def remove_observer_hooks(module: nn.Module) -> None:
    """Remove the hooks that call an observer."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in _OBSERVER_HOOKS]:
            del hooks[key]


def has_hooks_of_its_own(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks besides those of observers."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return (
        any(hook not in _OBSERVER_HOOKS for hook in hooks)
        or bool(module._backward_hooks)
        or bool(module._backward_pre_hooks)
    )
