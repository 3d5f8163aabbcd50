"""Settings of Sphinx for the documentation site, which `tools/build_docs.py` builds."""

from __future__ import annotations

import re
from typing import Any

import torch
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import fastquant

project = "fastquant"
author = "the fastquant authors"
copyright = author
version = release = fastquant.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"
exclude_patterns = ["conf.py"]

# Anchors of headings are those that GitHub makes, so links to sections work in both places.
myst_heading_anchors = 4
# Code blocks that are not in Python, such as shell commands, have no language in our pages.
highlight_language = "none"

# Single backticks in docstrings: a link where they hold a documented name, else plain code.
default_role = "py:obj"
add_module_names = False
# Only what a class's own docstrings say: torch's for the methods it overrides say nothing of it.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"fastquant {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
# The API page lists the modules; nothing links to an index of its own.
html_domain_indices = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#6cb6ff", "color-brand-content": "#6cb6ff"},
}


def mark_code(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Mark the indented blocks of a docstring as code: to reStructuredText they are quotations.

    A block stands after an empty line, and further in than the line before that one.
    """
    marked: list[str] = []
    margin = ""  # of the last line that is no code
    in_code = False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip():
            in_code = in_code and len(indent) > len(margin)
            after_empty_line = bool(marked) and not marked[-1].strip()
            if not in_code and after_empty_line and len(indent) > len(margin):
                if not marked[-2].endswith("::"):
                    marked += [f"{margin}.. code-block:: python", ""]
                in_code = True
            if not in_code:
                margin = indent
        marked.append(line)
    lines[:] = marked


def skip_what_torch_describes(
    app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the methods of quantized tensors that only repeat what torch says of its own."""
    theirs = getattr(torch.Tensor, name, None)
    text = getattr(member, "__doc__", None)
    return True if theirs is not None and text == theirs.__doc__ else None


# Private names in signatures, and what is shown in their place.
_SHOWN = (
    (r"\b_Module\b", "Module"),
    (r"\b_Self\b", "Self"),
    (r"\b_EPS\b", "torch.finfo(torch.float32).eps"),
    (r"\b_INF\b", "inf"),
    (r"\bDEFAULT_BACKEND\b", "'torch.ao'"),
    (r"\bQUINT(\w+)\b", r"torch.quint\1"),
    (r"\bQINT(\w+)\b", r"torch.qint\1"),
)


def show_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    if not signature:
        return None  # of a module or attribute
    for written, shown in _SHOWN:
        signature, returned = (re.sub(written, shown, text or "") for text in (signature, returned))
    return signature, returned


def find_elsewhere(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Link a class or function that another module describes, where only one has this name.

    A single lower-case word is one only where `fastquant` itself has it, as it has `convert`.
    """
    name = node.get("reftarget", "").removeprefix("fastquant.")
    word = name.isalpha() and name.islower()
    if node.get("refdomain") != "py" or not name or (word and not hasattr(fastquant, name)):
        return None
    found = {
        full: entry
        for full, entry in env.domains.python_domain.objects.items()
        if full.endswith(f".{name}") and entry.objtype in ("class", "exception", "function")
    }
    if len(found) != 1:
        return None
    ((full, entry),) = found.items()
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, full)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_what_torch_describes)
    # Before napoleon turns sections such as "Args:" into reStructuredText.
    app.connect("autodoc-process-docstring", mark_code, priority=100)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("missing-reference", find_elsewhere)
