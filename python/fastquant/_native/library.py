"""Loads the native libraries, or says why they do not load."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import warnings

import torch

from .._core.installation import BUILD
from .._torch import private as private  # refuses a torch that is too old
from .._version import __version__


def _remedy(problem: str) -> str:
    """What to do about a native library that does not load, from what the loader says."""
    if "No module named" in problem:
        return f"It is built when fastquant is installed: {BUILD}."
    if re.search("(GLIBC|GLIBCXX|CXXABI)_", problem):
        return f"It was built for a newer Linux than this one: {BUILD}."
    if "undefined symbol" in problem:
        return (
            f"torch {torch.__version__} lacks what it calls; fastquant {__version__} supports "
            f"torch {private.OLDEST} to {private.NEWEST}: install one of these, or {BUILD}."
        )
    here = f"{platform.system()} on {platform.machine()}"
    return f"It may be one for another system than this one, {here}: {BUILD}."


def _load_library() -> None:
    try:
        importlib.import_module("fastquant._C")
    except ImportError as error:
        raise ImportError(
            f"fastquant's native library does not load ({error}). {_remedy(str(error))}"
        ) from error


_load_library()


def _select_isa() -> None:
    """Use the kernels that the environment variable FASTQUANT_ISA names, if there is one."""
    from .. import _C

    name = os.environ.get("FASTQUANT_ISA")
    if not name:
        return
    try:
        _C.set_isa(name)
    except ValueError as error:
        usable = ", ".join(_C.isas())
        raise ImportError(
            f"FASTQUANT_ISA must be one of {usable} on this processor, and is {name!r}"
        ) from error


_select_isa()


def _load_cuda_library() -> str | None:
    """Load the kernels for CUDA tensors, where they were built and torch has CUDA.

    Returns why they do not load, if so: the environment variable FASTQUANT_CUDA_KERNELS=0 says
    not to, or they cannot.
    """
    setting = os.environ.get("FASTQUANT_CUDA_KERNELS") or "1"
    if setting not in ("0", "1"):
        raise ImportError(f"FASTQUANT_CUDA_KERNELS must be 0 or 1, and is {setting!r}")
    if setting == "0":
        return "FASTQUANT_CUDA_KERNELS=0 switches them off"
    library = importlib.util.find_spec("fastquant._cuda")
    if torch.version.cuda is None or library is None or library.origin is None:
        return None
    try:
        torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]
    except OSError as error:
        reason = str(error.__cause__ or error)
        warnings.warn(
            f"fastquant's CUDA kernels do not load; CUDA tensors take slower ones: {reason}",
            stacklevel=2,
        )
        return reason
    return None


why_no_cuda_kernels = _load_cuda_library()
