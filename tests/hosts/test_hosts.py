"""The hosts themselves, and what a job meets on several of them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def words(on: Any, host: int, *command: str) -> str:
    return subprocess.run(on.inside(host, command), capture_output=True, text=True, timeout=20, check=True).stdout


def test_they_share_nothing_but_a_link(hosts: Any) -> None:
    two = hosts(2, rate_mbit=100)
    spaces = {words(two, host, "readlink", *(f"/proc/self/ns/{k}" for k in ("net", "uts", "mnt"))) for host in (1, 2)}
    assert len(spaces) == 2
    assert [words(two, host, "hostname").strip() for host in (1, 2)] == ["host1", "host2"]
    assert "tbf" in words(two, 2, "tc", "qdisc", "show", "dev", "eth0")
    with pytest.raises(RuntimeError, match="nonsense"):
        two.tell("run 1 nonsense")


def test_they_end_with_a_test_that_is_killed(hosts: Any) -> None:
    hosts(1).close()  # or skip
    program = (
        "import time; from tests.hosts.hosts import Hosts; one = Hosts(1); "
        "print(one._keeper.pid, one.directory, flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    pid, directory = holder.stdout.readline().split()
    keeper = os.pidfd_open(int(pid))
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    try:
        assert select.select([keeper], [], [], 20)[0], "the namespaces have outlived the process that made them"
        assert not Path(directory).exists()
    finally:
        os.close(keeper)


SETTINGS = """
    import torch
    import mpiddp
    from mpiddp import config, runtime
    mpiddp.init()
    rank, size = mpiddp.rank(), mpiddp.size()
    assert (size, mpiddp.local_size(), mpiddp.cross_size()) == (2, 1, 2)
    assert ("MPIDDP_SEGMENT_KB" in config.environ()) == (rank == 0)
    assert runtime.current().config.segment_kb == 64 and runtime.current().config.stall_warn_s == 7
    assert config.environ()["OMPI_MCA_btl_tcp_if_exclude"].endswith(",docker0")
    for numel in (1, 1000, 1_000_001):
        reduced = mpiddp.allreduce(torch.full((numel,), rank + 1.0), op=mpiddp.Sum)
        assert torch.equal(reduced, torch.full((numel,), 3.0))
    model = torch.nn.Linear(1000, 1000, bias=False)
    for shard in (False, True):  # the network between the hosts is measured once
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters(), op=mpiddp.Sum, shard=shard)
        model(torch.full((1, 1000), rank + 1.0)).sum().backward()
        if not shard:
            assert torch.equal(model.weight.grad, torch.full_like(model.weight, 3.0))
        optimizer.step()
        optimizer.zero_grad()
        chosen = mpiddp.allgather(torch.tensor([optimizer._mpiddp_reducer._options.bucket_nbytes]))
        assert 1 << 20 <= chosen[0] == chosen[1] <= 25 << 20
"""


def test_settings_of_the_first_host_hold_everywhere_and_shared_addresses_do_no_harm(hosts: Any) -> None:
    two = hosts(2)
    two.add_bridge("docker0", "172.17.0.1/16")
    done = hosts.run(two, SETTINGS, env={"MPIDDP_SEGMENT_KB": "64", "MPIDDP_STALL_WARN_S": "7"})
    assert "segment_kb is 64 on rank 0" in done.stderr
    chosen = [line for line in done.stderr.splitlines() if "between hosts" in line]
    assert len(chosen) == 2 and "MiB for 4 MiB: " in chosen[0] and chosen[0][-40:] == chosen[1][-40:]


@pytest.mark.slow
def test_a_wrong_interface_is_named(hosts: Any) -> None:
    """One whose name tells nothing, so that it is not left out."""
    two = hosts(2)
    two.add_bridge("aaa0", "172.17.0.1/16")
    done = hosts.run(
        two, "import mpiddp; mpiddp.init()", arguments=["--mca", "btl_tcp_if_include", "aaa0"],
        env={"MPIDDP_INIT_TIMEOUT_S": "3"}, expect="failure",
    )  # fmt: skip
    assert "aaa0 (172.17.0.1) may be the wrong one" in done.stderr
    assert "--mca btl_tcp_if_include eth0" in done.stderr


BELL = """
    import torch
    import mpiddp
    from mpiddp import runtime
    mpiddp.init()
    for _ in range(100):
        mpiddp.allreduce_(torch.ones(1000))
    bell = runtime.current().engine._bell
    if mpiddp.local_size() == 1:
        assert bell.is_trusted and int(repr(bell).split()[-1][:-1]) > 16, f"Open MPI's sockets did not ring: {bell}"
    else:
        assert bell is None
"""


@pytest.mark.parametrize("per_host", [1, 2])
def test_who_is_alone_on_its_host_is_woken_by_the_sockets_of_mpi(hosts: Any, per_host: int) -> None:
    hosts.run(hosts(2), BELL, per_host)


RING = """
    import os, time, torch
    import mpiddp
    mpiddp.init()
    rank, size = mpiddp.rank(), mpiddp.size()
    tensor = torch.full((2_000_003,), float(rank + 1))
    times = []
    for _ in range(6):
        tensor.fill_(rank + 1)
        mpiddp.barrier()
        began = time.perf_counter()
        mpiddp.allreduce_(tensor, op=mpiddp.Sum)
        times.append(time.perf_counter() - began)
        assert torch.equal(tensor, torch.full_like(tensor, size * (size + 1) // 2))
    hosts = mpiddp.cross_size()
    ideal_s = 2 * (hosts - 1) / hosts * tensor.nbytes * 8 / 200e6
    assert min(times) < ideal_s / 0.8, (times, ideal_s)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "per_host", "delay_us"), [(3, 1, 0), (2, 2, 0), (2, 1, 2500)])
def test_the_ring_fills_the_links(hosts: Any, count: int, per_host: int, delay_us: float) -> None:
    """In both directions at once; one of them after the other would take twice as long."""
    hosts.run(hosts(count, 200, delay_us), RING, per_host)
