"""Locks that are free in a forked process, whoever held them when it was forked."""

from __future__ import annotations

import os
import threading


class Exclusion:
    """A reentrant lock that a forked process starts with unlocked."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


# Held while an observer's first tensor gives its per-channel buffers their size.
RESIZING = Exclusion()
