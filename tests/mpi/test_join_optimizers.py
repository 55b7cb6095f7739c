"""Several optimizers, and a rank that has joined while the others go on with both."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
import torch


@pytest.mark.ranks(2, 3)
def test_two_optimizers_in_one_backward_go_on_when_a_rank_has_joined(world: Any) -> None:
    """The second model's gradients come first, the first one's fill a bucket before the second one's exchange ends."""
    torch.manual_seed(0)
    first = torch.nn.Sequential(*[torch.nn.Linear(700, 700) for _ in range(3)])
    second = torch.nn.Linear(700, 1)
    optimizers = [
        world.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01),
            named_parameters=[(f"{name}.{key}", value) for key, value in model.named_parameters()],
        )
        for name, model in (("first", first), ("second", second))
    ]
    for _ in range(4 if world.rank() == world.size() - 1 else 2 + world.rank()):
        for optimizer in optimizers:
            optimizer.zero_grad()
        second(first(torch.ones(2, 700))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert world.join() == world.size() - 1
    # The last rank has made every step; with its parameters all go on alike.
    world.broadcast_parameters([*first.named_parameters(), *second.named_parameters()], root_rank=world.size() - 1)
    total = world.allreduce(second.weight.detach(), op=world.Sum)
    assert torch.allclose(total, world.size() * second.weight.detach())


@pytest.mark.slow
def test_where_mpi_lets_one_thread_in(mpirun: Any) -> None:
    """The main thread pushes for all optimizers."""
    body = inspect.getsource(test_two_optimizers_in_one_backward_go_on_when_a_rank_has_joined).split(") -> None:", 1)[1]
    begin = "import mpi4py\nmpi4py.rc.thread_level = 'funneled'\nimport torch\nimport mpiddp as world\nworld.init()\n"
    done = mpirun(begin + textwrap.dedent(body) + "print('went on', flush=True)\n", 3)
    assert done.stdout.count("went on") == 3
