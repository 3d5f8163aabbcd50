"""The error that every part of the benchmark raises for people."""

from __future__ import annotations


class BenchError(Exception):
    """A model or an input cannot be measured; the message says why, in one line."""

    def __init__(self, what: str, cause: BaseException | None = None) -> None:
        if cause is not None:
            what = f"{what}: {type(cause).__name__}: {cause}"
        super().__init__(" ".join(what.split()))
