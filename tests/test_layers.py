"""Who may import whom, as docs/architecture.md explains it."""

from __future__ import annotations

import ast
from pathlib import Path

import fastquant

PACKAGE = Path(fastquant.__file__).parent

# A module imports only from rows above its own, and a folder also from itself. Names with a leading
# underscore, `nn`, `bench` and `analysis` are folders (but for `_version` and `_C`); the others are
# modules.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version", "_C"),
    ("_core",),
    ("_torch",),
    ("_native",),
    ("quant_type",),
    ("utils",),
    ("observer",),
    ("fake_quantize",),
    ("qconfig", "qconfig_mapping"),
    ("_quantized",),
    ("quantized_tensor",),
    ("functional", "stubs", "merging"),
    ("distributed", "nn"),
    ("fuser_method_mappings", "quantization_mappings"),
    ("fuse_modules",),
    ("_conversion",),
    ("_export",),
    ("quantize", "calibrate", "set_qconfig"),
    ("_onnx",),
    ("export", "onnx", "patching", "checkpoints"),
    ("__init__",),
    ("bench",),
    ("analysis",),
)
# torch.ao has these names in these two modules, each of which needs the other's.
CIRCLE = {"qconfig", "qconfig_mapping"}


def part(module: str) -> str:
    """The folder or module below `fastquant` that a module path begins with."""
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """What a file imports of fastquant when it runs, inside functions too, as module paths."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.partition(".")[2] or "__init__" for n in names if part(n) == "fastquant"}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = list(parts[: len(parts) - node.level])
            elif node.module and part(node.module) == "fastquant":
                package = []
                node.module = node.module.partition(".")[2]
            else:
                continue
            base = [*package, *([node.module] if node.module else [])]
            # A name may be a module of a package, or something inside the package's module.
            names = [".".join([*base, alias.name]) for alias in node.names]
            found |= {n if n in FILES or not base else ".".join(base) for n in names}
    return found


FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}


def test_every_module_has_its_layer() -> None:
    known = {name for layer in LAYERS for name in layer}
    assert {part(module) for module in FILES} | {"_C"} == known


def test_modules_import_only_from_below() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    upward = []
    for module, path in FILES.items():
        for imported in imports_of(path):
            importer, target = part(module), part(imported)
            if importer == target or {importer, target} == CIRCLE:
                continue
            if level[target] >= level[importer]:
                upward.append(f"{module} imports {imported}")
    assert not upward


def test_there_is_one_circle_and_torch_ao_has_it_too() -> None:
    arrows = {
        module: {
            target
            for name in imports_of(path)
            for target in (name, f"{name}.__init__")
            if target in FILES and target != module
        }
        for module, path in FILES.items()
    }
    arrows["qconfig"].discard("qconfig_mapping")
    done: set[str] = set()
    while ready := {m for m, targets in arrows.items() if m not in done and targets <= done}:
        done |= ready
    assert FILES.keys() - done == set()


def test_one_module_alone_imports_torch_ao() -> None:
    importers = {
        module
        for module, path in FILES.items()
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("from torch.ao", "import torch.ao", "from torch.quantization"))
    }
    assert importers == {"_torch.ao"}


def test_every_public_module_has_its_tests() -> None:
    tests = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    public = {module for module in FILES if "." not in module and not module.startswith("_")}
    assert {"observer", "quantize"} <= public
    assert {f"test_{module}" for module in public} <= tests
