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


# The attribute of observers and fake-quantizers that holds where they are in a prepared model. It
# is copied and pickled with them, and in no state_dict.
PATH_IN_MODEL = "_path_in_model"


def naming_its_layer(module: object, error: Exception) -> Exception:
    """The error with the path of the module in front, where `prepare` put it into a model."""
    path = getattr(module, PATH_IN_MODEL, None)
    if not path or type(error) not in (RuntimeError, TypeError, ValueError):
        return error
    return type(error)(f"{path}: {error}")
