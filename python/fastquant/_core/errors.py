"""The error that the package raises for what cannot be quantized as asked."""

from __future__ import annotations


class QuantizationError(ValueError, AssertionError):
    """A model, config or argument that cannot be quantized as asked.

    Both a ValueError, which it is, and an AssertionError, which torch.ao raises for the same
    mistakes, so `except` clauses written for either keep working.
    """


# Where users import it from, and where pickles look for it.
QuantizationError.__module__ = "fastquant.utils"


class ConversionError(QuantizationError, RuntimeError):
    """A module that cannot be converted.

    torch.ao lets through what a module's `from_float` raises, most often the RuntimeError of an
    op that packs weights; so code written for torch.ao may catch that.
    """
