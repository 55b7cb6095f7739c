"""NCCL through cupy: alone on a GPU, and among ranks that have one each or share one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mpiddp.collectives import ReduceOp, chunk_bounds, select
from mpiddp.engine.device import crossing
from mpiddp.transport import nccl
from mpiddp.transport.base import drain
from mpiddp.transport.device import NCCL, Ways, way_between
from tests.simulation import Network

NUMEL = 300_001


def needs_nccl() -> Any:
    """cupy's module."""
    try:
        return nccl.load()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this PyTorch can use")
def test_one_rank_alone() -> None:
    """Every call, dtype and op, on streams and with numbers as among many."""
    library, device = needs_nccl(), torch.device("cuda", 0)
    ways = Ways()
    with torch.cuda.device(device):
        group = nccl.Nccl(library, bytes(library.get_unique_id()), 1, 0, device, ways.devices.of_device(device).handle)
    ways.nccl = group
    (link,) = Network(1).links()
    link.ways = ways  # type: ignore[attr-defined]
    bounds = chunk_bounds(NUMEL, 1)
    starts = {
        "allreduce": lambda link, flat: select.allreduce(link, flat, ReduceOp.SUM, 5, 0.5),
        "reduce_scatter": lambda link, flat: select.reduce_scatter(link, flat, bounds, ReduceOp.SUM, 5, 0.5),
        "allgather": lambda link, flat: select.allgather(link, flat, bounds, 5),
        "broadcast": lambda link, flat: select.broadcast(link, flat, 0, 5),
    }
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64):
        content = (torch.arange(NUMEL) % 7 * 2).to(dtype)
        for name, start in starts.items():
            flat, before = content.to(device), group.next
            passage = ways.devices.depart(flat)
            drain(crossing(link, flat, passage, start))  # type: ignore[arg-type]
            passage.land()
            want = content / 2 if name in ("allreduce", "reduce_scatter") else content
            assert torch.equal(flat.cpu(), want.to(dtype)) and group.next == before + 1, (name, dtype)
    # Unequal chunks, by several calls in a group.
    flat = torch.arange(9.0, device=device)
    torch.cuda.synchronize(device)
    for call in (lambda: group.reduce_scatter(flat, [(2, 7)], "SUM"), lambda: group.all_gather(flat, [(2, 7)])):
        with torch.cuda.device(device):
            call()
    torch.cuda.synchronize(device)
    assert torch.equal(flat.cpu(), torch.arange(9.0))
    group.check()
    ways.close(is_clean=True)


@pytest.mark.gpu
@pytest.mark.ranks(2, 3, 4, timeout_s=120)
def test_among_ranks(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With a GPU each they use it; where they share one they say so and go by CUDA IPC."""
    from mpiddp import runtime

    needs_nccl()
    if runtime.current().config.cuda_aware:
        pytest.skip("MPI is given buffers on GPUs in this job, beside which NCCL can hang")
    here = torch.device("cuda", world.local_rank() % torch.cuda.device_count())
    link = runtime.current().channel.link
    ways = link.ways
    ways.wants_nccl = True
    rank, size = world.rank(), world.size()
    logger = logging.getLogger("mpiddp")
    logger.addHandler(caplog.handler)  # what it says goes no further up
    with torch.cuda.device(here):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            content = (torch.arange(NUMEL) % 5 + rank).to(dtype)
            want = sum(((torch.arange(NUMEL) % 5 + r).to(dtype) for r in range(size)), torch.zeros(NUMEL, dtype=dtype))
            handles = [world.allreduce_async(content.to(here), op=world.Sum, name=f"{i}") for i in range(4)]
            assert all(torch.equal(world.synchronize(handle).cpu(), want) for handle in handles), dtype
        assert torch.equal(world.broadcast(content.to(here), 1).cpu(), (torch.arange(NUMEL) % 5 + 1).to(dtype))
    logger.removeHandler(caplog.handler)
    if torch.cuda.device_count() < size:
        assert ways.nccl is None
        assert rank or "share GPU-" in caplog.text
    else:
        assert ways.nccl is not None and way_between(link, (rank + 1) % size, True) == NCCL
    ways.close(is_clean=True)
    world.barrier()
