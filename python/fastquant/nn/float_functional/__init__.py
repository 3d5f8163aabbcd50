"""Operations of float models as modules; users know them as names of `fastquant.nn.quantized`.

Where torch.ao exists they are its classes, otherwise those of `operations`. They have a package of
their own because `nn.quantizable`, which `nn.quantized` imports, needs them, too.
"""

from __future__ import annotations

from ..._torch import ao
from ..._torch.counterparts import prefer_torch_ao
from .operations import FloatFunctional, FXFloatFunctional

__all__ = ["FXFloatFunctional", "FloatFunctional"]

prefer_torch_ao(globals(), ao.nnq, __all__)
