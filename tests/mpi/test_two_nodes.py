"""Ranks on several nodes: this host, divided up where the library asks MPI who shares a node."""

from __future__ import annotations

from typing import Any

import pytest

PROGRAM = """
    import torch
    import mpiddp.world
    per_node = [{layout}]
    node_of = [node for node, count in enumerate(per_node) for _ in range(count)]
    mpiddp.world._on_node = lambda comm: comm.Split(node_of[comm.rank], comm.rank)
    import mpiddp
    mpiddp.init()
    assert mpiddp.local_size() == per_node[node_of[mpiddp.rank()]]
    assert mpiddp.is_homogeneous() == (len(set(per_node)) == 1)

    def digest(tensor):
        import zlib
        return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())

    def random(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(mpiddp.rank())) * 10.0 ** mpiddp.rank()
"""

OPERATIONS = (
    PROGRAM
    + """
    rank, size = mpiddp.rank(), mpiddp.size()
    for numel in (1, 1000, 20_000, 3_000_001):
        for dtype in (torch.float32, torch.int64):
            tensor = torch.full((numel,), rank + 1, dtype=dtype)
            assert torch.equal(mpiddp.allreduce(tensor, op=mpiddp.Sum), torch.full_like(tensor, size * (size + 1) // 2))
            shared = mpiddp.empty(numel, dtype=dtype)
            shared.fill_(rank + 1)
            mpiddp.allreduce_(shared, op=mpiddp.Max)
            assert torch.equal(shared, torch.full_like(shared, size))
        assert torch.equal(mpiddp.broadcast(tensor, size - 1), torch.full_like(tensor, size))
    handles = [mpiddp.allreduce_async(torch.full((100_000 + k,), float(rank))) for k in range(20)]
    assert all(mpiddp.synchronize(handle)[0] == (size - 1) / 2 for handle in handles)
    pair = mpiddp.add_process_set([0, size - 1])
    if rank in (0, size - 1):
        assert mpiddp.allreduce(torch.full((50_000,), float(rank)), op=mpiddp.Sum, process_set=pair)[-1] == size - 1
    assert mpiddp.allgather(torch.full((rank, 2), rank)).shape == (size * (size - 1) // 2, 2)
"""
)

TRAINING = (
    PROGRAM
    + """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.Tanh(), torch.nn.Linear(400, 300)).to(torch.{dtype})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = mpiddp.DistributedOptimizer(optimizer, deterministic=True, shard={shard})
    for _ in range(5):
        optimizer.zero_grad()
        model(random(8, 300).to(torch.{dtype})).square().mean().backward()
        optimizer.step()
    odd = mpiddp.allreduce(random(100_003), prescale_factor=0.3, op=mpiddp.Sum)
    small = mpiddp.allreduce(random(37).to(torch.bfloat16))
    together = [digest(torch.cat([p.flatten() for p in model.parameters()])), digest(odd), digest(small)]
    everybody = mpiddp.allgather(torch.tensor([together]))
    assert (everybody == everybody[0]).all(), everybody
    if mpiddp.rank() == 0:
        print("bits", *together, flush=True)
"""
)


@pytest.mark.parametrize("layout", ["2,2", "3,1", "1,1,1"])
def test_operations(mpirun: Any, layout: str) -> None:
    mpirun(OPERATIONS.replace("{layout}", layout), sum(map(int, layout.split(","))))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shard"), [("float32", False), ("bfloat16", True)])
def test_deterministic_bits_are_the_same_for_every_layout_and_bucket_size(mpirun: Any, dtype: str, shard: bool) -> None:
    program = TRAINING.replace("{dtype}", dtype).replace("{shard}", str(shard))
    runs = [("4", "25"), ("2,2", "25"), ("1,1,1,1", "0.1"), ("3,1", "0.3"), ("4", "0.05")]
    lines = set()
    for layout, bucket_mb in runs:
        env = {"MPIDDP_DETERMINISTIC": "1", "MPIDDP_BUCKET_MB": bucket_mb, "MPIDDP_SEGMENT_KB": "64"}
        done = mpirun(program.replace("{layout}", layout), 4, env=env)
        lines.add(next(line for line in done.stdout.splitlines() if "bits" in line))
    assert len(lines) == 1, lines
