"""Conjugate and negative views: what lies in their memory is not what they are, and not so on every rank alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ranks(2, 3)


def content(rank: int, numel: int) -> torch.Tensor:
    return torch.complex(torch.arange(1.0, numel + 1), torch.full((numel,), rank + 1.0))


def imaginary(base: torch.Tensor) -> torch.Tensor:
    """A negative view, contiguous where the base has one element."""
    return base.conj().imag


#: A view, and what its content is.
VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "conjugate": (torch.conj, torch.conj_physical),
    "negative": (imaginary, lambda base: -base.imag.clone()),
    "every second": (lambda base: base.conj()[::2], lambda base: torch.conj_physical(base)[::2]),
}


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on one rank"])
@pytest.mark.parametrize("numel", [1, 6, 60_000])
@pytest.mark.parametrize("what", VIEWS)
def test_in_place(world: Any, what: str, numel: int, everywhere: bool) -> None:
    view, is_meant = VIEWS[what]
    rank, size = world.rank(), world.size()
    contents = [is_meant(content(r, numel)) for r in range(size)]

    def own() -> torch.Tensor:
        return view(content(rank, numel)) if everywhere or rank == 1 else contents[rank].clone()

    total = torch.stack(contents).sum(0)
    for _ in range(3):  # the second time by a recipe
        tensor = own()
        assert torch.equal(world.allreduce_(tensor, op=world.Sum), total) and torch.equal(tensor, total)
    handle, tensor = world.allreduce_async_(tensor := own(), op=world.Sum), tensor
    assert world.synchronize(handle) is tensor and torch.equal(tensor, total)
    if numel < 100:
        product = torch.stack(contents).prod(0)
        assert torch.equal(world.allreduce_(own(), op=world.Product), product)
        assert torch.equal(world.grouped_allreduce_([own(), own()], op=world.Product)[1], product)
    for root in (0, 1):
        tensor = own()
        assert world.broadcast_(tensor, root) is tensor and torch.equal(tensor, contents[root])
        tensor = own()
        assert torch.equal(world.synchronize(world.broadcast_async_(tensor, root, name="b")), contents[root])
    with torch.inference_mode():
        tensor = own()
        assert torch.equal(world.allreduce_(tensor, op=world.Sum), total) and torch.equal(tensor, total)


@pytest.mark.parametrize("what", VIEWS)
def test_what_is_sent(world: Any, what: str) -> None:
    view, is_meant = VIEWS[what]
    rank, size = world.rank(), world.size()
    numel = 2 * size
    contents = [is_meant(content(r, numel)) for r in range(size)]
    own = view(content(rank, numel)) if rank == 1 else contents[rank].clone()
    count = own.numel() // size
    mine = slice(rank * count, (rank + 1) * count)
    assert torch.equal(world.alltoall(own), torch.cat([each[mine] for each in contents]))
    assert torch.equal(world.allgather(own), torch.cat(contents))
    assert torch.equal(world.reducescatter(own, op=world.Sum), torch.stack(contents).sum(0)[mine])
    assert torch.equal(world.allreduce(own, op=world.Sum), torch.stack(contents).sum(0))
    assert torch.equal(world.broadcast(own, 1), contents[1])


def test_the_gradient_of_an_alltoall(world: Any) -> None:
    tensor = content(world.rank(), world.size()).requires_grad_()
    world.alltoall(tensor).backward(torch.full((world.size(),), 1 + 2j).conj())
    assert torch.equal(tensor.grad, torch.full((world.size(),), 1 - 2j))


def test_parameters(world: Any) -> None:
    for view, is_meant in VIEWS.values():
        for numel in (1, 4):
            own = view(content(world.rank(), numel))
            world.broadcast_parameters({"one": own}, 1)
            assert torch.equal(own, is_meant(content(1, numel)))
