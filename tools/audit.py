"""Audits what was built: the installed extension's ABI, and the symbols of the kernels' objects.

    python tools/audit.py    # or: make audit

Exits with 1 and the reasons if

- the extension uses libtorch in another way than through the LibTorch Stable ABI, needs a newer
  torch than the package declares, or uses more than Python's limited API;
- an object that was compiled for one instruction set exports a weak symbol. The linker keeps one of
  several copies of those, so an older processor could run code for a newer one;
- an object has instructions of AMX and is not one of its kernels, or one of these lacks them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import fastquant._C

ROOT = Path(__file__).resolve().parents[1]


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))[:2]


def abi_report(library: str) -> dict[str, Any]:
    """torch-abi-audit's report on a library; works also where its command is not on the PATH."""
    command = [
        sys.executable,
        "-c",
        "import torch_abi_audit.cli as cli; cli.main()",
        "--json",
        library,
    ]
    report = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    result: dict[str, Any] = report
    return result


def audit_abi(library: str) -> list[str]:
    """What torch-abi-audit objects to in the extension at this path."""
    (extension,) = abi_report(library)["extensions"]
    torch_abi, python_abi = extension["torch"], extension["cpython"]
    needs = torch_abi["min_torch_version"]
    (declared,) = (r for r in requires("torch-fastquant") or [] if re.match(r"torch\s*>=", r))
    print(f"{library}: needs torch {needs}, declared: {declared}")

    objections = []
    if not (torch_abi["uses_torch"] and torch_abi["stable"]):
        objections.append(f"not on the LibTorch stable ABI: {torch_abi['unstable_symbols']}")
    elif version(needs) > version(declared):
        objections.append(f"needs torch {needs}, but the package declares {declared}")
    if not (python_abi["intent"] and python_abi["compliant"]):
        objections.append(f"not on Python's limited API: {python_abi['violations']}")
    return objections


def audit_symbols(objects: list[Path]) -> list[str]:
    """The weak symbols in the kernels' object files."""
    objections = [] if objects else [f"no object files of the kernels under {ROOT / 'build'}"]
    for path in objects:
        listing = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], capture_output=True, check=True, text=True
        ).stdout
        weak = [line for line in listing.splitlines() if line.split()[1] in "WVu"]
        print(f"{path}: {len(weak)} weak symbols")
        objections += [f"{path.name} exports the weak symbol {line}" for line in weak]
    return objections


# The objects of the kernels for AMX, and what each of them multiplies by.
AMX_PRODUCTS = {
    "kernels_matrix_avx512_amx.cpp.o": "tdpbusd",
    "kernels_tiles_amx.cpp.o": "tdpbf16ps",
}


def audit_amx(objects: list[Path]) -> list[str]:
    """The objects that have instructions of AMX and should not, or the other way round."""
    objections = []
    for path in objects:
        listing = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", path],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        found = set(re.findall(r"\t(tdp\w+|ldtilecfg|sttilecfg|tile\w+)", listing))
        if path.name in AMX_PRODUCTS:
            product = AMX_PRODUCTS[path.name]
            if not {"ldtilecfg", "tileloadd", product, "tilestored", "tilerelease"} <= found:
                objections.append(f"{path.name} lacks instructions of AMX, it has {sorted(found)}")
        elif found:
            objections.append(f"{path.name} has instructions of AMX: {sorted(found)}")
    return objections


def main() -> int:
    objects = sorted(ROOT.glob("build/*-abi3-*/CMakeFiles/**/*.o"))
    kernels = [path for path in objects if path.name.startswith("kernels_")]
    objections = audit_abi(fastquant._C.__file__) + audit_symbols(kernels) + audit_amx(objects)
    for objection in objections:
        print(f"audit: {objection}", file=sys.stderr)
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main())
