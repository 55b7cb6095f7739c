"""mpiddp doctor: each check against facts of jobs that are well and jobs that are not."""

from __future__ import annotations

import dataclasses
import json
import threading
import types
from pathlib import Path
from typing import Any, cast

import pytest

from mpiddp.binding import NodeFacts
from mpiddp.cli.doctor import examine, machine, measure
from mpiddp.cli.doctor.checks import findings
from mpiddp.cli.doctor.facts import Job, Pair
from mpiddp.cli.doctor.finding import Finding, exit_code
from mpiddp.cli.doctor.machine import Fabric
from mpiddp.cli.doctor.report import as_json, as_text
from mpiddp.cli.doctor.watch import Watch
from mpiddp.launch import Interface, Launch
from mpiddp.transport.device import CUDA_AWARE, MAPPED, NCCL, STAGED
from mpiddp.transport.probe import Answer
from tests.unit.recorded_jobs import changed, gpu_rank, job, rank


def only(examined: Job) -> Finding:
    """The one finding."""
    (found,) = findings(examined)
    return found


def found(examined: Job) -> tuple[str, str]:
    finding = only(examined)
    assert finding.severity == "note" or finding.cure, "a finding has a cure"
    return finding.severity, finding.name


@pytest.mark.parametrize("examined", [job(), job(1, 1), job(3, 3), job(8, 8), job(8, 2)])
def test_nothing_is_found_where_all_is_well(examined: Job) -> None:
    assert findings(examined) == []


def cpus(affinity: set[int], usable: int, threads: int = 1) -> NodeFacts:
    every = frozenset(range(usable))
    return NodeFacts(frozenset(affinity), every, {cpu: str(cpu) for cpu in every}, threads)


INFINIBAND, SLINGSHOT = Fabric("InfiniBand", "mlx5_0"), Fabric("Slingshot", "cxi0")
DOCKER = Interface("docker0", "172.17.0.1", True)
TWO = job()


@pytest.mark.parametrize(
    ("examined", "expected", "words"),
    [
        (changed(TWO, 2, config_problem="unknown setting MPIDDP_X; the known ones are A"),
         "error setting", "on rank 2"),
        (changed(TWO, 0, init_problem="versions of mpiddp"), "error init", "versions of mpiddp"),
        (Job((rank(0, 1, 1, mpi_problem="cannot load MPI library"),)), "error mpi-missing", "cannot load"),
        (Job((rank(0, 1, 1, size_problem="alone, by itself. Start with x"),)), "error size", "Start with x"),
        (changed(job(settings={"bucket_mb": 2.0}), 3, settings={"bucket_mb": 1.0}),
         "warning settings-differ", "1.0 on rank 3"),
        (changed(TWO, 3, versions=TWO.ranks[3].versions | {"torch": "2.9.0"}), "warning versions", "2.9.0' on rank 3"),
        (changed(TWO, 3, versions=TWO.ranks[3].versions | {"mpiddp": "0.9"}), "error versions", "0.9' on rank 3"),
        (changed(TWO, 1, ignored_horovod=("HOROVOD_CYCLE_TIME",)), "note horovod-ignored", "HOROVOD_CYCLE_TIME"),
        (changed(TWO, 1, launcher_exe="/usr/bin/mpirun"), "warning foreign-launcher", "/usr/bin/mpirun"),
        (changed(TWO, 1, thread_level="funneled"), "warning thread-level", "funneled"),
        (changed(TWO, 1, thread_level="serialized"), "note thread-level", "on rank 1"),
        (changed(TWO, 1, launch=Launch("open mpi", 1, 8, 1, 2)), "note launcher-size", "4, 8 ranks and MPI of 4"),
        (job(launch=Launch("open mpi", 0, 4, 0, 4)), "warning node-divided", "containers"),
        (changed(TWO, 0, cpus=cpus({0}, 4)), "warning binding", "n0, on ranks 0, 1"),
        (job(cpus=cpus({0, 1}, 2, 2)), "warning binding", "(n0, n1)"),
        (job(4, 4, cpus=cpus({0, 1}, 2)), "note oversubscribed", "4 ranks have 2 core(s)"),
        (job(2, 2, memory="private"), "warning memory-private", "/proc/<pid>/fd"),
        (changed(TWO, 0, machine={"shm_free_nbytes": 64 << 20}), "note shm-small", "64 MiB left"),
        (changed(TWO, 2, memory="named files", machine={"shm_free_nbytes": 1 << 20}), "warning shm-small", "n1"),
        (changed(TWO, 2, machine={"limits": {"NOFILE": 256}}), "warning open-files", "256 files"),
        (changed(TWO, 2, machine={"limits": {"AS": 16 << 30}}), "warning address-space", "16 GiB"),
        (
            changed(job(2, 2), 0, machine={"limits": {"MEMLOCK": 64 << 10}, "fabrics": (INFINIBAND,)}),
            "warning locked-memory",
            "64 KiB",
        ),
        (changed(TWO, 2, machine={"fabrics": (INFINIBAND,)}), "warning fabric-unused", "InfiniBand is there"),
        (changed(TWO, 2, machine={"fabrics": (SLINGSHOT,)}), "warning fabric-unused", "--mca pml cm"),
        (changed(TWO, 2, machine={"has_gpu_files": True}, gpu=gpu_rank(None, why="built without CUDA")),
         "warning gpu-unusable", "on rank 2"),
    ],
)  # fmt: skip
def test_a_fault_is_found_alone(examined: Job, expected: str, words: str) -> None:
    assert " ".join(found(examined)) == expected
    assert words in only(examined).what + only(examined).cure


def test_a_fabric_that_is_used_or_idle_is_no_fault() -> None:
    inside = job(2, 2, machine=dataclasses.replace(TWO.ranks[0].machine, fabrics=(INFINIBAND,)))
    assert findings(inside) == [], "one node needs none"
    used = {"machine": {"fabrics": (INFINIBAND,)}, "pml": "ucx", "has_ucx_ib": True}
    assert findings(changed(TWO, 0, **used)) == []
    assert found(changed(TWO, 0, **{**used, "has_ucx_ib": False})) == ("warning", "fabric-unused")
    down = {"fabrics": (dataclasses.replace(INFINIBAND, is_active=False),)}
    assert findings(changed(TWO, 0, machine=down)) == []
    assert findings(changed(TWO, 0, machine={"fabrics": (SLINGSHOT,)}, pml="cm")) == []


def test_an_address_that_several_hosts_have() -> None:
    both = TWO
    for number in range(4):
        both = changed(both, number, machine={"interfaces": (*both.ranks[number].machine.interfaces, DOCKER)})
    assert found(both) == ("warning", "same-address")
    assert "172.17.0.1 (docker0) on 2 nodes" in only(both).what and "btl_tcp_if_exclude lo,docker0" in only(both).cure
    one_host = dataclasses.replace(both, ranks=tuple(dataclasses.replace(r, host="n0") for r in both.ranks))
    assert findings(one_host) == [], "containers on one host's network"
    assert findings(changed(TWO, 0, machine={"interfaces": (DOCKER,)})) == [], "one host alone has it"
    for chosen in ({"tcp_excluded": "lo,docker0"}, {"tcp_excluded": "172.17.0.0/16"}, {"tcp_included": "eth0"}):
        ranks = tuple(dataclasses.replace(each, **chosen) for each in both.ranks)
        assert findings(dataclasses.replace(both, ranks=ranks)) == [], chosen


def test_ranks_bound_to_the_same_core() -> None:
    crowded = job(4, 4)
    for number, own in enumerate(({0, 1}, {0, 1}, {0, 1}, {4, 5})):
        crowded = changed(crowded, number, cpus=cpus(own, 8))
    assert found(crowded) == ("warning", "shared-cores") and "local ranks 0, 1, 2" in only(crowded).what


def test_ranks_and_their_gpus() -> None:
    two = job(2, 2)
    well = changed(changed(two, 0, gpu=gpu_rank(0, "a", "b", peers=(1,))), 1, gpu=gpu_rank(1, "a", "b", peers=(0,)))
    assert findings(well) == []
    apart = changed(well, 0, gpu=gpu_rank(0, "a", "b"))
    assert found(apart) == ("note", "gpu-no-peer-access") and "0 and 1" in only(apart).what
    own = changed(changed(two, 0, gpu=gpu_rank(0, "a")), 1, gpu=gpu_rank(0, "b"))
    assert found(own) == ("note", "gpu-one-visible") and "--gpu-bind=none" in only(own).cure
    same = changed(changed(two, 0, gpu=gpu_rank(0, "a")), 1, gpu=gpu_rank(0, "a"))
    assert found(same) == ("warning", "gpu-shared") and "ranks 0, 1 share GPU-a on n0" in only(same).what
    lacking = changed(two, 1, gpu=gpu_rank(0, "a"))
    assert found(lacking) == ("warning", "gpu-missing") and "rank 0 see no GPU" in only(lacking).what


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        (Answer(True, "tried"), None, "note"),
        (Answer(False, "no CUDA", "install it"), None, "note"),
        (Answer(False, "no CUDA", "install it"), True, "warning"),
    ],
)
def test_cuda_aware_or_not_and_why(answer: Answer, wanted: bool | None, expected: str) -> None:
    examined = job(1, 1, gpu=gpu_rank(0, "a"), cuda_aware=answer, settings={"cuda_aware": wanted})
    assert found(examined) == (expected, "cuda-aware")
    assert answer.why in only(examined).what and only(examined).cure == answer.cure
    mapped = dataclasses.replace(examined, pairs=(Pair((0, 1), "shared memory; GPUs: CUDA IPC"),))
    assert answer.yes or ("host memory" in only(examined).what and "go by CUDA IPC" in only(mapped).what)
    assert findings(job(1, 1, cuda_aware=answer)) == [], "no GPU, no word"


def test_nccl_that_is_not_followed() -> None:
    asked = job(2, 2, settings={"local": "nccl"})
    ways = {way: dataclasses.replace(asked, pairs=(Pair((0, 1), f"MPI; GPUs: {way}"),)) for way in ("NCCL", "CUDA IPC")}
    assert findings(ways["NCCL"]) == [] and found(ways["CUDA IPC"]) == ("warning", "nccl-unused")
    assert "between ranks 0 and 1" in only(ways["CUDA IPC"]).what


def test_nobody_answers() -> None:
    stuck = dataclasses.replace(changed(job(1, 1), 0, machine={"interfaces": (DOCKER,)}), stuck_in="x", waited_s=5)
    assert found(stuck) == ("error", "no-answer")
    assert "docker0" in only(stuck).what and "lo,docker0" in only(stuck).cure and "within 5 s" in only(stuck).what


def test_a_slow_pair_among_its_kind() -> None:
    pairs = [Pair((a, b), "MPI", 1.0) for a in range(4) for b in range(a + 1, 4)]
    pairs[2] = Pair((0, 3), "MPI", 0.2)
    slow = dataclasses.replace(TWO, pairs=tuple(pairs))
    assert found(slow) == ("warning", "slow-pair") and "0 and 3: 0.2" in only(slow).what
    assert findings(dataclasses.replace(TWO, pairs=(*pairs[:2], Pair((0, 3), "other", 0.2), *pairs[3:]))) == []
    assert found(dataclasses.replace(TWO, pairs=tuple(pairs[:2]))) == ("note", "pairs-left-out")


def test_which_pairs() -> None:
    assert len(measure.pairs_of([0] * 8)) == 28 and measure.pairs_of([0]) == []
    many = measure.pairs_of([n // 4 for n in range(12)])
    assert many == [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (4, 7), (8, 9), (8, 10), (8, 11), (0, 4), (0, 8), (4, 8)]
    assert measure.pairs_of([n // 8 for n in range(16)])[-1] == (0, 8)


def test_the_way_between_two_ranks() -> None:
    a, b, c, _ = TWO.ranks
    assert measure.way_between(a, b) == "shared memory" and measure.way_between(a, c) == "MPI (ob1), between nodes"
    a, b = (
        dataclasses.replace(each, memory="private", pml="", library="MPICH v5.0", gpu=gpu_rank(0, "a"))
        for each in (a, b)
    )
    assert measure.way_between(a, b) == "MPI (MPICH), same node"
    host = "MPI (MPICH), same node; GPUs: "
    assert measure.way_between(a, b, STAGED) == host + "staged through host memory"
    assert measure.way_between(a, b, CUDA_AWARE) == host + "CUDA-aware MPI"
    assert measure.way_between(a, b, MAPPED) == host + "CUDA IPC"
    assert measure.way_between(a, b, NCCL) == host + "NCCL"


def test_exit_codes() -> None:
    kinds = {name: Finding(name, "x", "", "") for name in ("note", "warning", "error")}
    assert [exit_code(found) for found in ([], [kinds["note"]], [kinds["warning"]], [*kinds.values()])] == [0, 0, 1, 2]


def test_the_report_s_two_forms() -> None:
    examined = changed(changed(TWO, 1, thread_level="funneled"), 0, config_problem="unknown setting MPIDDP_X")
    examined = dataclasses.replace(examined, pairs=(Pair((0, 1), "shared memory", 5.25, 1.5),))
    found = findings(examined)
    text = as_text(examined, found)
    assert text.index("error: unknown setting") < text.index("warning: MPI's thread level")
    assert text.endswith("found: 1 error, 1 warning, 1 note") and "0 - 1      5.25" in text
    assert "rank 3: CPUs 2-3, 2 thread(s), no GPU" in text and "no launcher" not in text
    assert max(map(len, text.splitlines())) <= 130
    read = json.loads(as_json(examined, found))
    assert read["exit_code"] == 2 and [f["severity"] for f in read["findings"]] == ["error", "warning", "note"]
    assert read["ranks"][3]["cpus"]["affinity"] == [2, 3] and read["pairs"][0]["ranks"] == [0, 1]
    assert "found nothing wrong" in as_text(job(), []) and "GPUs GB/s" not in text
    with_gpus = dataclasses.replace(job(), pairs=(Pair((0, 1), "a", 1.0, 2.0, 55.5), Pair((0, 2), "b", 1.0, 2.0)))
    assert "GPUs GB/s" in as_text(with_gpus, []) and "     55.5  a" in as_text(with_gpus, [])


def test_the_watch_speaks_once_and_ends() -> None:
    told: list[Any] = []
    ended = threading.Event()
    watch = Watch(0.05, TWO.ranks[0], told.append, lambda code: (told.append(code), ended.set()))
    assert ended.wait(20) and told == [watch, 2] and watch.phase == "starting"
    calm = Watch(1000, TWO.ranks[0], told.append, told.append)
    calm.stop()
    assert told == [watch, 2]


def test_fabrics_in_sys(tmp_path: Path) -> None:
    assert machine.fabrics(tmp_path) == ()
    for device, layer, state in (("mlx5_0", "InfiniBand", "4: ACTIVE"), ("mlx5_1", "Ethernet", "1: DOWN")):
        port = tmp_path / "infiniband" / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "link_layer").write_text(f"{layer}\n")
        (port / "state").write_text(f"{state}\n")
    (tmp_path / "infiniband" / "hfi1_0").mkdir()
    (tmp_path / "cxi" / "cxi0").mkdir(parents=True)
    assert machine.fabrics(tmp_path) == (
        Fabric("Slingshot", "cxi0"),
        Fabric("Omni-Path", "hfi1_0", False),
        Fabric("InfiniBand", "mlx5_0"),
        Fabric("RoCE", "mlx5_1", False),
    )


def test_this_machine_can_be_looked_at() -> None:
    here = machine.look()
    assert here.limits["NOFILE"] is None or here.limits["NOFILE"] > 0
    assert all(i.address.count(".") == 3 and i.name != "lo" for i in here.interfaces)


def test_settings_that_exclude_each_other_are_no_missing_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDDP_CUDA_AWARE", "1")
    monkeypatch.setenv("MPIDDP_LOCAL", "nccl")
    alone = rank(0, 1, 1, config_problem="")
    examined, _ = examine.examine(cast(Watch, types.SimpleNamespace()), alone)
    assert [finding.name for finding in findings(examined)] == ["setting"]


def test_cures_are_those_of_the_mpi_that_runs() -> None:
    mpich = job(library="MPICH Version: 5.0.0", pml="")
    for number in range(4):
        interfaces = (*mpich.ranks[number].machine.interfaces, DOCKER)
        mpich = changed(mpich, number, machine={"interfaces": interfaces})
    stuck = dataclasses.replace(job(library="", launch=Launch("mpich")), stuck_in="starting MPI", waited_s=1)
    differing = changed(job(library="MPICH 5", pml="", settings={"bucket_mb": 2.0}), 1, settings={"bucket_mb": 1.0})
    for examined in (mpich, stuck, differing):
        cure = next(each.cure for each in findings(examined) if each.severity != "note")
        assert "mpiexec" in cure and "mca" not in cure and "mpirun" not in cure
