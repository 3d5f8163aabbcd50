"""Batches of a user's data: whether there are any, and how a model is run on one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def checked_data(data: object) -> Iterator[Any]:
    """An iterator over batches; raises TypeError for what is one batch, or none."""
    if isinstance(data, Tensor | Mapping | str | bytes):
        raise TypeError(
            f"data must be an iterable of batches, got one {type(data).__name__}; "
            "for a single batch pass a list: [batch]"
        )
    try:
        return iter(data)  # type: ignore[call-overload,no-any-return]
    except TypeError:
        raise TypeError(
            f"data must be an iterable of batches (a DataLoader, a list of tensors, …), "
            f"got {type(data).__name__}"
        ) from None


def to_device(batch: Any, device: torch.device | None) -> Any:
    """``batch`` with its tensors on ``device``; containers are rebuilt, the rest is left as is."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)):  # PackedSequence, BatchEncoding, …
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [to_device(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The output of ``model`` for the input in ``batch``."""
    is_sequence = isinstance(batch, tuple | list)
    if is_sequence and not batch:
        raise ValueError("data holds an empty tuple or list: the first element is the input")
    x = batch[0] if is_sequence else batch
    as_keywords = isinstance(x, Mapping)
    if not (as_keywords or is_sequence or isinstance(x, Tensor)):
        raise TypeError(
            "a batch must be a tensor, a tuple or list that begins with the input, or a mapping "
            f"of keyword arguments, got {type(batch).__name__}; for anything else pass "
            "forward=lambda model, batch: ..."
        )
    args, keywords = ((), x) if as_keywords else ((x,), {})
    try:
        return model(*args, **keywords)
    except TypeError as error:
        if _takes(model.forward, args, keywords):
            raise  # the model's own
        given = "batch[0]" if is_sequence else "batch"
        raise TypeError(
            f"{error}: a batch ({type(batch).__name__}) is passed as "
            f"model({'**' * as_keywords}{given}), which does not fit; to call the model otherwise "
            "pass forward=lambda model, batch: ..."
        ) from error


def _takes(function: Callable[..., Any], args: tuple[Any, ...], keywords: Any) -> bool:
    """Whether the function's signature fits these arguments, or is not known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*args, **keywords)
    except TypeError:
        return False
    return True


def batch_size(batch: Any) -> int:
    """The first dimension of the first tensor in ``batch``; 1 where there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list) and batch:
        return batch_size(batch[0])
    return 1
