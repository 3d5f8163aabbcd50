"""Private names of torch: two modules alone use them, and without one fastquant works or says why.

Run as a script with paths below torch as arguments, this file takes each of them away in a process
of its own, imports and uses fastquant there, and prints the results. Paths with a comma between
them are taken away together.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

MODULES_WITH_PRIVATE_NAMES = ("_torch.private", "_torch.ao")
# Found without importing fastquant, which the script does once a name is gone.
PACKAGE = Path(importlib.util.find_spec("fastquant").origin).parent  # type: ignore[union-attr, arg-type]

# ---------------------------------------------------------------- as a script: without a name


def take_away(path: str) -> Callable[[], None]:
    """Remove what is at `path` below torch; what this returns puts it back."""
    module = f"torch.{path}"
    owner_path, _, name = module.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    value = vars(owner).get(name)
    if value is not None and not isinstance(value, ModuleType):
        delattr(owner, name)
        return lambda: setattr(owner, name, value)
    before = {n: m for n, m in sys.modules.items() if f"{n}.".startswith(f"{module}.")}
    # Imports of these fail.
    sys.modules.update(dict.fromkeys((module, *before)))  # type: ignore[arg-type]

    def put_back() -> None:
        del sys.modules[module]
        sys.modules.update(before)

    return put_back


def use(fastquant: Any) -> list[Any]:
    """Calibrate, train, trace and convert a model; what it warns of, and a number a result."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    parts = (
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0),
        nn.Linear(180, 2),
    )
    model = nn.Sequential(fastquant.QuantStub(), *parts, fastquant.DeQuantStub())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.qconfig = fastquant.get_default_qconfig("x86")
        fastquant.prepare(model.train())
    warned = [str(warning.message) for warning in caught]
    from_torch = importlib.import_module("fastquant._torch.private")
    leaves = from_torch.tree_leaves((1, [2, {"three": 3}]))

    calibrated = fastquant.fuse_modules(model.eval(), ["1", "2", "3"])
    calibrated.qconfig = fastquant.get_default_qconfig("x86")
    fastquant.prepare(calibrated, inplace=True)
    fastquant.calibrate(calibrated, [x])
    results = [fastquant.convert(calibrated)(x)]

    trained = fastquant.fuse_modules_qat(model.train(), ["1", "2", "3"])
    trained.qconfig = fastquant.get_default_qat_qconfig("x86")
    fastquant.prepare_qat(trained, inplace=True)
    trained(x).square().sum().backward()
    results += [parameter.grad for parameter in trained.parameters()]
    trained.eval()
    results += [torch.jit.trace(trained, x, check_trace=False)(x), fastquant.convert(trained)(x)]
    return [warned, leaves] + [result.double().square().sum().item() for result in results]


def look_up() -> None:
    """Import the two modules alone: others import parts of torch, which need its names too."""
    package = sys.modules["fastquant"] = ModuleType("fastquant")
    package.__path__ = [str(PACKAGE)]
    try:
        for module in MODULES_WITH_PRIVATE_NAMES:
            importlib.import_module(f"fastquant.{module}")
    finally:
        del sys.modules["fastquant"]


def outcome(paths: list[str]) -> list[Any] | str:
    """What `use` gives where `paths` were missing when they were looked up, or the error."""
    try:
        with contextlib.ExitStack() as put_back:
            for path in paths:
                put_back.callback(take_away(path))
            look_up()
        return use(importlib.import_module("fastquant"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    # Before the processes part: importing torch takes longer than all that they do.
    for module in ("intrinsic", "intrinsic.qat", "quantized", "qat", "quantizable"):
        importlib.import_module(f"torch.ao.nn.{module}")
    warnings.simplefilter("ignore")
    for paths in sys.argv[1:]:
        sys.stdout.flush()
        process = os.fork()
        if not process:
            print(json.dumps([paths, outcome(list(filter(None, paths.split(","))))]), flush=True)
            os._exit(0)
        os.waitpid(process, 0)


# ------------------------------------------------------------------------------- the tests


def paths_of_names() -> list[str]:
    """All that fastquant looks up below torch: private names, and what it shares with torch.ao."""
    from fastquant._torch import ao, private

    assert ao.__name__
    return list(dict.fromkeys(private.NAMES))


def outcomes_without(paths: list[str]) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, __file__, *paths],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    outcomes = dict(json.loads(line) for line in process.stdout.splitlines())
    assert outcomes.keys() == set(paths), process.stderr
    return outcomes


def in_pairs(paths: list[str]) -> list[str]:
    """With each class of torch.ao another private name: they stand for nothing of each other."""
    classes = [p for p in paths if p.startswith("ao.") and p.rpartition(".")[2][0].isupper()]
    private = [p for p in paths if not p.startswith("ao.")]
    pairs = [",".join(pair) for pair in zip(classes, private, strict=False)]
    paired = {path for pair in pairs for path in pair.split(",")}
    return pairs + [path for path in paths if path not in paired]


def test_without_a_private_name_results_are_the_same_or_the_error_names_the_torch_to_use() -> None:
    outcomes = outcomes_without(["", *in_pairs(paths_of_names())])
    expected = outcomes.pop("")

    def same(found: Any) -> bool:
        return found[:2] == expected[:2] and found[2:] == pytest.approx(expected[2:], rel=1e-6)

    again = [pair for pair, found in outcomes.items() if "," in pair and not same(found)]
    if again:
        for pair in again:
            del outcomes[pair]
        outcomes |= outcomes_without([path for pair in again for path in pair.split(",")])
    for path, found in outcomes.items():
        if isinstance(found, str):
            assert found.startswith("ImportError: fastquant "), (path, found)
            assert " supports torch 2.10 to " in found, (path, found)
        else:
            assert same(found), (path, found, expected)


# What subclasses and users of nn.Module have always overridden and read, though it begins with an
# underscore, and what state_dict and scripted modules have.
MODULE_PROTOCOL = {
    "_apply",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_buffers",
    "_conv_forward",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_from_state_dict",
    "_load_from_state_dict_script",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_metadata",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
    "_save_to_state_dict",
}
PYTHONS = {"_fields"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Every name that fastquant itself defines or sets."""
    own = {"_C"}
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    return own


def private_names_of_torch(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """What a module takes from torch under a private name, as far as its source shows."""
    ours = own | MODULE_PROTOCOL | PYTHONS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            first, *rest = path.split(".")
            hidden = any(is_private(name) and name not in MODULE_PROTOCOL for name in rest)
            of_torch = first in ("torch", "nn", "F") and hidden
            if of_torch or (is_private(node.attr) and node.attr not in ours):
                yield path
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (n for n in names if n.startswith("torch.") and "._" in n)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch._"))
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"torch\._\w+(\.\w+)*|__dlpack_c_exchange_api__", str(node.value)
        ):
            yield str(node.value)


def test_two_modules_alone_use_private_names_of_torch() -> None:
    trees = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }
    own = own_names(trees)
    found = {
        f"{module}: {name}"
        for module, tree in trees.items()
        if module not in MODULES_WITH_PRIVATE_NAMES
        for name in private_names_of_torch(tree, own)
    }
    assert not found
    # The search finds what is there.
    assert set(private_names_of_torch(trees["_torch.private"], own))


if __name__ == "__main__":
    main()
