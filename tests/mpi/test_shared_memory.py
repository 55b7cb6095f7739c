"""Memory that the node's ranks share, for real: tensors in it, what becomes of it, and what happens without it."""

from __future__ import annotations

import gc
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

on_ranks = pytest.mark.ranks(2, 3, 4)

LARGE = 3 << 19  # elements of float32: 6 MiB


def total(size: int) -> float:
    return size * (size + 1) / 2


def reduced(world: Any, tensor: torch.Tensor, **options: Any) -> bool:
    """Whether a sum of the ranks' numbers comes out right in ``tensor``."""
    tensor.fill_(world.rank() + 1)
    world.allreduce_(tensor, op=world.Sum, **options)
    return bool((tensor == total(world.size())).all())


@on_ranks
def test_empty(world: Any) -> None:
    for numel in (1, 5000, 100_003, LARGE):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            tensor = world.empty(numel, dtype=dtype)
            assert tensor.shape == (numel,) and tensor.dtype == dtype and tensor.is_contiguous()
            for _ in range(3):
                assert reduced(world, tensor)
    assert world.empty(2, 3).shape == world.empty((2, 3)).shape == world.empty(torch.Size([2, 3])).shape == (2, 3)
    assert world.empty().shape == () and world.empty(0).shape == (0,)
    assert world.empty(3, device="cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="lengths of 0 and more"):
        world.empty(-1)
    for device in ("meta", "cuda:99"):
        with pytest.raises(world.ArgumentError, match=f"on {device} on rank {world.rank()}, where PyTorch sees"):
            world.empty(3, device=device)


@on_ranks
def test_views(world: Any) -> None:
    tensor = world.empty(40, LARGE // 20).fill_(-1)
    rows = tensor[10:30]
    assert reduced(world, rows)
    assert (tensor[:10] == -1).all() and (tensor[30:] == -1).all()
    assert reduced(world, tensor.view(-1)[7:-9])
    assert reduced(world, tensor.t())


@on_ranks
def test_private_and_shared_tensors_mixed(world: Any) -> None:
    for turn in range(4):
        for numel in (1000, 100_003, LARGE):
            is_shared = (world.rank() + turn) % 2 == 0
            assert reduced(world, world.empty(numel) if is_shared else torch.empty(numel))


@on_ranks
def test_many_at_once(world: Any) -> None:
    tensors = [world.empty(50_000 + i) if i % 3 else torch.empty(50_000 + i) for i in range(60)]
    for tensor in tensors:
        tensor.fill_(world.rank() + 1)
    handles = [world.allreduce_async_(tensor, op=world.Sum) for tensor in tensors]
    for tensor, handle in zip(tensors, handles, strict=True):
        world.synchronize(handle)
        assert (tensor == total(world.size())).all()


@on_ranks
def test_the_other_collectives(world: Any) -> None:
    rank, size = world.rank(), world.size()
    for make in (torch.empty, world.empty):
        tensor = make(size * 1000, 60).fill_(rank + 1)
        assert (world.reducescatter(tensor, op=world.Sum) == total(size)).all()
        gathered = world.allgather(tensor[: rank * 700 + 1])
        assert gathered.shape[0] == sum(r * 700 + 1 for r in range(size)) and (gathered[-1] == size).all()
        assert (world.broadcast_(tensor, root_rank=size - 1) == size).all()
        tensor.copy_(torch.arange(size * 1000).view(-1, 1).expand(-1, 60))
        received = world.alltoall(tensor)
        received = received[0] if isinstance(received, tuple) else received
        assert torch.equal(received[:1000], received[-1000:]) and received[0, 0] == rank * 1000


@pytest.mark.ranks(3, 4)
def test_a_process_set(world: Any) -> None:
    ranks = [0, world.size() - 1]
    part = world.add_process_set(ranks)
    if world.rank() in ranks:
        for tensor in (world.empty(LARGE), torch.empty(LARGE)):
            tensor.fill_(world.rank() + 1)
            world.allreduce_(tensor, op=world.Sum, process_set=part)
            assert (tensor == 1 + world.size()).all()
    assert reduced(world, world.empty(LARGE))
    world.remove_process_set(part)


@on_ranks
def test_memory_is_given_back(world: Any) -> None:
    def mapped() -> int:
        return sum("memfd:mpiddp" in line for line in Path("/proc/self/maps").read_text().splitlines())

    def use() -> None:
        for _ in range(5):
            assert reduced(world, world.empty(LARGE))
        gc.collect()
        for _ in range(2):  # the second tells what the first has let go
            assert reduced(world, torch.empty(LARGE))
            world.barrier()

    use()
    before, descriptors = mapped(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    use()
    assert mapped() <= before + 1 and len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


@on_ranks
def test_a_forked_child_may_not(world: Any) -> None:
    tensor = world.empty(1000).fill_(1)
    child = os.fork()
    if not child:
        try:
            world.empty(3)
        except world.WorkerProcessError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert reduced(world, tensor)


TRAINS = textwrap.dedent("""
    import gc, os, sys
    import torch
    import mpiddp

    mpiddp.init()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.Linear(500, 10))
    optimizer = mpiddp.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters()
    )
    for step in range(5):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + mpiddp.rank())
        model(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
    digest = sum(p.detach().double().sum().item() for p in model.parameters())
    assert (mpiddp.allgather(torch.tensor([digest])) == digest).all()
    shared = "shared" if mpiddp.runtime.current().channel.link.node else "not shared"
    places = [mpiddp.runtime.current().memory.segments.place(p.grad.view(-1)) for p in model.parameters()]
    assert all((place is not None) == (shared == "shared") for place in places), places
    kept = mpiddp.empty(1 << 20)
    kept.fill_(5)
    mpiddp.allreduce_(kept)
    gradients = [p.grad for p in model.parameters()]
    norm = sum(g.norm().item() for g in gradients)
    rank = mpiddp.rank()
    mpiddp.shutdown()
    del optimizer
    gc.collect()
    assert sum(g.norm().item() for g in gradients) == norm and (kept == 5).all()
    mpiddp.init()
    mpiddp.allreduce_(kept)
    assert (kept == 5).all()
    if rank == 0:
        print("done", shared, f"{norm:.4f}")
""")

REFUSED = """
import mpiddp.memory.mapping as mapping
mapping.MemoryFiles.path = lambda self, pid, fd, number: f"/proc/{pid}/fd/refused"
"""

OTHER_PROCESSOR = """
import platform
platform.machine = lambda: "aarch64"
"""

FULL = """
import mpiddp.memory.mapping as mapping
def full(self, number, nbytes):
    raise OSError(28, "No space left on device")
mapping.NamedFiles.create = full
"""


@pytest.mark.parametrize(
    ("prepared", "said", "told"),
    [
        (OTHER_PROCESSOR, "done not shared", "may show writes out of order"),
        ("", "done shared", ""),
        (REFUSED, "done shared", "share memory in /dev/shm"),
        (REFUSED + FULL, "done not shared", "cannot share memory"),
    ],
    ids=["another processor", "memory files", "named files", "nothing"],
)
def test_each_way_to_share_trains_alike(mpirun: Any, prepared: str, said: str, told: str) -> None:
    done = mpirun(prepared + TRAINS, 2)
    assert said in done.stdout and told in done.output
    assert not list(Path("/dev/shm").glob("mpiddp-*-*-*"))


def test_alone(mpirun: Any) -> None:
    mpirun(
        "import mpiddp, torch; mpiddp.init(); t = mpiddp.empty(4, 5, dtype=torch.float64).fill_(2)\n"
        "mpiddp.allreduce_(t); assert (t == 2).all(); assert t.shape == (4, 5)",
        1,
    )


def test_each_algorithm_by_its_name(mpirun: Any) -> None:
    source = """
        import mpiddp, torch
        mpiddp.init()
        for numel in (10, 100_000):
            t = mpiddp.empty(numel).fill_(mpiddp.rank())
            mpiddp.synchronize(mpiddp.allreduce_async_(t, op=mpiddp.Sum))
            assert (t == 1).all()
    """
    for name in ("ring", "doubling", "shared_memory"):
        mpirun(source, 2, env={"MPIDDP_ALGORITHM": name})
    refused = mpirun(source, 2, env={"MPIDDP_ALGORITHM": "rings"}, expect="failure")
    assert "it must be one of ring, doubling, shared_memory" in refused.output
