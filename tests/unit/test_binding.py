"""Too few cores or too many threads: one line a node with the launcher's own flag, and silence when all is well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpiddp import binding
from mpiddp.binding import NodeFacts, warnings_for_node


def rank(
    cpus: set[int], threads: int, node: int = 4, smt: int = 1, allotted: int | None = None, quota: int | None = None
) -> NodeFacts:
    """A rank bound to ``cpus`` on a node of ``node`` CPUs, ``smt`` of them on each core."""
    usable = frozenset(range(node))
    core_of = {cpu: str(cpu // smt) for cpu in usable}
    return NodeFacts(frozenset(cpus), usable, core_of, threads, smt, allotted, quota)


ALL = {0, 1, 2, 3}


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([rank({0}, 1, 2), rank({1}, 1, 2)], id="two ranks on two cores, one each"),
        pytest.param([rank({0, 1}, 2), rank({2, 3}, 2)], id="two ranks on four cores, two each"),
        pytest.param([rank(ALL, 2), rank(ALL, 2)], id="unbound, but few threads"),
        pytest.param([rank(ALL, 4)], id="one rank has the node"),
        pytest.param([rank({0, 1}, 1, smt=2), rank({2, 3}, 2, smt=2)], id="a core of two CPUs each"),
        pytest.param([rank(ALL, 1) for _ in range(7)], id="more ranks than cores, one thread each"),
        pytest.param([rank({0}, 1), rank({1}, 1), rank({2}, 1)], id="a core left over"),
        pytest.param([rank({2}, 1, 1)], id="a cpuset of one"),
    ],
)
@pytest.mark.parametrize("kind", ["open mpi", "mpich", "none"])
def test_silent(ranks: list[NodeFacts], kind: str) -> None:
    assert warnings_for_node(ranks, kind) == []


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("open mpi", "--map-by slot:PE=2"),
        ("mpich", "-bind-to core:2"),
        ("intel mpi", "I_MPI_PIN_DOMAIN 2"),
        ("slurm", "--cpus-per-task=2"),
        ("pals", "--depth=2"),
        ("flux", "--cores-per-task=2"),
        ("jsm", "packed:2"),
        ("pmi", "bind 2 cores"),
    ],
)
def test_bound_to_less_than_the_share(kind: str, flag: str) -> None:
    (text,) = warnings_for_node([rank({0}, 1), rank({1}, 1)], kind)
    assert flag in text and "share is 2 cores" in text and "local rank 0 has 1, 1 has 1" in text


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("open mpi", "slot:PE=2 "),
        ("intel mpi", "I_MPI_PIN_DOMAIN 4`"),
        ("slurm", "--cpus-per-task=4`"),
        ("pals", "--depth=4 "),
        ("flux", "--cores-per-task=2`"),
    ],
)
def test_with_hyperthreads_some_launchers_count_threads(kind: str, flag: str) -> None:
    (text,) = warnings_for_node([rank({at, at + 1}, 1, node=8, smt=2) for at in (0, 2)], kind)
    assert flag in text and "share is 2 cores" in text


def test_one_rank_alone_on_one_core() -> None:
    (text,) = warnings_for_node([rank({0}, 1, 2)], "open mpi")
    assert "share is 2 cores, but local rank 0 has 1" in text


def test_half_a_core_is_no_core() -> None:
    assert warnings_for_node([rank({0, 1}, 1, smt=2), rank({2, 3}, 1, smt=2)], "open mpi") == []
    (text,) = warnings_for_node([rank({0, 1}, 1, smt=2)], "open mpi")
    assert "share is 2 cores, but local rank 0 has 1" in text


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("open mpi", "mpirun -x OMP_NUM_THREADS=2"),
        ("mpich", "-genv OMP_NUM_THREADS 2"),
        ("slurm", "set OMP_NUM_THREADS=2"),
    ],
)
def test_unbound_ranks_with_a_thread_for_every_core(kind: str, flag: str) -> None:
    (text,) = warnings_for_node([rank(ALL, 4), rank(ALL, 4)], kind)
    assert "8 threads of 2 rank(s) on 4 CPU(s)" in text and flag in text


def test_threads_of_a_bound_rank() -> None:
    (text,) = warnings_for_node([rank({0, 1}, 2), rank({2, 3}, 4)], "open mpi")
    assert "4 threads of 1 rank(s) on 2 CPU(s)" in text


def test_more_ranks_than_cores_with_two_threads_each() -> None:
    (text,) = warnings_for_node([rank({0, 1}, 2, 2) for _ in range(4)], "open mpi")
    assert "OMP_NUM_THREADS=1" in text


def test_srun_that_gave_fewer_cpus_than_the_job_has() -> None:
    bound = [NodeFacts(frozenset({i}), frozenset({i}), {i: str(i)}, 1, 1, 16) for i in range(4)]
    (text,) = warnings_for_node(bound, "slurm")
    assert "--cpus-per-task=4" in text
    assert warnings_for_node(bound, "open mpi") == [], "mpirun's daemon has been asked for its CPUs"
    half = [NodeFacts(frozenset({2 * i}), frozenset({2 * i}), {2 * i: str(i)}, 1, 2, 8) for i in range(4)]
    assert warnings_for_node(half, "slurm") == [], "a CPU of each core was left out on purpose"


def test_a_quota_counts_as_cores() -> None:
    assert warnings_for_node([rank({0}, 1, quota=2), rank({1}, 1, quota=2)], "open mpi") == []
    (text,) = warnings_for_node([rank(ALL, 4, quota=2)], "none")
    assert "on 2 CPU(s)" in text and "OMP_NUM_THREADS=2" in text


def test_reads_a_quota(tmp_path: Path) -> None:
    path = tmp_path / "cpu.max"
    for text, cpus in (("max 100000", None), ("250000 100000", 2), ("50000 100000", 1), ("", None)):
        path.write_text(text)
        assert binding._quota(path) == cpus
    assert binding._quota(tmp_path / "none") is None


def test_counts_the_cpus_of_a_core() -> None:
    assert [binding._count(text) for text in ("3", "0,64", "0-1", "0-1,4-5")] == [1, 2, 2, 4]


def test_facts_of_this_process() -> None:
    facts = binding.facts()
    assert facts.affinity <= facts.usable and 1 <= facts.cores(facts.usable) <= len(facts.usable)
    if hasattr(os, "sched_getaffinity"):
        assert facts.affinity == os.sched_getaffinity(0)
    assert facts.threads >= 1 and facts.cpus_per_core >= 1
