"""Kinds of quantization, numbered as torch numbers them in C++."""

import enum

__all__ = ["QuantType"]


class QuantType(enum.IntEnum):
    """How a module is quantized.

    DYNAMIC: integer weights, activation ranges measured at each call. STATIC: both fixed after
    calibration. QAT: STATIC, with training in between. WEIGHT_ONLY: activations stay floating.
    """

    DYNAMIC = 0
    STATIC = 1
    QAT = 2
    WEIGHT_ONLY = 3


def _get_quant_type_to_str(quant_type: QuantType) -> str:
    return quant_type.name.lower()


def _quant_type_from_str(name: str) -> QuantType:
    for quant_type in QuantType:
        if quant_type.name.lower() == name:
            return quant_type
    accepted = ", ".join(repr(t.name.lower()) for t in QuantType)
    raise ValueError(f"unknown QuantType name {name!r}; accepted: {accepted}")
