"""docs/architecture.md names every source file, and names none that does not exist."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("docs/architecture.md", "CONTRIBUTING.md", "docs/performance.md")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

SOURCES = {
    str(path.relative_to(ROOT))
    for folder in ("python/fastquant", "csrc")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix not in (".so", ".pyc", ".typed")
}


def named_in_tables() -> set[str]:
    """The paths that the document's tables describe: a folder is a heading, its files are rows.

    A row may give several names, and patterns such as `vec_*.h`.
    """
    found = set()
    folder = ""
    for line in ARCHITECTURE.splitlines():
        if heading := re.match(r"#+ .*?`([\w/]+/)`", line):
            folder = heading[1]
            found.add(f"{folder}__init__.py")  # what the heading itself describes
        elif line.startswith("#"):
            folder = ""
        elif folder and (row := re.match(r"\| (`.*?) \|", line)):
            found |= {folder + name for name in re.findall(r"`([^`]+)`", row[1])}
    return found


def test_every_source_file_is_described() -> None:
    named = named_in_tables()
    assert len(named) > 20
    assert [
        source for source in sorted(SOURCES) if not any(fnmatch(source, name) for name in named)
    ] == []


def test_every_file_that_is_described_exists() -> None:
    assert [
        name
        for name in sorted(named_in_tables())
        if not name.endswith("__init__.py") and not any(fnmatch(source, name) for source in SOURCES)
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_the_text_exists(document: str) -> None:
    top = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    paths = re.findall(rf"`((?:{top})/[\w./*-]*)`", (ROOT / document).read_text())
    assert paths
    assert [path for path in paths if not any(ROOT.glob(path))] == []
