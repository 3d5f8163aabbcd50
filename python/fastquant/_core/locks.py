"""Locks that a fork leaves open."""

from __future__ import annotations

import os
import threading


class Exclusion:
    """A lock for what threads must not do at once; a forked process starts with an open one."""

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


# Held while a buffer changes its size: when an observer sees its first tensor.
RESIZING = Exclusion()
