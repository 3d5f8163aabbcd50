"""Builds the CUDA ops for the CPU, and loads them: see `tests/native/cuda_emulation`."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Compiler flags, such as those of sanitizers; and whether kernels are looked over for races.
FLAGS = os.environ.get("FASTQUANT_EMULATION_FLAGS", "")
RACES = os.environ.get("FASTQUANT_EMULATION_RACES") == "1"


def why_not() -> str | None:
    """The reason not to emulate, if there is one."""
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    # The emulated ops are registered under another name, by a macro that replaces `fastquant`.
    header = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "stable" / "library.h"
    if re.search(r"^ +#ns, ", header.read_text(), re.MULTILINE):
        return "this torch's headers register ops under the name before macros replace it"
    return None


def _run(*command: str) -> None:
    done = subprocess.run(command, text=True, capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def build() -> Path:
    """Build, as far as anything has changed, and say where the library is."""
    kind = "_sanitized" * bool(FLAGS) + "_races" * RACES
    directory = ROOT / "build" / f"cuda_emulation{kind}"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel tests build it once
        _run(
            "cmake",
            *("-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
            "-DFASTQUANT_BUILD_TESTS=ON",
            "-DFASTQUANT_CUDA=off",
            f"-DCMAKE_CXX_FLAGS={FLAGS}",
            f"-DFASTQUANT_EMULATION_RACES={'ON' if RACES else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        )
        _run("cmake", "--build", str(directory), "--target", "cuda_emulated")
    (library,) = directory.rglob("cuda_emulated.so")
    return library


class Emulation:
    """The ops, and the settings of the GPU that there is not."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))

    def op(self, name: str) -> Callable[..., Any]:
        op: Callable[..., Any] = getattr(torch.ops.fastquant_emulated, name).default
        return op

    def reset(self) -> None:
        self.multiprocessors(4)
        self.capturing(False)
        self._library.emulation_seed(ctypes.c_uint64(1))

    def multiprocessors(self, count: int) -> None:
        self._library.emulation_set_multiprocessors(count)

    def capturing(self, capturing: bool) -> None:
        """Whether the stream records a graph."""
        self._library.emulation_set_capturing(int(capturing))

    def launches(self, op: str, *args: Any) -> int:
        """How many kernels a call starts."""
        before = self._library.emulation_launches()
        self.op(op)(*args)
        return int(self._library.emulation_launches() - before)
