"""Observers in several threads, in forked processes and beside torch's own threads."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastquant as fq
from fastquant import observer as ob
from oracle import assert_same, assert_same_state, assert_unchanged, snapshot
from zoo import OBSERVERS, every_observer

NAN = float("nan")


@pytest.mark.parametrize("name", ["channels", "channel average"])
def test_first_tensors_from_several_threads_share_the_buffers(name: str) -> None:
    for _ in range(20):
        module = OBSERVERS[name]()
        barrier = threading.Barrier(4)

        def work(k: int, module: Any = module, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            module(torch.full((5, 3), float(k)))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert module.min_val.shape == (5,)
        if name == "channels":
            assert_same(module.min_val, torch.zeros(5))
            assert_same(module.max_val, torch.full((5,), 3.0))


def test_a_model_observed_from_several_threads_has_seen_everything() -> None:
    """Small tensors and large ones, which are observed without the GIL."""
    torch.manual_seed(0)
    model = fq.default_qconfig.activation, fq.HistogramObserver, fq.PerChannelMinMaxObserver
    modules = [make() for make in model]
    whole = [make() for make in model]
    batches = [torch.randn(shape) for shape in ((4, 7), (4, 20_000)) for _ in range(12)]
    for x in batches:
        x[0, 0] = NAN
        # The extremes first, so that no histogram is resampled.
        x[1, 0], x[1, 1] = -9, 9

    def work(k: int) -> None:
        for x in batches[k::4]:
            for module in modules:
                module(x)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for module, expected in zip(modules, whole, strict=True):
        for x in batches:
            expected(x)
        assert_unchanged(module, snapshot(expected))


@every_observer
def test_the_number_of_torchs_threads_may_change(name: str, threads: None) -> None:
    a, b = OBSERVERS[name](), OBSERVERS[name]()
    for i, count in enumerate((1, 4, 2, 3)):
        x = torch.randn(64, 8192) * (i + 1)
        torch.set_num_threads(count)
        a(x)
        torch.set_num_threads(1)
        b(x)
    assert_same_state(a, b)


class _Observing(TensorDataset):
    """Observes in the worker, which a fork has given a copy of the observer."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__(x)
        self.module = module

    def __getitem__(self, index: int) -> Any:
        (x,) = super().__getitem__(index)
        self.module(x)
        return x


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_forked_workers_observe_after_the_parent_has() -> None:
    module = ob.HistogramObserver(bins=64)
    module(torch.randn(256, 4096))
    before = snapshot(module)
    data = _Observing(module, torch.randn(4, 256, 256))
    loader = DataLoader(data, num_workers=2, multiprocessing_context="fork", timeout=30)
    assert len(list(loader)) == 4
    assert_unchanged(module, before)
    assert os.getpid() > 0
