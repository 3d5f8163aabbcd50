"""Builds the documentation site, as `make docs` does.

    python tools/build_docs.py [FOLDER]    # default: build/docs; open FOLDER/html/index.html

The pages are the Markdown files of docs/, with CONTRIBUTING.md and CHANGELOG.md, as they are. They
are copied to FOLDER/source/docs, beside links to the rest of the repository, so that their links
to its files are right there, too. Two things are added to the copies: the navigation, which is
made of the links of docs/index.md under its headings, and a reference page for each public module,
made of its docstrings. Then Sphinx builds the site; its warnings are errors.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "fastquant"
# Pages outside docs/, and their names on the site.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Methods of these bases are torch's and Python's, and not described again.
FOREIGN_BASES = "Module, Tensor, tuple, dict, str, int, Exception, RuntimeError"


def public_modules() -> list[str]:
    """Every public module, by its dotted name.

    These are the modules at the top of the package and the packages at any depth. The modules of
    a nested package are its internals: the package itself holds their public names.
    """
    found = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        package = parts[-1] == "__init__"
        parts = parts[: len(parts) - package]
        if (package or len(parts) == 1) and not any(part.startswith("_") for part in parts):
            found.append(".".join(("fastquant", *parts)))
    return sorted(found)


def load(name: str) -> ModuleType:
    """A module, even where its package has a function of the same name."""
    importlib.import_module(name)
    return sys.modules[name]


def public_names(module: ModuleType) -> list[str]:
    """The names in `__all__`, or else the public ones that the module itself defines."""
    names: list[str] | None = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
        ]
    return names


def assignments(module: ModuleType) -> dict[str, tuple[str, str]]:
    """The constants that a module assigns at its top: their source, and the string after it."""
    body = ast.parse(inspect.getsource(module)).body
    found = {}
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        about = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            about = inspect.cleandoc(str(following.value.value))
        for target in targets:
            if isinstance(target, ast.Name):
                # The package's constants of quantized dtypes, by the names that users know.
                source = re.sub(
                    r"\bQU?INT\d+(X\d)?\b", lambda d: f"torch.{d[0].lower()}", ast.unparse(value)
                )
                found[target.id] = (source, about)
    return found


def first_sentence(value: Any) -> str:
    return " ".join(inspect.cleandoc(value.__doc__ or "").partition("\n\n")[0].split())


def summary(value: Any) -> str:
    """The first sentence of a class's or function's own docstring."""
    if inspect.isclass(value) and "__doc__" not in value.__dict__:
        return ""
    return first_sentence(value) if inspect.isclass(value) or inspect.isroutine(value) else ""


def constant(module: str, name: str, source: str, about: str) -> list[str]:
    shown = source if len(source) < 300 else source[:300].rpartition(",")[0] + ", …"
    return [
        f".. py:data:: {module}.{name}",
        "",
        *(f"   {line}" for line in (*about.splitlines(), "")),
        "   .. code-block:: python",
        "",
        f"      {name} = {shown}",
        "",
    ]


def described_elsewhere(names: list[tuple[str, str]]) -> list[str]:
    """A list of names that this page does not describe, each with where it is described."""
    lines = ["Also here", "---------", ""]
    for name, home in names:
        where = f":py:obj:`{home}`" if home.startswith("fastquant") else f"``{home}``"
        lines.append(f"- ``{name}``: {where}")
    return [*lines, ""]


def reference(name: str, homes: dict[int, str]) -> str:
    """A module's reference page, in reStructuredText.

    `homes` says where each object is described, by its id; objects that this page is the first to
    describe are added to it.
    """
    module = load(name)
    constants = assignments(module)
    table, details, elsewhere = [], [], []
    for public in sorted(set(public_names(module)), key=lambda each: (each.lower(), each)):
        value = getattr(module, public)
        full = f"{name}.{public}"
        if inspect.ismodule(value):
            elsewhere.append((public, value.__name__))
        elif inspect.isclass(value) or inspect.isroutine(value):
            if not value.__module__.startswith("fastquant"):
                elsewhere.append((public, f"{value.__module__}.{value.__qualname__}"))
            elif homes.setdefault(id(value), full) != full:
                elsewhere.append((public, homes[id(value)]))
            else:
                table.append((public, summary(value)))
                kind = "class" if inspect.isclass(value) else "function"
                details.append(f".. auto{kind}:: {full}")
                if inspect.isclass(value):
                    details += ["   :members:", f"   :inherited-members: {FOREIGN_BASES}"]
                details.append("")
        elif public in constants:
            homes.setdefault(id(value), full)
            details += constant(name, public, *constants[public])
        elif id(value) in homes:
            elsewhere.append((public, homes[id(value)]))
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
    if len(table) > 1:
        lines += [".. list-table::", "   :class: summary", ""]
        for public, sentence in table:
            lines += [f"   * - :py:obj:`{public} <{name}.{public}>`", f"     - {sentence}"]
        lines.append("")
    lines += details
    if elsewhere:
        lines += described_elsewhere(elsewhere)
    return "\n".join(lines)


def write_reference(folder: Path, contents: Path) -> None:
    """Write a page for each public module, and add a list of them to the page `contents`."""
    modules = public_modules()
    homes: dict[int, str] = {}
    folder.mkdir()
    # The package itself comes last: objects are described where they are defined.
    for name in sorted(modules, key=lambda each: (each == "fastquant", each)):
        (folder / f"{name}.rst").write_text(reference(name, homes))
    lines = ["", "| module | |", "|---|---|"]
    lines += [f"| [`{name}`](api/{name}.rst) | {first_sentence(load(name))} |" for name in modules]
    lines += ["", "```{toctree}", ":hidden:", "", *(f"api/{name}" for name in modules), "```", ""]
    contents.write_text(contents.read_text() + "\n".join(lines))


def navigation(index: str) -> str:
    """Sphinx's directives for the navigation: for each heading of the index, its links to pages."""
    parts = []
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        links = re.findall(r"^- \[(.+?)\]\((?:\.\./)?([\w-]+\.md)\)", section, flags=re.MULTILINE)
        pages = [f"{text} <{OUTSIDE.get(page, page).removesuffix('.md')}>" for text, page in links]
        parts.append(
            "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```"])
        )
    return "\n\n".join(parts) + "\n"


def stage(source: Path) -> Path:
    """Lay out what Sphinx reads in `source`, and return its folder of pages."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("docs", "build"):
            (source / path.name).symlink_to(path)
    pages = source / "docs"
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("__pycache__"))
    for outside, name in OUTSIDE.items():
        text = (ROOT / outside).read_text()
        (pages / name).write_text(re.sub(r"\]\(docs/", "](", text))
    for page in pages.glob("*.md"):
        text = page.read_text()
        for outside, name in OUTSIDE.items():
            text = text.replace(f"](../{outside}", f"]({name}")
        page.write_text(text)
    index = pages / "index.md"
    index.write_text(index.read_text() + "\n" + navigation((ROOT / "docs/index.md").read_text()))
    write_reference(pages / "api", pages / "api.md")
    return pages


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    pages = stage(folder / "source")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning"),
            *("--keep-going", "--quiet", "--jobs", "auto", "--fresh-env"),
            *("--doctree-dir", folder / "doctrees", pages, folder / "html"),
        ],
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"The site is in {folder / 'html' / 'index.html'}")


if __name__ == "__main__":
    main()
