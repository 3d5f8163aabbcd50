"""Operations of float models that are observed, and quantized later, as modules are.

These are the package's own; where torch.ao exists, the package has torch.ao's instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _FloatOperations(nn.Module):
    def _observed(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(
            "a FloatFunctional has no forward: call one of its operations, such as add or cat"
        )

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y"""
        return self._observed(torch.add(x, y))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """x + y, of a number; not observed, as the quantized operation needs no range."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """x * y"""
        return self._observed(torch.mul(x, y))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """x * y, of a number; not observed, as the quantized operation needs no range."""
        return torch.mul(x, y)

    def cat(self, x: list[Tensor], dim: int = 0) -> Tensor:
        """torch.cat(x, dim)"""
        return self._observed(torch.cat(x, dim=dim))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """relu(x + y)"""
        return self._observed(F.relu(torch.add(x, y)))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """torch.matmul(x, y)"""
        return self._observed(torch.matmul(x, y))


class FloatFunctional(_FloatOperations):
    """Operations of a float model, each observed by `activation_post_process`.

    Use one instance for each place in a model, since each has the range of its results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity()

    def _observed(self, x: Tensor) -> Tensor:
        return self.activation_post_process(x)  # type: ignore[no-any-return]


class FXFloatFunctional(_FloatOperations):
    """The same without an observer, for graphs that have one beside each operation."""
