"""Audits a built library of CUDA kernels, as far as a machine without a GPU can.

    python tools/audit_cuda.py build/cuda/_cuda.so

Run by `make cuda-compile`. Exits with 1 and the reasons if the library uses libtorch in another way
than through the LibTorch Stable ABI, does not load, or lacks a kernel for an op.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from audit import abi_report

import fastquant
from fastquant._native import reference


def objections(library: Path) -> list[str]:
    """What is wrong with the library at this path."""
    found = []
    (audited,) = abi_report(str(library))["bundled_libs"]
    torch_abi = audited["torch"]
    if not (torch_abi["uses_torch"] and torch_abi["stable"]):
        found.append(f"not on the LibTorch stable ABI: {torch_abi['unstable_symbols']}")
    torch.ops.load_library(str(library.resolve()))  # type: ignore[no-untyped-call]
    for name in sorted(reference.OPS.keys() - reference.ONLY_ON_CPU):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastquant::{name}", "CUDA"):
            found.append(f"no CUDA kernel for fastquant::{name}")
    megabytes = library.stat().st_size / 1e6
    print(f"{library}: needs torch {torch_abi['min_torch_version']}, {megabytes:.1f} MB")
    return found


def main() -> int:
    print(f"fastquant {fastquant.__version__}, torch {torch.__version__}")
    found = objections(Path(sys.argv[1]))
    for objection in found:
        print(f"audit_cuda: {objection}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
