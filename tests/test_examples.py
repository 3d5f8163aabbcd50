"""The examples run, and do what they say; commands in the documents exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()

needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn"
)


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@needs_sklearn
@pytest.mark.filterwarnings("ignore")  # torch.ao's own
def test_report(demo: ModuleType) -> None:
    spec = importlib.util.spec_from_file_location("report", EXAMPLES / "report.py")
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)  # its `import demo` finds the fixture's
    analysis = report.run(demo.Settings(epochs=3))
    assert [layer.name for layer in analysis][:2] == ["quant", "stem.0"]
    assert analysis.quantized_metric > analysis.float_metric - 3 > 60
    assert analysis.sqnr > 15


@needs_sklearn
@pytest.mark.filterwarnings("ignore")  # torch.ao's own
def test_demo(demo: ModuleType) -> None:
    rows = demo.run(demo.Settings(epochs=6, qat_epochs=1, rounds=1))
    first, *quantized = rows
    assert [row.name for row in quantized] == [
        "static, histogram",
        "static, min/max",
        "dynamic",
        "QAT",
        "native int8",
    ]
    assert first.accuracy["fastquant"] > 90
    for row in quantized:
        ours, theirs = row.accuracy["fastquant"], row.accuracy["torch.ao"]
        assert ours > first.accuracy["fastquant"] - 2, row.name
        assert abs(ours - theirs) < 1, row.name
        assert row.kilobytes["fastquant"] < 0.6 * first.kilobytes["fastquant"], row.name
        assert row.kilobytes["fastquant"] == pytest.approx(row.kilobytes["torch.ao"], rel=0.04)
        assert bool(row.timed) == (row.name != "dynamic")

    lines = demo.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    for line, row in zip(lines[2:], rows, strict=True):
        assert line.startswith(row.name)
        assert f"{row.accuracy['fastquant']:.1f}" in line


@needs_sklearn
def test_custom_training_loop() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "custom_training_loop.py", "--steps", "30"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    reached = dict(re.findall(r"^(.+): ([\d.]+) %$", done.stdout, re.MULTILINE))
    assert list(reached) == [
        "float",
        "fake-quantized, not trained",
        "fake-quantized, trained",
    ]
    assert float(reached["fake-quantized, trained"]) > 70
    assert float(reached["fake-quantized, trained"]) > float(reached["fake-quantized, not trained"])


@pytest.mark.parametrize("example", ["demo.py", "custom_training_loop.py"])
def test_an_example_without_scikit_learn_says_what_to_install(example: str, tmp_path: Path) -> None:
    (tmp_path / "sklearn.py").write_text("raise ModuleNotFoundError(\"No module named 'sklearn'\")")
    done = subprocess.run(
        [sys.executable, EXAMPLES / example],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{example} needs scikit-learn" in done.stderr
    assert "pip install scikit-learn" in done.stderr


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_the_documents_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(
        re.findall(r"(?:`|^    )make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE)
    )
    assert named
    assert named <= targets


def test_modules_run_in_the_readme_exist() -> None:
    named = re.findall(r"python -m ([\w.]+)", README)
    assert named
    assert all(importlib.util.find_spec(module) for module in named)


def test_nothing_tells_people_to_install_a_package_of_this_name_from_an_index() -> None:
    # On PyPI another project has the name: this one is installed from its sources.
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    command = re.compile(r"(pip install|uv add|uv pip install)\b[^\n`]*?['\" ]fastquant\b")
    telling = [
        name
        for name in listed
        if name.endswith((".py", ".md", ".toml", ".cmake", ".txt", ".h", ".cpp", "Makefile"))
        and command.search((ROOT / name).read_text())
    ]
    assert telling == []
