"""What a timing depends on: the processor, its instruction set, and the versions in use."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import _C
from .._version import __version__


def machine() -> dict[str, Any]:
    """A description of this machine and of the software, to store with what it measured."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "architecture": platform.machine(),
        "isa": _C.isa(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastquant": __version__,
    }


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()
