"""Run data through a prepared model, so that its observers learn ranges."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ._conversion.checks import listed, nonfinite_counts
from ._core.batches import batch_size, checked_data, run_batch, to_device
from .observer import _is_activation_post_process
from .utils import _assert_and_get_unique_device

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True)
class Calibration:
    """What one run of :func:`calibrate` processed.

    ``batches`` and ``samples`` (the sum of the batches' first dimensions) are counts;
    ``seconds`` is the wall-clock time, loading of the data included.
    """

    batches: int
    samples: int
    seconds: float


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = True,
) -> Calibration:
    """Run ``data`` through a prepared ``model``, in eval mode and without gradients.

    Args:
        model: a model that :func:`fastquant.prepare` or :func:`fastquant.prepare_qat` has
            given observers; on one device.
        data: batches: a ``DataLoader`` or any other iterable. Tensors in a batch, also those
            inside tuples, lists and mappings, are moved to the model's device, and so is
            anything else with a method ``to(device)``.
        batches: stop after this many; ``None`` goes through all of ``data``.
        forward: ``forward(model, batch)`` runs the model on one batch. By default a tensor is
            passed as ``model(batch)``, a mapping as ``model(**batch)``; of a tuple or list the
            first element is the input (a target may follow), passed by the same rule or, where
            it is neither tensor nor mapping, as it is.
        progress: show a progress bar on stderr.

    Returns:
        How many batches and samples were processed, and how long it took.

    Afterwards every submodule has its former training mode again, also after an exception.
    Ctrl-C takes effect between two batches (a second one at once), so every observer has
    seen the same batches, and the statistics gathered up to there stay in place.
    Observers that left out non-finite values are named in one warning.

    Raises:
        TypeError: an argument has a wrong type, or, without ``forward``, a batch has.
        ValueError: ``model`` has no observers, or is on several devices or on meta,
            ``batches`` < 1, or no batch in ``data``.
    """
    if batches is not None:
        if isinstance(batches, bool) or not isinstance(batches, int):
            raise TypeError(f"batches must be an int or None, got {type(batches).__name__}")
        if batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
    if forward is not None and not callable(forward):
        raise TypeError(
            f"forward must be callable as forward(model, batch), got {type(forward).__name__}"
        )
    device = _device_of_prepared(model)
    source = checked_data(data)

    run = forward or run_batch
    known = length_hint(data, -1)
    lengths = [n for n in (batches, known) if n is not None and n >= 0]
    modes = [(module, module.training) for module in model.modules()]
    before = nonfinite_counts(model)
    start = time.perf_counter()
    done = samples = 0
    try:
        model.eval()
        # no_grad, not inference_mode: tensors that a model or an observer stores in its forward
        # must stay usable in later training, and inference tensors are not.
        with (
            torch.no_grad(),
            tqdm(
                total=min(lengths, default=None),
                desc="calibrating",
                unit="batch",
                disable=not progress,
            ) as bar,
        ):
            for batch in islice(source, batches):
                with _interrupt_held_back():
                    run(model, to_device(batch, device))
                    done += 1
                    samples += batch_size(batch)
                    bar.update()
    finally:
        for module, training in modes:
            module.training = training
    if done == 0:
        raise ValueError("data is empty: there was no batch to calibrate with")
    # Reading the counts waits for the device, so the time below includes all of its work.
    _warn_of_nonfinite(before, nonfinite_counts(model))
    return Calibration(done, samples, time.perf_counter() - start)


def _device_of_prepared(model: object) -> torch.device | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(_is_activation_post_process(module) for module in model.modules()):
        raise ValueError(
            f"model ({type(model).__name__}) has no observers: give it a qconfig and call "
            "fastquant.prepare or fastquant.prepare_qat first; a converted model cannot be "
            "calibrated"
        )
    device = _assert_and_get_unique_device(model)
    if device is not None and device.type == "meta":
        raise ValueError("model is on the meta device, where tensors have no values to observe")
    return device


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Delays the first Ctrl-C to the end of the block."""
    previous = signal.getsignal(signal.SIGINT)
    # Only the main thread gets signals and may set handlers.
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[Any] = []

    def hold(*signal_and_frame: Any) -> None:
        signal.signal(signal.SIGINT, previous)
        held.append(signal_and_frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])


def _warn_of_nonfinite(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    new = {layer: count - before.get(layer, 0) for layer, count in after.items()}
    seen = [f"{layer} ({count})" for layer, count in new.items() if count > 0]
    if seen:
        warnings.warn(
            "NaN or infinite values met in calibration were left out of the statistics, by layer: "
            + listed(seen),
            stacklevel=3,
        )
