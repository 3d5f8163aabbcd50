"""What this installation of fastquant is made of, for bug reports and benchmark records."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from .. import _C
from .._version import __version__


def _cuda() -> dict[str, Any]:
    """Whether CUDA kernels were built, whether they are loaded, and the reason if not."""
    built = importlib.util.find_spec("fastquant._cuda") is not None
    why: str | None
    if not built:
        why = "this build of fastquant has no CUDA kernels; CUDA tensors take the torch-op fallback"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is a CPU build"
    else:
        from . import library

        why = library.why_no_cuda_kernels
    return {"built": built, "loaded": built and why is None, "why_not": why}


def build_info() -> dict[str, Any]:
    """Describe the native libraries in use.

    Returns:
        A dict of plain values, under these keys.

        - ``version``: fastquant's version.
        - ``torch``: the version of torch that runs.
        - ``isa``: instruction set of the CPU kernels in use. The environment variable
          ``FASTQUANT_ISA`` names another at start-up. Where nobody names it, ``avx512_amx`` means
          that int8 layers with few products for each output take the faster of its kernels and
          ``avx512_vnni``'s, by their first calls, and the others its own.
        - ``isas_usable``, ``isas_built``: those this processor runs, and all that were built;
          best first.
        - ``threads``: how many threads torch, and so fastquant, uses
          (``torch.set_num_threads`` changes it).
        - ``cuda``: ``built``, ``loaded`` and ``why_not`` (``None`` where loaded). The environment
          variable ``FASTQUANT_CUDA_KERNELS=0`` leaves CUDA kernels unloaded at start-up.
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "isa": _C.isa(),
        "isas_usable": _C.isas(),
        "isas_built": _C.built_isas(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(),
    }
