"""Settings for torch.compile, made as soon as torch._dynamo is imported.

Importing torch._dynamo takes longer than importing torch, and most programs never compile.
Therefore `when_compiling` delays whatever needs torch._dynamo until something else imports it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch

from .private import DYNAMO

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _AfterDynamo(MetaPathFinder):
    """Finds torch._dynamo once, and runs tasks after it has been executed."""

    def __init__(self) -> None:
        self.tasks: list[Callable[[], None]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != DYNAMO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for task in self.tasks:
                    task()

            loader.exec_module = exec_module
        return spec


_after_dynamo = _AfterDynamo()


def when_compiling(task: Callable[[], None]) -> Callable[[], None]:
    """Run `task` once torch._dynamo is imported, which may be now. Usable as a decorator."""
    if DYNAMO in sys.modules:
        task()
        return task
    if _after_dynamo not in sys.meta_path:
        sys.meta_path.insert(0, _after_dynamo)
    _after_dynamo.tasks.append(task)
    return task


def constant_in_graphs(function: _Function) -> _Function:
    """Have Dynamo call a function of constants and keep the result, without tracing the function.

    For what is decided by the arguments once and for all: nothing is traced, so Dynamo guards on
    none of what the function looks at.
    """

    def mark() -> None:
        torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]

    when_compiling(mark)
    return function


def outside_graphs(owner: type, method: str, reason: str) -> None:
    """Keep a method of a class out of compiled graphs; `reason` is what users read."""

    def disable() -> None:
        disabled: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
            vars(owner)[method], reason=reason
        )
        setattr(owner, method, disabled)

    when_compiling(disable)
