"""A backward function overwrites its incoming gradient only where nobody else can see it."""

from __future__ import annotations

import textwrap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastquant as fq
from fastquant._native.ownership import is_sole_owner, learn_counts
from processes import python


class Overwriting(torch.autograd.Function):
    """Returns its input. Its backward function spoils the gradient where it is the only owner."""

    spoiled: list[bool]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        learn_counts()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        alone = is_sole_owner(grad)
        Overwriting.spoiled.append(alone)
        result = grad.clone()
        if alone:
            grad.fill_(torch.nan)
        return result


@pytest.fixture(autouse=True)
def none_spoiled() -> None:
    Overwriting.spoiled = []


def applied() -> tuple[Tensor, Tensor]:
    x = torch.ones(4, requires_grad=True)
    return x, Overwriting.apply(x)


def hooked(x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    y = Overwriting.apply(x)
    y.register_hook(hook)
    (y * 2).sum().backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y * torch.full((4,), 2.0),
        lambda y: (y + 1).relu() * 2,
        lambda y: y * 1 + y.relu(),
    ],
)
def test_new_gradients_are_overwritten(function: Callable[[Tensor], Tensor]) -> None:
    x, y = applied()
    (function(y) * 1).sum().backward()
    assert Overwriting.spoiled == [True]
    assert torch.equal(x.grad, torch.full((4,), 2.0))


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "the gradient": lambda g: g,
    "a detached tensor": lambda g: g.detach(),
    "a view": lambda g: g[1:],
    "its storage": lambda g: g.untyped_storage(),
    "an array": lambda g: g.numpy(),
    "a weak reference": weakref.ref,
    "a lazy clone": torch._lazy_clone,
    "an exported capsule": lambda g: g.__dlpack__(),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_a_hook_keeps_stays(what: str) -> None:
    kept = []
    hooked(torch.ones(4, requires_grad=True), lambda g: kept.append(KEPT[what](g)))
    assert Overwriting.spoiled == [False]


def test_a_hook_that_keeps_nothing_does_not_matter() -> None:
    hooked(torch.ones(4, requires_grad=True), lambda g: None)
    hooked(torch.ones(4, requires_grad=True), lambda g: g * 2)
    assert Overwriting.spoiled == [True, True]


def test_memory_of_others_stays() -> None:
    array = np.full(4, 3, dtype=np.float32)
    hooked(torch.ones(4, requires_grad=True), lambda g: torch.from_numpy(array))
    assert (array == 3).all()


def test_memory_of_other_processes_stays() -> None:
    hooked(torch.ones(4, requires_grad=True), lambda g: (g * 1).share_memory_())
    assert Overwriting.spoiled == [False]


def test_parts_of_larger_memory_are_not_taken() -> None:
    # No views as far as autograd knows: they do not refer to the tensor that they are parts of.
    hooked(torch.ones(4, requires_grad=True), lambda g: torch.cat([g, g]).unsafe_chunk(2)[1])
    assert Overwriting.spoiled == [False]


@pytest.mark.parametrize("elements", [8, 100_000])
def test_sparse_gradients_pass_through(elements: int) -> None:
    learn_counts()
    weight = torch.randn(elements // 4, 4, requires_grad=True)
    quantized = fq.FakeQuantize(fq.MovingAverageMinMaxObserver)(weight)
    rows = torch.nn.functional.embedding(torch.tensor([1, 0, 1]), quantized, sparse=True)
    (rows * 2).sum().backward()
    assert weight.grad.is_sparse
    expected = torch.zeros_like(weight)
    expected[0], expected[1] = 2, 4
    assert torch.equal(weight.grad.to_dense(), expected)


def test_gradients_that_users_give_stay() -> None:
    _, y = applied()
    grad = torch.full((4,), 3.0)
    y.backward(grad)
    assert torch.equal(grad, torch.full((4,), 3.0))
    x, y = applied()
    torch.autograd.grad(y, x, grad)
    assert torch.equal(grad, torch.full((4,), 3.0))


def test_retained_and_captured_gradients_stay() -> None:
    _, y = applied()
    y.retain_grad()
    (y * 2).sum().backward()
    assert torch.equal(y.grad, torch.full((4,), 2.0))
    x, y = applied()
    gradients = torch.autograd.grad((y * 2).sum(), [x, y])
    assert all(torch.equal(g, torch.full((4,), 2.0)) for g in gradients)


@pytest.mark.parametrize("register", ["register_hook", "register_prehook"])
def test_what_hooks_on_nodes_see_stays(register: str) -> None:
    _, y = applied()
    seen: list[Tensor] = []
    getattr(y.grad_fn, register)(lambda *gradients: seen.append(gradients[-1][0]))
    (y * 2).sum().backward()
    assert torch.equal(seen[0], torch.full((4,), 2.0))


def test_a_gradient_of_two_branches_stays() -> None:
    x, y = applied()
    other = torch.ones(4, requires_grad=True)
    ((y + other) * 2).sum().backward()
    assert torch.equal(other.grad, torch.full((4,), 2.0))
    assert torch.equal(x.grad, torch.full((4,), 2.0))


def test_gradients_of_gradients_are_not_overwritten() -> None:
    x, y = applied()
    torch.autograd.grad((y * 2).sum(), x, create_graph=True)
    assert Overwriting.spoiled == [False]


@pytest.mark.parametrize("kept", [False, True])
def test_the_gradient_of_a_large_fake_quantized_tensor_is_overwritten_unless_kept(
    kept: bool,
) -> None:
    learn_counts()
    x = torch.linspace(-2, 2, 100_000, requires_grad=True)
    y = fq.FakeQuantize(fq.MovingAverageMinMaxObserver)(x)
    seen: list[Any] = []
    y.register_hook(lambda g: seen.append(g if kept else g.data_ptr()))
    x.register_hook(lambda g: seen.append(g.data_ptr()))
    (y * 2).sum().backward()
    first = seen[0].data_ptr() if kept else seen[0]
    assert (first == seen[1]) == (not kept)
    assert not kept or torch.equal(seen[0], torch.full_like(x, 2.0))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


KEEPS_LOCALS = """
        import sys
        def keep(frame, event, argument):
            frame.f_locals
            return keep
        sys.set{kind}(keep)
        step(torch.ones(4, requires_grad=True)).sum().backward()
        sys.set{kind}(None)
"""

FIRST_STEP_UNDER = {
    "debugger": KEEPS_LOCALS.format(kind="trace"),
    "profiler": KEEPS_LOCALS.format(kind="profile"),
    "checkpoint": """
        from torch.utils.checkpoint import checkpoint
        checkpoint(step, torch.ones(4, requires_grad=True), use_reentrant=False).sum().backward()
    """,
    "mode": """
        from torch.utils._python_dispatch import TorchDispatchMode
        class Keeps(TorchDispatchMode):
            kept = []
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                self.kept.append((args, result))
                return result
        with Keeps():
            step(torch.ones(4, requires_grad=True)).sum().backward()
    """,
}


@pytest.mark.parametrize("where", FIRST_STEP_UNDER)
def test_counts_are_those_of_a_sole_owner_wherever_the_first_step_is_taken(where: str) -> None:
    program = """
        import torch
        from fastquant._native.ownership import is_sole_owner, learn_counts
        found = []
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                learn_counts()
                return x.clone()
            @staticmethod
            def backward(ctx, grad):
                alone = is_sole_owner(grad)
                found.append(alone)
                return grad
        def step(x):
            return Function.apply(x).neg() * 2
    """
    last = """
        found.clear()
        kept = []
        def keep_all(gradient):
            kept.extend([gradient, gradient, gradient, gradient.untyped_storage()])
        for hook in (None, kept.append, keep_all):
            y = Function.apply(torch.ones(4, requires_grad=True))
            if hook is not None:
                y.register_hook(hook)
            y.neg().sum().backward()
        assert found == [True, False, False], found
    """
    parts = (program, FIRST_STEP_UNDER[where], last)
    source = "\n".join(textwrap.dedent(part) for part in parts)
    done = python(source)
    assert done.returncode == 0, done.stderr


OBSERVING = (torch.tensor(0.0), torch.tensor(1.0), torch.ones(1), torch.zeros(1, dtype=torch.int))


def batch_norm(x: Tensor) -> Tensor:
    parameters = torch.linspace(0.5, 1, 4).requires_grad_(), torch.linspace(0, 1, 4)
    statistics = torch.zeros(4), torch.ones(4)
    return fq.functional.batch_norm_observe_fake_quantize(
        x, *parameters, *statistics, *(t.clone() for t in OBSERVING), low=0.0
    )


def residual_sum(x: Tensor) -> Tensor:
    observing = (t.clone() for t in OBSERVING)
    return fq.functional.add_observe_fake_quantize(x, torch.ones_like(x), *observing, low=0.0)


def fake_quantize(x: Tensor) -> Tensor:
    return fq.FakeQuantize(fq.MovingAverageMinMaxObserver)(x)


@pytest.mark.parametrize("op", [batch_norm, residual_sum, fake_quantize])
def test_batches_of_gradients_are_those_of_each(op: Callable[[Tensor], Tensor]) -> None:
    learn_counts()
    x = torch.randn(8, 4, 33, 33, requires_grad=True)
    z = op(x) * 2
    incoming = torch.randn(3, *x.shape)
    (batched,) = torch.autograd.grad(z, x, incoming, is_grads_batched=True, retain_graph=True)
    for grad, gradient in zip(incoming, batched, strict=True):
        assert torch.equal(gradient, *torch.autograd.grad(z, x, grad, retain_graph=True))


@pytest.mark.parametrize("op", [batch_norm, residual_sum])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ops_write_their_gradient_where_the_incoming_one_was(
    op: Callable[[Tensor], Tensor], layout: torch.memory_format
) -> None:
    x = torch.randn(8, 4, 9, 9).contiguous(memory_format=layout)
    factor = torch.cos(x)
    gradients, addresses, kept = [], [], []

    def address(grad: Tensor) -> None:
        addresses.append(grad.data_ptr())

    for keep in (False, True):
        leaf = x.clone().requires_grad_()
        z = leaf * 1
        z.register_hook(address)
        y = op(z)
        y.register_hook(address)
        if keep:
            y.register_hook(kept.append)
        (y * factor).sum().backward()
        gradients.append(leaf.grad)
    assert addresses[0] == addresses[1]
    assert addresses[2] != addresses[3]
    assert torch.equal(kept[0], factor)
    assert torch.equal(*gradients)


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch norm": lambda a, b: batch_norm(a),
    "sum": lambda a, b: residual_sum(a) + b * 0.5,
    "fake quantize": lambda a, b: fake_quantize(a),
    "checkpoint": lambda a, b: checkpoint(fake_quantize, a * 1.5, use_reentrant=False),
    "relu": lambda a, b: a.relu(),
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "view": lambda a, b: a.view_as(a),
    "join": lambda a, b: torch.cat([a[:4], b[4:]]),
    "expand": lambda a, b: a.mean(0, keepdim=True).expand_as(a) + b,
}


def gradients_of_program(seed: int, keep: bool) -> list[Tensor]:
    """Of the input and of some results of a random graph; with `keep`, hooks keep all gradients."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, 33, 33, generator=generator)
    if random.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    values, kept = [x.requires_grad_()], []
    retained = [x]
    for _ in range(random.randint(3, 10)):
        step = STEPS[random.choice(list(STEPS))]
        y = step(random.choice(values[-3:]), random.choice(values[-4:]))
        if keep:
            y.register_hook(lambda grad: kept.append((grad, grad.clone())))
        if random.random() < 0.15:
            y.retain_grad()
            retained.append(y)
        values.append(y)
    z = values[-1] + random.choice(values)
    incoming = torch.randn(z.shape, generator=generator)
    given = incoming.clone()
    z.backward(incoming)
    assert torch.equal(incoming, given)
    assert all(torch.equal(grad, copy) for grad, copy in kept)
    return [t.grad for t in retained if t.grad is not None]


@pytest.mark.parametrize("seed", range(20))
def test_gradients_are_the_same_where_nothing_is_overwritten(seed: int) -> None:
    learn_counts()
    overwriting, keeping = (gradients_of_program(seed, keep) for keep in (False, True))
    assert len(overwriting) == len(keeping)
    assert all(map(torch.equal, overwriting, keeping))


def test_backward_passes_in_threads_do_not_disturb_each_other() -> None:
    learn_counts()
    x = torch.randn(8, 4, 33, 33, requires_grad=True)
    shared = x * 1.5
    graphs = []
    for _ in range(4):
        y = shared
        for _ in range(3):
            y = batch_norm(residual_sum(fake_quantize(y)))
        graphs.append((y, torch.randn_like(y)))
    expected = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y, grad in graphs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(
                lambda g: torch.autograd.grad(g[0], x, g[1], retain_graph=True), graphs
            )
            assert all(torch.equal(a, *b) for a, b in zip(expected, found, strict=True))
