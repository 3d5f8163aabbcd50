"""Statistics of observers across the processes of `torch.distributed`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fake_quantize import is_range_observer
from .merging import (
    Descriptions,
    Statistics,
    agreed_channels,
    described,
    disagreement,
    merged,
    statistics_of,
    write,
)
from .observer import FixedQParamsObserver, ObserverBase, _UnobservingObserver

__all__ = ["sync_observers"]


def sync_observers(model: nn.Module, group: Any = None) -> None:
    """Merge the statistics of a model's observers over all processes of a group.

    Call it in every process, with the model prepared alike, after each has run its shard of the
    data and before `convert`. Call it once per shard: a second call would add the sums up again.
    Afterwards all processes hold the statistics, and so the scale and zero point, of one process
    that has seen every shard: exactly for running ranges and for histograms whose ranges agree;
    other histograms are resampled, as they are where one process sees the range grow. Moving
    averages become the unweighted mean over the processes that have seen something. Counts of
    non-finite values add up. Fake-quantizers get the scale and zero point of the merged range.
    Observers with fixed parameters, and those that keep no range, stay as they are.

    The number of collectives is four, however many observers there are.

    Args:
        model: a prepared model, an observer or a fake-quantizer.
        group: the process group; the default group if None. Its timeout holds for each
            collective.

    Raises:
        TypeError: `model` is no module.
        ValueError: this process is not in `group`; or the observers of the processes differ, in
            which case every process raises, with the difference named.
        RuntimeError: no process group is there; or a collective failed, as when another process
            has died. In any case the statistics of this process are what they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "sync_observers needs a process group: call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group that was given to sync_observers")
    _warn_of_others(model)
    own = statistics_of(model)
    try:
        everyones = _gathered(described(own), group)
        problem = disagreement(everyones)
        if problem is not None:
            raise ValueError(f"cannot merge the observers of several processes: {problem}")
        if not own:
            return
        device = _device(own, group)
        order = {name: i for i, name in enumerate(everyones["rank 0"])}
        own.sort(key=lambda s: order[s.name])
        new = merged(
            [own],
            agreed_channels(everyones.values()),
            lambda flat: _reduced(flat, dist.ReduceOp.MAX, group),
            lambda flat: _reduced(flat, dist.ReduceOp.SUM, group),
            device,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"sync_observers failed in rank {dist.get_rank(group)}, whose statistics are "
            f"unchanged: a collective did not come to its end ({error})"
        ) from error
    write(model, own, new)


def _gathered(own: Descriptions, group: Any) -> dict[str, Descriptions]:
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, own, group=group)
    return {f"rank {rank}": theirs for rank, theirs in enumerate(everyones)}


def _reduced(flat: Tensor, operation: Any, group: Any) -> Tensor:
    dist.all_reduce(flat, op=operation, group=group)
    return flat


def _device(statistics: list[Statistics], group: Any) -> torch.device:
    """Where the collectives work: on the statistics' device, or the one that NCCL asks for."""
    device = next(
        (s.min_val.device for s in statistics if not s.min_val.is_cpu), torch.device("cpu")
    )
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _warn_of_others(model: nn.Module) -> None:
    """Name the observers that keep something, but no range that could be merged."""
    others = [
        name or "the observer itself"
        for name, module in model.named_modules()
        if isinstance(module, ObserverBase)
        and not isinstance(module, FixedQParamsObserver | _UnobservingObserver)
        and not is_range_observer(module)
        and any(module.buffers())
    ]
    if others:
        warnings.warn(
            "sync_observers merges buffers min_val, max_val and histogram; these observers have "
            f"none and keep what they have: {', '.join(others[:10])}",
            stacklevel=3,
        )
