"""Buffers: how a module keeps their precision, loads them whole and changes their size."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .ranges import INF
from .schemes import WIDE


class KeepsState(nn.Module):
    """A module that looks after its buffers.

    No conversion makes those in `_kept_precise` narrower than fp32, `half()` for one: ranges and
    scales are too large or too small for fp16 soon, and neither moving averages nor counts move in
    it once they are large beside what is added. A state loads whole or not at all.

    Those in `_counters` are in no state. They begin at zero when a state is loaded, follow the
    other buffers wherever these go, and are never left undefined.
    """

    _kept_precise: ClassVar[tuple[str, ...]] = ()
    _counters: ClassVar[tuple[str, ...]] = ()

    # The class itself, once `_torch.overrides` has found that its tensors may be read directly.
    _read_plainly: ClassVar[type | None] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = (*self._kept_precise, *self._counters)
        before = {name: self._buffers.get(name) for name in kept}
        result: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is None or new is None or new is old:
                continue
            if name in self._counters:
                # `fn` may be that of `to_empty`.
                new.zero_() if old.is_meta else new.copy_(old)
            elif new.is_floating_point() and new.dtype not in WIDE and old.dtype in WIDE:
                self._buffers[name] = old.to(new.device)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the buffers become the state's tensors.
        for key in (prefix + name for name in self._kept_precise):
            value = state_dict.get(key)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                state_dict[key] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _load_whole(
        self, load: Callable[[], None], *faults: list[str], wanted: bool = True
    ) -> bool:
        """Run `load`; unless it is `wanted` and adds nothing to `faults`, undo what it did.

        Returns:
            Whether what was loaded stays.
        """
        owners: tuple[dict[str, Any], ...] = (self._buffers, self._parameters)
        before = [
            (owner, name, tensor, tensor.detach().clone())
            for owner in owners
            for name, tensor in owner.items()
            if tensor is not None
        ]
        count = sum(map(len, faults))
        load()
        if wanted and sum(map(len, faults)) == count:
            self._restart_counters()
            return True
        for owner, name, tensor, value in before:
            owner[name] = tensor
            resized(self, name, value.shape).copy_(value)
        return False

    def _restart_counters(self) -> None:
        """Count from zero, where the other buffers lie now."""
        others = (b for n, b in self._buffers.items() if b is not None and n not in self._counters)
        device = next((buffer.device for buffer in others), None)
        for name in self._counters:
            counter = self._buffers[name]
            assert counter is not None
            if device in (None, counter.device):
                counter.zero_()
            else:
                self._buffers[name] = torch.zeros_like(counter, device=device)


class ActivationPostProcess(ABC, KeepsState):
    """What a prepared model calls with activations: an observer or a fake-quantizer.

    torch.ao's observers and fake-quantizers are virtual subclasses.
    """


def save_replaced(
    module: nn.Module, names: Sequence[str], destination: dict[str, Any], prefix: str
) -> None:
    """Add to a state the plain or parametrized tensors that somebody put in buffers' places."""
    for name in names:
        if prefix + name not in destination:
            destination[prefix + name] = getattr(module, name).detach()


def does_not_fit(prefix: str, problem: str) -> str:
    """What `load_state_dict` is to say of the state of the module at `prefix`."""
    where = f" of {prefix[:-1]}" if prefix else ""
    return f"the state{where} does not fit: {problem}"


def eps_error(eps: object) -> str | None:
    """What makes a saved eps none; None where nothing does, or there is none."""
    if not isinstance(eps, Tensor) or eps.is_meta:
        return None
    if eps.is_floating_point() and bool(((eps >= 0) & (eps.float() < INF)).all()):
        return None
    return f"eps must be finite and not negative, got {eps.tolist()}"


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


def resized(module: nn.Module, name: str, shape: Sequence[int]) -> Tensor:
    """A tensor of `module`, given another shape, to be written to.

    Mostly a buffer; users put parameters and plain tensors in the place of buffers. What it holds
    afterwards is undefined where the shape was another one.
    """
    tensor: Tensor = getattr(module, name)
    if tensor.shape != tuple(shape):
        # An inference tensor could not be updated outside inference mode.
        with torch.inference_mode(False):
            if tensor.untyped_storage().resizable() and not tensor.requires_grad:
                tensor.resize_(shape)
            else:
                # As from torch.load.
                tensor.data = tensor.new_empty(shape)
    return tensor.detach() if tensor.requires_grad else tensor


def refill(module: nn.Module, name: str, shape: Sequence[int], value: float) -> None:
    """Give a tensor of `module` another shape and one value; other threads see both or neither."""
    tensor: Tensor = getattr(module, name)
    with torch.inference_mode(False):
        filled = torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)
        if torch.compiler.is_dynamo_compiling():
            # A graph cannot give a tensor another size, but an attribute another tensor.
            setattr(module, name, filled)
        else:
            tensor.data = filled
