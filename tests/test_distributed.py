"""Statistics across processes: real ones, over gloo on this machine."""

from __future__ import annotations

import io
import os
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastquant as fq
from fastquant import observer as ob
from fastquant.distributed import sync_observers
from oracle import assert_same, assert_same_state, assert_unchanged, snapshot
from shards import EXACT, Model, observe, one_process, shards

TIMEOUT = timedelta(seconds=20)


# ------------------------------------------------------------------ what processes do, by name


def _syncs(rank: int, ranks: int, alike: bool) -> Any:
    model = Model()
    observe(model, shards(ranks, alike=alike)[rank])
    model.minmax(torch.tensor([float("nan")] * (rank + 1)))
    sync_observers(model)
    return snapshot(model)


def _some_idle(rank: int, ranks: int, idle: list[int]) -> Any:
    model = Model()
    if rank not in idle:
        observe(model, shards(ranks, alike=False)[rank])
    sync_observers(model)
    return snapshot(model)


def _differ(rank: int, ranks: int, how: str) -> Any:
    model = Model(bins=32 if how == "bins" and rank == 1 else 64)
    if how == "name" and rank == 1:
        del model.minmax
    observe(model, shards(ranks, alike=False)[rank])
    if how == "channels" and rank == 1:
        model.channels = ob.PerChannelMinMaxObserver(ch_axis=1)
        model.channels(torch.randn(2, 7))
    before = snapshot(model)
    try:
        sync_observers(model)
    except ValueError as error:
        assert_unchanged(model, before)
        return str(error)
    return "no error"


def _one_dies(rank: int, ranks: int, when: str) -> Any:
    model = Model()
    observe(model, shards(ranks, alike=False)[rank])
    before = snapshot(model)
    if rank == ranks - 1:
        if when == "midway":
            # After the processes have told each other what they have.

            dist.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            sync_observers(model)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        sync_observers(model)
    except RuntimeError as error:
        assert_unchanged(model, before)
        assert time.monotonic() - start < 2 * TIMEOUT.total_seconds()
        return str(error)
    return "no error"


def _trains(rank: int, ranks: int, with_batch_norm: bool) -> Any:
    torch.manual_seed(0)
    first: nn.Module = nn.Linear(4, 8)
    if with_batch_norm:
        first = nn.Sequential(first, nn.BatchNorm1d(8)).train()
    model = nn.Sequential(fq.QuantStub(), first, nn.ReLU(), nn.Linear(8, 2)).train()
    if with_batch_norm:
        fq.fuse_modules_qat(model, [["1.0", "1.1"]], inplace=True)
    model.qconfig = fq.get_default_qat_qconfig("x86")
    model = fq.prepare_qat(model.train())
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    x = torch.randn(16, 4, generator=generator)
    for _ in range(8):
        optimizer.zero_grad()
        loss = (parallel(x) - x[:, :2]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    sync_observers(model)
    return losses, snapshot(model)


def _in_subgroup(rank: int, ranks: int) -> Any:
    group = dist.new_group([0, 1])
    model = Model()
    observe(model, shards(ranks, alike=False)[rank])
    before = snapshot(model)
    try:
        sync_observers(model, group)
    except ValueError as error:
        assert_unchanged(model, before)
        return str(error)
    return snapshot(model)


JOBS = {f.__name__: f for f in (_syncs, _some_idle, _differ, _one_dies, _trains, _in_subgroup)}


def _serve(rank: int, jobs: Any, results: Any) -> None:
    """One process of the pool: a process group for each job."""
    torch.set_num_threads(1)
    results.put("ready")
    while (job := jobs.get()) is not None:
        name, ranks, port, args = job
        try:
            store = f"tcp://127.0.0.1:{port}"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=ranks, timeout=TIMEOUT
            )
            result = JOBS[name](rank, ranks, *args)
        except Exception:
            result = traceback.format_exc()
        file = io.BytesIO()
        torch.save(result, file)
        results.put((rank, file.getvalue()))
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """Processes that live as long as the tests, forked from one that has imported what they need.

    That one has no threads yet, so that a fork of it is whole.
    """

    def __init__(self) -> None:
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["fastquant", "torch._dynamo", "torch.distributed", "hypothesis.strategies", "pytest"]
        )
        self.workers: dict[int, tuple[Any, Any, Any]] = {}
        self.ready: set[int] = set()

    def run(self, name: str, ranks: int, *args: Any, dying: tuple[int, ...] = ()) -> Any:
        """What each process returns, by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(ranks):
            if rank not in self.workers:
                jobs, results = self.context.Queue(), self.context.Queue()
                process = self.context.Process(target=_serve, args=(rank, jobs, results))
                process.start()
                self.workers[rank] = process, jobs, results
        # A process takes seconds to start; the timeout of the group is for what comes after.
        for rank in range(ranks):
            if rank not in self.ready:
                assert self.workers[rank][2].get(timeout=120) == "ready"
                self.ready.add(rank)
            self.workers[rank][1].put((name, ranks, port, args))
        gathered = {}
        for rank in range(ranks):
            process, _, results = self.workers[rank]
            if rank in dying:
                process.join(60)
                assert process.exitcode == -signal.SIGKILL
                del self.workers[rank]
                self.ready.remove(rank)
                continue
            gathered[rank] = torch.load(io.BytesIO(results.get(timeout=90)[1]))
            assert not str(gathered[rank]).startswith("Traceback"), gathered[rank]
        return gathered

    def close(self) -> None:
        for process, jobs, _ in self.workers.values():
            jobs.put(None)
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


_pool = Pool()
run = _pool.run


@pytest.fixture(autouse=True, scope="module")
def _close_pool() -> Iterator[None]:
    yield
    _pool.close()


# ----------------------------------------------------------------------------- sync_observers


def test_processes_with_shards_end_as_one_with_everything() -> None:
    results = run("_syncs", 3, True)
    expected = one_process(3, alike=True)
    actual = Model()
    actual.load_state_dict({k: v for k, v in results[0].items() if "nonfinite" not in k}, False)
    for name in EXACT:
        assert_same_state(getattr(actual, name), getattr(expected, name))
    assert int(results[0]["minmax.nonfinite_count"]) == 1 + 2 + 3
    for rank in (1, 2):
        for key, value in results[0].items():
            assert_same(results[rank][key], value, key)


def test_shards_of_other_ranges_agree_to_within_the_resampling() -> None:
    state = run("_some_idle", 3, [])[0]
    expected = one_process(3, alike=False)
    for name in ("minmax", "channels", "fake.activation_post_process", "histogram"):
        module = expected.get_submodule(name)
        assert_same(state[f"{name}.min_val"], module.min_val, name)
        assert_same(state[f"{name}.max_val"], module.max_val, name)
    actual, whole = state["histogram.histogram"], expected.histogram.histogram
    torch.testing.assert_close(actual.sum(), whole.sum())
    assert float((actual - whole).cumsum(0).abs().max()) < 0.02 * float(whole.sum())


def test_moving_averages_become_the_mean_of_those_that_saw_something() -> None:
    results = run("_some_idle", 4, [0, 2])
    parts = []
    for rank in (1, 3):
        model = Model()
        observe(model, shards(4, alike=False)[rank])
        parts.append(model)
    for name in ("average", "channel_average", "fused.activation_post_process"):
        for end in ("min_val", "max_val"):
            values = [getattr(m.get_submodule(name), end).double() for m in parts]
            expected = (sum(values) / 2).float()  # type: ignore[union-attr, arg-type]
            for state in results.values():
                assert_same(state[f"{name}.{end}"], expected, name)
    module = Model()
    module.load_state_dict({k: v for k, v in results[0].items() if "nonfinite" not in k}, False)
    scale, zero_point = module.fused.calculate_qparams()
    assert_same(module.fused.scale, scale)
    assert_same(module.fused.zero_point, zero_point.int())


def test_nothing_observed_anywhere_stays_nothing() -> None:
    before = snapshot(Model())
    for state in run("_some_idle", 2, [0, 1]).values():
        for key, value in before.items():
            assert_same(state[key], value, key)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("name", "rank 0 has observers that rank 1 lacks: minmax"),
        ("bins", "histogram: the number of bins is 64 in rank 0 and 32 in rank 1"),
        ("channels", "channels: the number of channels is 4 in rank 0, 7 in rank 1"),
    ],
)
def test_observers_that_differ_are_named_on_every_rank(how: str, message: str) -> None:
    for error in run("_differ", 2, how).values():
        assert message in error


@pytest.mark.parametrize("when", ["before", "midway"])
def test_a_killed_process_is_an_error_in_the_others_and_no_hang(when: str) -> None:
    results = run("_one_dies", 3, when, dying=(2,))
    assert set(results) == {0, 1}
    for error in results.values():
        assert "statistics are unchanged" in error


def test_a_subgroup_is_synced_by_itself() -> None:
    results = run("_in_subgroup", 3)
    assert_same(results[0]["minmax.max_val"], results[1]["minmax.max_val"])
    assert "not in the group" in results[2]


@pytest.mark.parametrize("with_batch_norm", [False, True])
def test_distributed_data_parallel_trains_alike_everywhere(with_batch_norm: bool) -> None:
    results = run("_trains", 2, with_batch_norm)
    (losses, first), (_, second) = results[0], results[1]
    assert losses[-1] < losses[0]
    for key, value in first.items():
        # Batch norm's running statistics are each process's own until the next forward.
        if "running" not in key:
            assert_same(second[key], value, key)


def test_data_parallel_trains() -> None:
    model = nn.Sequential(fq.QuantStub(), nn.Linear(4, 2))
    model.qconfig = fq.get_default_qat_qconfig("x86")
    parallel = nn.DataParallel(fq.prepare_qat(model.train()))
    parallel(torch.randn(8, 4)).sum().backward()
    assert bool(parallel.module[0].activation_post_process.activation_post_process.max_val > 0)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        sync_observers(Model())
    with pytest.raises(TypeError, match="model must be"):
        sync_observers([])  # type: ignore[arg-type]
