"""A linear layer fused with ReLU."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ....._core.dtypes import QINT8
from .... import intrinsic as nni
from ....quantized.dynamic import Linear


class LinearReLU(Linear):
    """`Linear` followed by ReLU.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's.
        bias: whether there is a bias.
        dtype: of the weight, as for `Linear`.
    """

    _RELU: ClassVar[bool] = True
    _FLOAT_MODULES: ClassVar[tuple[type[nn.Module], ...]] = (nni.LinearReLU,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = QINT8,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
