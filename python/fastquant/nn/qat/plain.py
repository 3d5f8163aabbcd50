"""Whether one op may do what the call of a fake-quantizer does, together with what precedes it."""

from __future__ import annotations

from typing import Any

from ..._native.settings import FusedSettings
from ..._torch.private import has_backward_hooks, is_called_plainly
from ...fake_quantize import FakeQuantize

__all__ = ["is_plain", "settings_of_one_op", "settings_per_tensor"]

# As it was written, to notice another in its place.
_FORWARD: Any = FakeQuantize.forward


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
