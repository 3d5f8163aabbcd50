"""The pages of the documentation: their code runs, and their links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
# Paths relative to the repository, as they are in links and in the names of tests.
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
]
# A block of Python; the comment before it, if there is one, tells why it is not run.
SNIPPET = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]*) -->\n+)?^```python\n(?P<code>.*?)^```", re.M | re.S
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: str) -> set[str]:
    """The anchors of the page's headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text_of(page)), re.M):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.add(next(s for n in range(99) if (s := f"{slug}-{n}" if n else slug) not in found))
    return found


def skip_without_what_is_needed(code: str) -> None:
    if re.search(r"torch\.ao|torch_ao|fastquant\.bench", re.sub("#.*", "", code)):
        why = "the page shows torch.ao beside fastquant"
        pytest.importorskip("torch.ao.quantization", reason=why)
    for package in ("onnx", "onnxscript") if "fastquant.onnx" in code else ():
        pytest.importorskip(package)
    of_ddp = inspect.signature(DistributedDataParallel).parameters
    if "forward_sync_buffers" in code and "forward_sync_buffers" not in of_ddp:
        pytest.skip("the page shows an argument that DistributedDataParallel has from 2.13 on")


@pytest.mark.filterwarnings("ignore")  # torch's, about its own future
@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(text_of(page))])
def test_snippets_run_in_the_order_of_the_page(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All blocks of a page share one namespace; what a `print(…)  # …` announces is printed."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As torchrun sets them for a single process.
    launched = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    namespace = {"__name__": "page"}
    text = text_of(page)
    skip_without_what_is_needed("".join(found["code"] for found in SNIPPET.finditer(text)))
    for snippet in SNIPPET.finditer(text):
        if snippet["reason"]:
            continue
        # The lines before the block are put before it, empty: errors then show the page's lines.
        lines = "\n" * text.count("\n", 0, snippet.start("code"))
        exec(compile(lines + snippet["code"], ROOT / page, "exec"), namespace)
        printed = capsys.readouterr().out
        for expected in re.findall(r"^ *print\(.*\)  # (.+)$", snippet["code"], re.M):
            assert expected in printed


def test_few_snippets_are_not_run() -> None:
    snippets = [found for page in PAGES for found in SNIPPET.finditer(text_of(page))]
    assert len(snippets) == sum(text_of(page).count("\n```python") for page in PAGES) > 10
    assert sum(bool(found["reason"]) for found in snippets) <= len(snippets) / 10


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text_of(page))):
        if re.match(r"\w+:", link):
            continue  # outside; these tests use no network
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        relative = path.resolve().relative_to(ROOT).as_posix()
        if not path.exists() or (anchor and anchor not in anchors(relative)):
            dead.append(link)
    assert dead == []


def test_every_page_is_in_the_navigation() -> None:
    """The site's navigation consists of the links of docs/index.md under its headings."""
    index = text_of("docs/index.md")
    linked = re.findall(r"^- \[.+?\]\(([\w./-]+)\)", index[index.index("\n## ") :], re.M)
    assert sorted(set(linked)) == sorted(linked)
    in_docs = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert set(linked) >= in_docs - {"index.md"}


def test_api_page_lists_every_public_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    listed = re.findall(r"^- `([\w.]+)`$", text_of("docs/api.md"), re.M)
    assert sorted(listed) == importlib.import_module("build_docs").public_modules()


def test_names_of_torch_ao_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name is there, and said to be fastquant's, torch.ao's or missing as it is."""
    pytest.importorskip("torch.ao.quantization")
    page = text_of("docs/torch-ao-names.md")
    if f"with torch {torch.__version__.partition('+')[0]}." not in page:
        pytest.skip("the page is about another version of torch")
    monkeypatch.syspath_prepend(ROOT / "tools")
    made = importlib.import_module("torch_ao_names").page()

    def names(text: str) -> list[str]:
        # Without the sentences, which are those of docstrings.
        return re.findall(r"^(?:## .*|\| `.+?` \|(?: \*torch\.ao's| \*\*Not here)?)", text, re.M)

    assert len(names(page)) > 300
    assert names(made) == names(page), "run `python tools/torch_ao_names.py`"


def test_headings_are_one_level_deeper_at_most() -> None:
    for page in PAGES:
        levels = [
            len(marks) for marks in re.findall(r"^(#+) ", without_blocks(text_of(page)), re.M)
        ]
        assert levels[0] == 1, page
        assert all(after - before <= 1 for before, after in pairwise(levels)), page
