"""The page that an analysis writes, and what a browser makes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import browser
import fastquant as fq
from browser import Browser
from fastquant.analysis import Analysis, analyze
from fastquant.analysis.text import sizes
from oracle import quiet

VOID = {"meta", "link", "input"}


def analysis_of(metric: bool = True) -> Analysis:
    """Of a small model, one layer of which has a name that HTML must escape, and an outlier."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = {
        "quant": fq.QuantStub(),
        "conv<1>&": nn.Conv2d(1, 4, 3),
        "conv10": nn.Conv2d(4, 300, 3),
        "conv9": nn.Conv2d(300, 4, 1),
        "dequant": fq.DeQuantStub(),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    with torch.no_grad():
        model.conv9.bias[0] = 40.0
    model.eval().qconfig = fq.get_default_qconfig("qnnpack")
    data = [torch.randn(2, 1, 8, 8) for _ in range(2)]
    with quiet():
        prepared = fq.prepare(model)
        fq.calibrate(prepared, data, progress=False)
        return analyze(
            model,
            prepared,
            data,
            metric=(lambda net: 0.75) if metric else None,
            name="Net <of> tests & more",
            progress=False,
        )


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analysis_of()


@pytest.fixture(scope="module")
def page(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return analysis.to_html(tmp_path_factory.mktemp("page") / "report.html")


class Balance(HTMLParser):
    """Raises where an element is not closed, or another one is."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [values["href"]] if tag == "a" and values.get("href") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page: Path) -> None:
    balance = Balance()
    balance.feed(page.read_text())
    assert balance.open == []
    assert len(balance.ids) == len(set(balance.ids))
    assert balance.links
    assert {link.removeprefix("#") for link in balance.links} <= set(balance.ids)


def test_the_page_names_nothing_outside_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?://|//\w+\.|@import|url\(", text)
    assert set(re.findall(r"(?:src|href)=\"([^#\"]*)", text)) <= {"", "data:,"}


def test_sizes_that_are_compared_have_one_unit() -> None:
    assert sizes(2_100_000, 529_700) == "2.1 → 0.5 MB"
    assert sizes(900, 225) == "900 → 225 B"
    assert sizes(0, 0) == "0 → 0 B"


def test_names_are_escaped(page: Path) -> None:
    text = page.read_text()
    assert "conv<1>&" not in text.replace("conv&lt;1&gt;&amp;", "")
    assert "conv&lt;1&gt;&amp;" in text
    assert "Net &lt;of&gt; tests &amp; more" in text


def test_the_page_has_a_histogram_and_the_methods_for_each_layer(
    page: Path, analysis: Analysis
) -> None:
    text = page.read_text()
    assert text.count("<details ") == len(analysis.layers)
    assert text.count('aria-label="Histogram of the output of ') == len(analysis.layers)
    assert text.count('aria-label="Weight of ') == 3
    for layer in analysis:
        assert layer.output is not None
        methods = {clipping.method for clipping in layer.output.clippings}
        assert methods == {"minmax", "l2", "mse", "percentile", "entropy"}
        for method in methods:
            assert f".{method} {{ stroke" in text


def test_pages_stay_small(page: Path, analysis: Analysis) -> None:
    assert page.stat().st_size < 30_000 + 15_000 * len(analysis.layers)


def test_a_page_without_metric_and_sensitivity_leaves_their_columns_out(tmp_path: Path) -> None:
    text = analysis_of(metric=False).to_html(tmp_path / "report.html").read_text()
    assert "all but this, dB" in text
    assert "metric</button>" not in text


# --- in a browser -----------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    browser.find() is None, reason="needs Chromium; on Debian: apt install chromium"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def opened(running: Browser, page: Path) -> Browser:
    running.messages.clear()
    running.requests.clear()
    running.look(page.with_name("before.png"), 1280, 900)
    running.open(page)
    return running


NAMES = "[...document.querySelectorAll('.layers tbody tr')].map(row => row.cells[0].textContent)"
CELLS = "[...document.querySelectorAll('.layers tbody tr')].map(row => row.cells[{}].dataset.value)"
HEADS = "[...document.querySelectorAll('.layers thead th')].map(head => head.textContent)"
BUTTON = "document.querySelectorAll('.layers thead button')[{}]"


@needs_browser
def test_the_page_opens_from_a_file_without_an_error_or_a_request(
    opened: Browser, page: Path
) -> None:
    assert opened.messages == []
    assert opened.requests == [page.as_uri()]


@needs_browser
def test_every_column_sorts_both_ways(opened: Browser) -> None:
    heads = opened.run(HEADS)
    assert len(heads) > 12
    for column in range(3, len(heads)):
        for ascending in (True, False):
            opened.run(f"{BUTTON.format(column)}.click()")
            values = [float(value) for value in opened.run(CELLS.format(column))]
            known = [value for value in values if not math.isnan(value)]
            assert known == sorted(known, reverse=not ascending), heads[column]
            assert all(map(math.isnan, values[len(known) :]))
            sorts = opened.run(f"{BUTTON.format(column)}.closest('th').ariaSort")
            assert sorts == ("ascending" if ascending else "descending")
            assert opened.run("document.querySelectorAll('[aria-sort]').length") == 1
    assert opened.messages == []


@needs_browser
def test_names_sort_by_the_numbers_in_them(opened: Browser) -> None:
    opened.run(f"{BUTTON.format(0)}.click()")
    assert opened.run(NAMES) == ["conv<1>&", "conv9", "conv10", "quant"]


@needs_browser
def test_columns_sort_by_keyboard(opened: Browser) -> None:
    opened.run(f"{BUTTON.format(0)}.focus()")
    opened.press("Enter")
    assert opened.run(NAMES) == ["conv<1>&", "conv9", "conv10", "quant"]
    opened.press(" ")
    assert opened.run(NAMES) == ["quant", "conv10", "conv9", "conv<1>&"]
    opened.press("Tab")
    opened.press("Enter")
    ranks = [float(value) for value in opened.run(CELLS.format(1))]
    assert ranks == sorted(ranks)
    assert "Sorted by rank, ascending" in opened.run("spoken.textContent")


@needs_browser
def test_a_layers_name_opens_its_details(opened: Browser) -> None:
    opened.run("document.querySelectorAll('.layers tbody a')[2].focus()")
    opened.press("Enter")
    opened.run("new Promise(r => setTimeout(r, 50))")
    assert opened.run("document.getElementById('layer-3').open") is True
    assert opened.run("document.activeElement.parentElement.id") == "layer-3"
    assert opened.messages == []


@needs_browser
def test_the_filter_leaves_what_it_names(opened: Browser) -> None:
    opened.run("filter.value = 'CONV1'; filter.dispatchEvent(new Event('input'))")
    shown = opened.run(
        f"{NAMES}.filter((_, i) => !document.querySelectorAll('.layers tbody tr')[i].hidden)"
    )
    assert shown == ["conv10"]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["laptop", "phone"])
def test_nothing_but_the_table_is_wider_than_the_screen(
    opened: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    picture = opened.look(tmp_path / "page.png", width, 900, dark)
    assert picture.stat().st_size > 10_000
    assert opened.run("document.documentElement.scrollWidth") <= width
    paper = opened.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(17, 22, 27)" if dark else "rgb(255, 255, 255)")
    # Text on paper, and every line on it, by WCAG's contrast: 4.5 for text, 3 for drawings.
    ratios = opened.run(CONTRASTS)
    assert ratios["text"] >= 4.5
    assert min(ratios["lines"]) >= 3


CONTRASTS = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/\\d+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [dark, bright] = [light(a), light(b)].sort();
    return (bright + 0.05) / (dark + 0.05);
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  return {
    text: Math.min(...[...document.querySelectorAll("p, td, a, th")]
      .map((e) => ratio(getComputedStyle(e).color, paper))),
    lines: [...document.querySelectorAll("svg .line")]
      .map((e) => ratio(getComputedStyle(e).stroke, paper)),
  };
})()"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390], ids=["laptop", "phone"])
def test_names_of_the_ranking_stand_beside_their_bars(
    opened: Browser, tmp_path: Path, width: int
) -> None:
    opened.look(tmp_path / "page.png", width, 900)
    gaps = opened.run(
        "[...document.querySelectorAll('.ranking tr')].filter(row => row.querySelector('a'))"
        ".map(row => row.querySelector('.room').getBoundingClientRect().left"
        " - row.querySelector('a').getBoundingClientRect().left)"
    )
    assert gaps
    assert max(gaps) < 0.45 * width if width < 500 else max(gaps) < 0.25 * width


@needs_browser
def test_methods_differ_in_more_than_their_colour(opened: Browser) -> None:
    patterns = opened.run(
        "['use','minmax','l2','mse','percentile','entropy'].map(name => {"
        "const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');"
        "path.setAttribute('class', 'line ' + name);"
        "document.querySelector('svg').append(path);"
        "return getComputedStyle(path).strokeDasharray; })"
    )
    assert len(set(patterns)) == 6
