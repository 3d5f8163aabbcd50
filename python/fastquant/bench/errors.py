"""The error that every part of the benchmark raises for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class BenchError(Exception):
    """A model or an input cannot be measured; the message says why, in one line."""

    def __init__(self, what: str, cause: BaseException | None = None) -> None:
        if cause is not None:
            what = f"{what}: {type(cause).__name__}: {cause}"
        super().__init__(" ".join(what.split()))


def attempt(what: str, step: Callable[[], Any]) -> Any:
    """What `step` returns, from a fixed seed; a BenchError that says `what` where it fails."""
    try:
        torch.manual_seed(0)
        return step()
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(what, error) from error
