"""The error that every part of the analysis raises for people, and those that models raise."""

from __future__ import annotations


class AnalysisError(ValueError):
    """Models, data or a metric that cannot be analysed; the message names what is wrong."""


RUN_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)
"""What converting a model or running the converted one raises, where either is impossible."""


def first_line(error: Exception) -> str:
    """An error in one line, for a note in a report."""
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
