"""Buffers: how a module keeps their precision, loads them whole and changes their size."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .schemes import WIDE


class KeepsState(nn.Module):
    """A module that looks after its buffers.

    No conversion makes those in `_kept_precise` narrower than fp32, `half()` for one: ranges and
    scales are too large or too small for fp16 soon, and neither moving averages nor counts move in
    it once they are large beside what is added. A state loads whole or not at all.
    """

    _kept_precise: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in self._kept_precise}
        result: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if (
                old is not None
                and new is not None
                and new.is_floating_point()
                and new.dtype not in WIDE
                and old.dtype in WIDE
            ):
                self._buffers[name] = old.to(new.device)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the buffers become the state's tensors.
        for key in (prefix + name for name in self._kept_precise):
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                state_dict[key] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_whole(self, load: Callable[[], None], *faults: list[str]) -> bool:
        """Run `load`; where it adds to `faults`, put back what buffers held, and return False."""
        before = [(k, b, b.clone()) for k, b in self._buffers.items() if b is not None]
        count = sum(map(len, faults))
        load()
        if sum(map(len, faults)) == count:
            return True
        for name, buffer, value in before:
            self._buffers[name] = buffer
            resize_buffer(self, name, value.shape).copy_(value)
        return False


class ActivationPostProcess(ABC, KeepsState):
    """What a prepared model calls with activations: an observer or a fake-quantizer.

    torch.ao's observers and fake-quantizers are virtual subclasses.
    """


def misfit(prefix: str, problem: str) -> str:
    """What `load_state_dict` is to say of the state of the module at `prefix`."""
    where = f" of {prefix[:-1]}" if prefix else ""
    return f"the state{where} does not fit: {problem}"


def qparams_error(saved: Mapping[str, object], per_channel: bool) -> str | None:
    """What is wrong with a saved scale and zero point; None where they can be loaded."""
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value.dim() > 1 or not (per_channel or value.numel() == 1):
            wanted = "one element per channel" if per_channel else "one element"
            return f"size mismatch for {name}: got shape {list(value.shape)}, needs {wanted}"
        if value.is_complex() or (name == "scale" and not value.is_floating_point()):
            return f"{name} must be of real numbers, scale of floating ones, got {value.dtype}"
        # As the buffers hold it, mostly.
        held = value.float() if name == "scale" else value
        if not value.is_meta and not bool(held.isfinite().all()):
            return f"{name} must be finite, got {value.tolist()}"
    scale, zero_point = saved.get("scale"), saved.get("zero_point")
    if isinstance(scale, Tensor) and not scale.is_meta and not bool((scale > 0).all()):
        return f"scale must be positive, got {scale.tolist()}"
    if (
        isinstance(scale, Tensor)
        and isinstance(zero_point, Tensor)
        and scale.numel() != zero_point.numel()
    ):
        return (
            "scale and zero_point must be of one size, got shapes "
            f"{list(scale.shape)} and {list(zero_point.shape)}"
        )
    return None


def resize_buffer(module: nn.Module, name: str, shape: Sequence[int]) -> Tensor:
    """Give a buffer of `module` another shape, in place where its storage allows that.

    Storage from `torch.load` does not. What the buffer holds afterwards is undefined.
    """
    buffer = module._buffers[name]
    assert buffer is not None
    if buffer.shape == tuple(shape):
        return buffer
    # An inference tensor could not be updated outside inference mode.
    with torch.inference_mode(False):
        if buffer.untyped_storage().resizable():
            buffer.resize_(shape)
        else:
            buffer = module._buffers[name] = buffer.new_empty(shape)
    return buffer


def refill_buffer(module: nn.Module, name: str, shape: Sequence[int], value: float) -> None:
    """Give a buffer another shape and one value; other threads see it before or after that."""
    buffer = module._buffers[name]
    assert buffer is not None
    with torch.inference_mode(False):
        buffer.data = torch.full(shape, value, dtype=buffer.dtype, device=buffer.device)
