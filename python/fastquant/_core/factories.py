"""Constructors with some of their arguments given, as `with_args` makes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class _PartialWrapper:
    """A constructor with some arguments given: `p`, and `callable_args` evaluated at each call."""

    def __init__(self, p: Callable[..., Any]) -> None:
        self.p = p
        self.callable_args: dict[str, Callable[[], Any]] = {}

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        computed = {name: f() for name, f in self.callable_args.items() if name not in keywords}
        return self.p(*args, **keywords, **computed)

    def __repr__(self) -> str:
        return f"{self.p!r}{self.callable_args!r}"

    def with_args(self, **kwargs: Any) -> _PartialWrapper:
        return _with_args(self, **kwargs)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> _PartialWrapper:
        result = _PartialWrapper(self.p)
        result.callable_args = {**self.callable_args, **kwargs}
        return result


def _with_args(cls_or_self: Callable[..., Any], /, **kwargs: Any) -> _PartialWrapper:
    """A constructor like `cls_or_self` with `kwargs` given; a later call may override them."""
    return _PartialWrapper(partial(cls_or_self, **kwargs))


def _with_callable_args(
    cls_or_self: Callable[..., Any], /, **kwargs: Callable[[], Any]
) -> _PartialWrapper:
    """A constructor like `cls_or_self` whose `kwargs` are called for values when it is."""
    return _PartialWrapper(partial(cls_or_self)).with_callable_args(**kwargs)


# Pickles name the class so.
_PartialWrapper.__module__ = "fastquant.observer"
