"""Whether one op may do what the call of a fake-quantizer does, together with what precedes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..._native.settings import FusedSettings
from ..._torch.private import has_backward_hooks, is_called_plainly
from ...fake_quantize import FakeQuantize

__all__ = ["fused_on_cuda", "is_fused_for", "is_plain", "settings_of_one_op", "settings_per_tensor"]

# As it was written, to notice another in its place.
_FORWARD: Any = FakeQuantize.forward


# Where modules take one op for several steps, besides the CPU. CUDA has the kernels, too, but they
# have not been measured on a GPU yet: `make cuda-check` does (benchmarks/gpu_fused_ops.py).
_fused_on: set[str] = set()


def is_fused_for(x: Tensor) -> bool:
    """Whether one op was measured to be faster than several on the device of x."""
    return x.is_cpu or x.device.type in _fused_on


@contextmanager
def fused_on_cuda() -> Iterator[None]:
    """Take one op for several steps on CUDA meanwhile, for measuring and testing it."""
    before = set(_fused_on)
    _fused_on.add("cuda")
    try:
        yield
    finally:
        _fused_on.intersection_update(before)


def is_plain(fake_quantizer: Any) -> bool:
    """Whether a call runs FakeQuantize.forward and nothing that somebody added or replaced.

    It says nothing about the tensor, nor about what surrounds the call: modes, tracing, transforms.
    """
    return (
        getattr(type(fake_quantizer), "forward", None) is _FORWARD
        and is_called_plainly(fake_quantizer)
        and not has_backward_hooks(fake_quantizer)
    )


def settings_of_one_op(fake_quantizer: Any) -> FusedSettings | None:
    """What an op needs to do a call of this fake-quantizer.

    None where somebody could tell that the module itself was not called, and for modules other than
    fastquant's fake-quantizers of a minimum and maximum or their moving averages.
    """
    if not is_plain(fake_quantizer):
        return None
    settings: FusedSettings | None = fake_quantizer._settings_of_one_op()
    return settings


def settings_per_tensor(fake_quantizer: Any) -> FusedSettings | None:
    """The same; None also where it has a scale for each channel."""
    settings = settings_of_one_op(fake_quantizer)
    return settings if settings is not None and settings.ch_axis is None else None
