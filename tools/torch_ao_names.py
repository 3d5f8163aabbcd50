"""Writes docs/torch-ao-names.md: what each public name of torch.ao is in fastquant.

    python tools/torch_ao_names.py            # write the page
    python tools/torch_ao_names.py --check    # fail where it is out of date

The page is made from both packages as they are installed, so it is about one version of torch. A
name that fastquant lacks needs an explanation: that of fastquant's own error for it, or one below.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from build_docs import assignments, load, of_constant, summary

PAGE = Path(__file__).resolve().parents[1] / "docs" / "torch-ao-names.md"

FAMILIES = {"torch.ao.quantization": "fastquant", "torch.ao.nn": "fastquant.nn"}
# Where names are defined; people import them from the package above.
DEFINITIONS = "modules"
FX = "part of FX graph mode, which stays torch's"
# Whole modules, with all that is below them.
NOT_HERE = {
    "torch.ao.quantization.backend_config": FX,
    "torch.ao.quantization.experimental": "torch's experiments, which nothing here needs",
    "torch.ao.quantization.fx": FX,
    "torch.ao.quantization.pt2e": "part of PT2E, which is torchao's",
    "torch.ao.quantization.quantize_fx": FX,
    "torch.ao.quantization.quantize_jit": "quantization of TorchScript, which stays torch's",
    "torch.ao.quantization.quantize_pt2e": "part of PT2E, which is torchao's",
    "torch.ao.quantization.quantizer": "part of PT2E, which is torchao's",
    "torch.ao.nn.sparse": "layers with sparse weights, which stay torch's",
    "torch.ao.nn.quantized.functional": "functions of torch's quantized tensors; those of native "
    "int8 models are for torch.nn.functional",
}
SAME = "*torch.ao's*"
HELPERS = {
    "check_node": "a helper of FX graph mode, about nodes of a graph",
    "get_fqn_to_example_inputs": "a helper of FX graph mode",
}
INTRODUCTION = """\
# torch.ao, name by name

What each public name of torch.ao's eager mode is in fastquant: those of `torch.ao.quantization` and
its modules are in `fastquant` and its modules of the same names, those of `torch.ao.nn` in
`fastquant.nn`. [Moving from torch.ao](moving.md) says how to move; this page is for looking things
up. `python tools/torch_ao_names.py` makes it from both packages, here with torch {version}.

- Where words stand, fastquant has an object of its own, with torch.ao's signature.
- *torch.ao's* is torch.ao's object itself, under the same name. Of a layer, fastquant has a class
  of its own, too, which is there instead where torch has no torch.ao any more.
- **Not here** says where to go instead.
"""


def public_names(module: ModuleType, family: str) -> list[str]:
    names: list[str] | None = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if name[0] != "_" and str(getattr(value, "__module__", None)).startswith(family)
        ]
    return sorted(
        {n for n in names if hasattr(module, n) and not inspect.ismodule(getattr(module, n))},
        key=lambda name: (name.lower(), name),
    )


def description(name: str, value: Any, module: ModuleType) -> str:
    """The first sentence of an object's documentation; else, what a constant is made of."""
    source, about = assignments(module).get(name, ("", ""))
    sentence = summary(value) or " ".join(about.partition("\n\n")[0].split())
    sentence = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", sentence)
    otherwise = "a dict" if isinstance(value, dict) else "a type for annotations"
    return (sentence or of_constant(source) or otherwise).replace("|", "\\|")


def why_missing(name: str, family: str) -> str:
    """fastquant's own explanation of a name that it lacks, or that of HELPERS."""
    if family == "torch.ao.nn":
        return "torch.ao's class is used as it is"
    try:
        getattr(importlib.import_module("fastquant"), name)
    except AttributeError as error:
        _, separator, explanation = str(error).partition(": ")
        if separator:
            return explanation
    if name not in HELPERS:
        raise SystemExit(f"torch.ao has {name!r} and fastquant has not: say why in {__file__}")
    return HELPERS[name]


def row(name: str, theirs: Any, ours: ModuleType, family: str) -> str:
    if not hasattr(ours, name):
        return f"| `{name}` | **Not here**: {why_missing(name, family)} |"
    value = getattr(ours, name)
    same = value is theirs and not isinstance(value, str | int | float | bool | None)
    return f"| `{name}` | {SAME if same else description(name, value, ours)} |"


def modules(family: str) -> list[str]:
    """The public modules of a package of torch.ao, but for those that only define names."""
    package = importlib.import_module(family)
    found = [family]
    for module in pkgutil.walk_packages(package.__path__, f"{family}."):
        parts = module.name.split(".")
        if DEFINITIONS not in parts and not any(part.startswith("_") for part in parts):
            found.append(module.name)
    return found


def page() -> str:
    sections, elsewhere, whole = [], [], []
    for family, ours in FAMILIES.items():
        described: set[str] = set()
        for module in sorted(modules(family), key=lambda name: (name == family, name)):
            left_out = next((n for n in NOT_HERE if f"{module}.".startswith(f"{n}.")), None)
            if left_out is not None:
                if left_out == module:
                    elsewhere.append(f"| `{module}` | {NOT_HERE[module]} |")
                continue
            theirs = load(module)
            names = [name for name in public_names(theirs, family) if name not in described]
            try:
                here = load(ours + module.removeprefix(family))
            except ImportError:
                here = None
            if not names:
                continue
            # A package may exist for what lies below it only.
            if here is None or not any(hasattr(here, name) for name in names):
                whole.append(f"| `{module}` | {', '.join(f'`{name}`' for name in names)} |")
                continue
            if family == "torch.ao.quantization":
                described |= set(names)
            lines = [f"## {module}", "", f"In `{here.__name__}`:", ""]
            if module == family:
                lines[2] = f"In `{here.__name__}`: what the modules above hold, and"
            lines += ["| name | in fastquant |", "|---|---|"]
            lines += [row(name, getattr(theirs, name), here, family) for name in names]
            sections.append("\n".join(lines))
    if whole:
        lines = ["## Modules of torch.ao.nn that are used as they are", ""]
        lines += ["fastquant prepares, trains and converts torch.ao's own classes:", ""]
        sections.append("\n".join([*lines, "| module | names |", "|---|---|", *whole]))
    lines = ["## Modules that are not here", "", "| module | |", "|---|---|", *elsewhere]
    sections.append("\n".join(lines))
    version = torch.__version__.partition("+")[0]
    return "\n\n".join([INTRODUCTION.format(version=version).rstrip(), *sections]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/torch-ao-names.md.")
    parser.add_argument("--check", action="store_true", help="only fail where it is out of date")
    check = parser.parse_args().check
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's, about its own end
        text = page()
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise SystemExit(f"{PAGE.name} is out of date: run `python tools/torch_ao_names.py`")


if __name__ == "__main__":
    main()
