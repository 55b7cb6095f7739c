"""Whether MPI takes device buffers: what is decided from what is found, and that trying does no harm."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from mpiddp.transport import probe
from mpiddp.transport.capability import Capability
from mpiddp.transport.probe import Answer, Verdict, decide, try_in_child

WHEEL = Capability(True, "Open MPI v5.0.11", "ob1", is_wheel=True)
UCX = Capability(True, "Open MPI v5.0.11", "ucx", True, False, True, True, True)
SITE = Capability(True, "Open MPI v4.1.6", "ob1", claims=True)
YES, NO, UNKNOWN = Verdict("yes"), Verdict("no", "killed"), Verdict("unknown", "could not")


def other(of: Capability, **changed: Any) -> Capability:
    return Capability(**{**of.__dict__, **changed})


def no(reports: Sequence[Capability], verdicts: Sequence[Verdict | None] = (), wanted: bool | None = None) -> Answer:
    answer = decide(reports, verdicts, wanted, "do this")
    assert answer is not None and not answer.yes
    return answer


def test_signs_are_tried_not_believed() -> None:
    assert decide([UCX, UCX], (), None, "") is None
    assert decide([SITE], (), None, "") is None, "its own claim counts as a sign"
    assert decide([UCX], [YES], None, "") == (
        True,
        "a child process has sent a device buffer to itself by Open MPI v5.0.11 over ucx",
        "",
    )
    assert no([SITE], [NO]).why == "killed (tried by rank 0)"


def test_no_sign_is_a_no_and_nobody_tries() -> None:
    answer = no([WHEEL, WHEEL])
    assert answer.why == "Open MPI v5.0.11 over ob1 does not say that it takes CUDA's buffers"
    assert answer.cure == "install mpiddp with the extra cuda13 (or cuda12) on every host and do this"
    assert no([other(WHEEL, has_libucx=True)]).cure == "do this"
    assert "built with CUDA" in no([Capability(True, "MPICH 4.2")]).cure


def test_one_rank_without_cuda_decides_for_all() -> None:
    answer = no([UCX, other(UCX, ucx_has_cuda=False, has_libucx=False)], wanted=True)
    assert answer.why == "the UCX that Open MPI v5.0.11 uses has no CUDA on rank 1"
    assert answer.cure == "install mpiddp with the extra cuda13 (or cuda12) on every host"
    late = no([other(UCX, ucx_has_cuda=False, libucx_is_loaded=False)], wanted=True)
    assert "above the line `from mpi4py import MPI`" in late.cure
    assert "libnvidia-ml" in no([other(UCX, ucx_has_cuda=False)], wanted=True).cure


def test_a_child_s_no_counts_whatever_is_wanted_and_not_knowing_does_not() -> None:
    assert no([UCX, UCX], [None, NO], wanted=True).why == "killed (tried by rank 1)"
    assert no([UCX], [UNKNOWN]).cure == "MPIDDP_CUDA_AWARE=1 uses it all the same"
    assert decide([UCX, UCX], [UNKNOWN, YES], True, "") == (
        True,
        "MPIDDP_CUDA_AWARE=1; it could not be tried in a process of its own",
        "",
    )


def child(source: str, timeout_s: float = 20) -> Verdict:
    return try_in_child(0, [sys.executable, "-I", "-S", "-c", source], timeout_s)


def test_what_a_child_may_do() -> None:
    assert child("import os; os.kill(os.getpid(), 11)") == (
        "no",
        "a child process that sent a device buffer was killed by SIGSEGV",
    )
    assert child("import time; time.sleep(60)", 0.2) == (
        "no",
        "sending a device buffer hung for 0.2 s in a child process",
    )
    assert child("raise SystemExit(139)").word == "no", "a shell's way to say it"
    assert child('print(\'noise\'); print(\'{"verdict": "yes", "why": ""}\')') == YES
    assert child('print(\'{"verdict": "no", "why": "changed"}\')') == ("no", "changed")
    assert child("print('what?')").word == "unknown"
    assert child("raise SystemExit(1)") == ("unknown", "the child process that tried a device buffer ended with code 1")
    assert try_in_child(0, ["/no/such/program"]).word == "unknown"


def test_a_child_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setenv("PMI_FD", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    source = 'import os; print(\'{"verdict": "%s", "why": ""}\' % ({\'PMIX_RANK\', \'PMI_FD\'} & set(os.environ)))'
    assert child(source) == ("set()", "")
    assert os.environ["PMIX_RANK"] == "3"


class Ranks:
    """All ranks say what this one says."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size, self.gathered = size, 0

    def allgather(self, value: Any) -> list[Any]:
        self.gathered += 1
        return [value] * self.size


def never(device: int) -> Verdict:
    pytest.fail("tried")


def test_without_a_gpu_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "capability", lambda *a: pytest.fail("looked"))
    ranks = Ranks(2)
    assert probe.cuda_aware(ranks, [0, 0], None, "Open MPI", True, never) == (False, "no rank has a GPU", "")
    assert ranks.gathered == 1
    assert probe.cuda_aware(Ranks(2), [0, 0], 0, "Open MPI", False, never) == (False, "MPIDDP_CUDA_AWARE=0", "")
    answer = probe.cuda_aware(Ranks(2), [0, 0], 0, "Open MPI", None, never, with_nccl=True)
    assert not answer.yes and "MPIDDP_LOCAL=nccl" in answer.why


def test_the_first_of_each_node_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def try_it(device: int) -> Verdict:
        tried.append(device)
        return YES

    monkeypatch.setattr(probe, "capability", lambda *a: UCX)
    assert probe.cuda_aware(Ranks(4), [0, 0, 1, 1], 5, "Open MPI", None, try_it).yes
    second = Ranks(4)
    second.rank = 1
    monkeypatch.setattr(
        probe, "decide", lambda reports, verdicts, *a: Answer(False, str(verdicts)) if verdicts else None
    )
    assert probe.cuda_aware(second, [0, 0, 1, 1], 5, "Open MPI", None, try_it).why == str([None] * 4)
    assert tried == [5]


def test_how_to_ask_for_it_depends_on_who_carries_the_environment() -> None:
    one_host = {
        f"OMPI_COMM_WORLD_{n}": v for n, v in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items()
    }
    assert "set MPIDDP_CUDA_AWARE=1" in probe._how(one_host, None)
    assert "mpirun --mca pml ucx" in probe._how({**one_host, "OMPI_COMM_WORLD_SIZE": "4"}, None)
    assert "leave OMPI_MCA_pml" in probe._how(one_host, True)
    assert "-x MPIDDP_CUDA_AWARE=1" in probe._how({**one_host, "OMPI_COMM_WORLD_SIZE": "4"}, None)
