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
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "fastquant"
# Pages outside docs/, and their names on the site.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# A module in the list of docs/api.md.
LISTED_MODULE = r"^- `(fastquant[\w.]*)`$"
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


def of_constant(source: str) -> str:
    """What the expression that makes a constant says in short; the reference shows all of it."""
    match ast.parse(source or "None", mode="eval").body:
        case ast.Name(id=other):
            return f"the same as `{other}`"
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=made), attr="with_args"), keywords=given
        ):
            inner = [
                ast.unparse(argument.value) for argument in given if argument.arg == "observer"
            ]
            return f"`{made}`{''.join(f' of `{name}`' for name in inner)}, with arguments"
        case ast.Call(func=ast.Name(id=made)) if made[0] != "_":
            return f"a `{made}`"
    return ""


def constant(module: str, name: str, source: str, about: str) -> list[str]:
    shown = source if len(source) < 300 else source[:300].rpartition(",")[0] + ", …"
    lines = [f".. py:data:: {name}", f"   :module: {module}", ""]
    lines += [f"   {line}" for line in (*about.splitlines(), "")]
    return [*lines, "   .. code-block:: python", "", f"      {shown}", ""]


def listed(names: Iterable[tuple[str, str, str]]) -> list[str]:
    """A table of names, each with where it is described and its first sentence."""
    lines = [".. list-table::", "   :class: summary", ""]
    for name, home, sentence in names:
        link = f":py:obj:`{name} <{home}>`" if home.startswith("fastquant") else f"``{name}``"
        lines += [f"   * - {link}", f"     - {' '.join(sentence.split())}"]
    return [*lines, ""]


def own_class(package: str, name: str) -> tuple[str, Any]:
    """The class of a package that takes the place of torch.ao's where there is no torch.ao."""
    for path, module in sorted(sys.modules.items()):
        value = getattr(module, name, None) if path.startswith(f"{package}.") else None
        if inspect.isclass(value) and value.__module__.startswith("fastquant"):
            return f"{path}.{name}", value
    return "", None


def reference(name: str, homes: dict[int, tuple[str, str]]) -> str:
    """A module's reference page, in reStructuredText.

    `homes` has the page and the first sentence of each object, by its id; objects that this page
    is the first to describe are added to it.
    """
    module = load(name)
    sources = assignments(module)
    here, details, constants, elsewhere = [], [], [], []
    for public in sorted(set(public_names(module)), key=lambda each: (each.lower(), each)):
        value = getattr(module, public)
        full = f"{name}.{public}"
        if inspect.isclass(value) and not value.__module__.startswith("fastquant"):
            full, own = own_class(name, public)
            if own is None:
                original = f"``{value.__module__}.{value.__qualname__}``"
                elsewhere.append((public, "", original))
                continue
            value = own
        if inspect.ismodule(value):
            elsewhere.append((public, value.__name__, first_sentence(value)))
        elif id(value) in homes and not isinstance(value, int):
            elsewhere.append((public, *homes[id(value)]))
        elif inspect.isclass(value) or inspect.isroutine(value):
            homes[id(value)] = (full, summary(value))
            here.append((public, *homes[id(value)]))
            kind = "class" if inspect.isclass(value) else "function"
            details.append(f".. auto{kind}:: {full}")
            if inspect.isclass(value):
                details += ["   :members:", f"   :inherited-members: {FOREIGN_BASES}"]
            details.append("")
        elif public in sources:
            source, about = sources[public]
            homes[id(value)] = (full, about.partition("\n\n")[0] or of_constant(source))
            constants += constant(name, public, source, about)
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
    if len(here) > 1:
        lines += listed(here)
    lines += details
    for title, contents in (
        ("Constants", constants),
        ("Described elsewhere", listed(elsewhere) if elsewhere else []),
    ):
        if contents:
            lines += [title, "-" * len(title), "", *contents]
    return "\n".join(lines)


def write_reference(folder: Path, contents: Path) -> None:
    """Write a page for each public module, and link it where the page `contents` names it."""
    modules = public_modules()
    homes: dict[int, tuple[str, str]] = {}
    folder.mkdir()
    # The package itself comes last: objects are described where they are defined.
    for name in sorted(modules, key=lambda each: (each == "fastquant", each)):
        (folder / f"{name}.rst").write_text(reference(name, homes))
    text = contents.read_text()
    listed = re.findall(LISTED_MODULE, text, flags=re.MULTILINE)
    if sorted(listed) != modules:
        wrong = ", ".join(sorted(set(listed) ^ set(modules))) or "one name twice"
        raise SystemExit(f"docs/api.md does not list the public modules: {wrong}")
    text = re.sub(
        LISTED_MODULE,
        lambda name: f"- [`{name[1]}`](api/{name[1]}.rst): {first_sentence(load(name[1]))}",
        text,
        flags=re.MULTILINE,
    )
    lines = ["", "```{toctree}", ":hidden:", "", *(f"api/{name}" for name in listed), "```", ""]
    contents.write_text(text + "\n".join(lines))


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
