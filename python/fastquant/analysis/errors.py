"""The error that every part of the analysis raises for people."""

from __future__ import annotations


class AnalysisError(ValueError):
    """Models, data or a metric that cannot be analysed; the message names what is wrong."""
