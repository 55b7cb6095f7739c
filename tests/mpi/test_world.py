"""init, shutdown and who is where; every MPI thread level; mpi4py first; settings that differ between ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpiddp.transport import mailbox

PROGRAM = """
    import torch, mpiddp
    mpiddp.init()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    for param in model.parameters():
        mpiddp.broadcast_(param.data, 0)
    optimizer = mpiddp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(mpiddp.rank()))).sum().backward()
        optimizer.step()
    both = mpiddp.allgather(model[0].weight.detach().unsqueeze(0))
    assert torch.equal(both[0], both[-1])
    print("trained", mpiddp.rank(), "of", mpiddp.size(), flush=True)
"""


@pytest.mark.ranks(1, 2, 3, 4)
def test_topology(world: Any) -> None:
    from mpi4py import MPI

    assert (world.rank(), world.size()) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    assert (world.local_rank(), world.local_size()) == (world.rank(), world.size())
    assert (world.cross_rank(), world.cross_size(), world.is_homogeneous()) == (0, 1, True)


@pytest.mark.ranks(2, 3)
def test_shutdown_and_init_again(world: Any) -> None:
    world.init()
    for _ in range(3):
        world.shutdown()
        world.shutdown()
        assert not world.is_initialized()
        for call in (world.rank, world.size, world.barrier, lambda: world.allreduce(torch.ones(1))):
            with pytest.raises(ValueError, match=r"init\(\)"):
                call()
        world.init()
        assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()


@pytest.mark.ranks(2)
def test_what_is_in_flight_at_shutdown_is_finished(world: Any) -> None:
    tensor = torch.ones(10)
    handle = world.allreduce_async_(tensor, op=world.Sum)
    world.shutdown()
    assert handle.done and tensor[0] == 2
    world.init()


@pytest.mark.ranks(2)
def test_a_wrapped_optimizer_after_shutdown_says_so(world: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1))
    world.shutdown()
    with pytest.raises(world.NotInitializedError, match=r"init\(\)"):
        (weight * 2).sum().backward()
    del optimizer
    world.init()


@pytest.mark.ranks(3)
def test_part_of_the_ranks(world: Any) -> None:
    from mpi4py import MPI

    everyone = MPI.COMM_WORLD
    world.shutdown()
    if everyone.rank == 1:
        with pytest.raises(world.LaunchError, match="rank 1"):
            world.init([0, 2])
    else:
        world.init([2, 0])
        assert (world.rank(), world.size()) == ((1, 2) if everyone.rank == 0 else (0, 2))
        assert world.broadcast(torch.tensor([everyone.rank]), 0).item() == 2
        world.shutdown()
    half = everyone.Split(everyone.rank // 2)
    world.init(half)
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == half.size == world.size()
    world.shutdown()
    half.Free()
    for wrong in ([0, 0], [0, 3]):
        with pytest.raises(world.LaunchError, match="distinct ranks between 0 and 2"):
            world.init(wrong)
    world.init()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["single", "funneled", "serialized"])
def test_thread_levels(mpirun: Any, level: str) -> None:
    done = mpirun(f"import mpi4py; mpi4py.rc.thread_level = {level!r}\n" + _flat(PROGRAM), 2)
    assert done.stdout.count("trained") == 2


@pytest.mark.parametrize("last", ["", "MPI.Finalize()"])
def test_mpi4py_first(mpirun: Any, last: str) -> None:
    """MPI may have been started by the script, and may be finalized by it before the interpreter ends."""
    done = mpirun(f"from mpi4py import MPI\n{_flat(PROGRAM)}\n{last}", 2)
    assert done.stdout.count("trained") == 2


def test_mpi_that_nobody_started_is_said(mpirun: Any) -> None:
    done = mpirun("import mpi4py; mpi4py.rc.initialize = False\nimport mpiddp\nmpiddp.init()", 1, expect="failure")
    assert "MPI.Init_thread()" in done.stderr


def test_without_a_launcher_it_is_a_world_of_one(mpirun: Any) -> None:
    assert "trained 0 of 1" in mpirun(PROGRAM, 0).stdout


def test_settings_of_rank_0_hold_and_a_difference_is_named_once(mpirun: Any) -> None:
    done = mpirun(
        """
        import os
        from mpi4py import MPI
        if MPI.COMM_WORLD.rank > 0:
            os.environ["MPIDDP_BUCKET_MB"] = "3"
        import mpiddp
        mpiddp.init()
        print("bucket", mpiddp.runtime.current().config.bucket_mb, flush=True)
        """,
        3,
    )
    assert done.stdout.count("bucket None") == 3
    assert done.stderr.count("bucket_mb is None on rank 0, 3.0 on ranks 1-2") == 1


def test_a_misspelt_setting_is_an_error(mpirun: Any) -> None:
    done = mpirun("import mpiddp; mpiddp.init()", 2, env={"MPIDDP_BUKET_MB": "1"}, expect="failure")
    assert "MPIDDP_BUKET_MB" in done.stderr and "MPIDDP_BUCKET_MB" in done.stderr


def test_import_starts_no_mpi(mpirun: Any) -> None:
    mpirun("import sys, mpiddp; assert 'mpi4py.MPI' not in sys.modules", 0)


def _flat(program: str) -> str:
    import textwrap

    return textwrap.dedent(program)


@pytest.mark.ranks(2, 3)
def test_the_world_has_rings_where_the_processor_keeps_writes_in_order(world: Any, monkeypatch: Any) -> None:
    from mpi4py import MPI

    def port() -> object:
        node: Any = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        return mailbox.control_port(MPI.COMM_WORLD, node)

    assert isinstance(port(), mailbox.NodePort)
    monkeypatch.setattr(mailbox, "orders_writes", lambda: False)
    assert not isinstance(port(), mailbox.NodePort)
