"""Who started us, and does MPI agree: from recorded environments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest

from mpiddp import config, launch
from mpiddp.errors import LaunchError
from tests.unit.recorded_environs import ENVIRONS

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI x"
MPICH = "MPICH Version:      5.0.2\nMPICH Release date: x"


@pytest.mark.parametrize(
    ("name", "kind", "rank", "size", "local_rank", "local_size"),
    [
        ("plain python", "none", None, None, None, None),
        ("mpirun of open mpi 5", "open mpi", 1, 2, 1, 2),
        ("mpirun of open mpi 4", "open mpi", 1, 2, 1, 2),
        ("mpirun -np 1", "open mpi", 0, 1, 0, 1),
        ("mpiexec of mpich", "mpich", 1, 2, 1, 2),
        ("mpiexec of intel mpi", "intel mpi", 1, 2, 1, 2),
        ("srun --mpi=pmix", "slurm", 3, 4, 0, 1),
        ("srun --mpi=pmi2", "slurm", 3, 4, 0, 1),
        ("srun --mpi=none", "slurm", 3, 4, 0, 1),
        ("sbatch script", "none", None, None, None, None),
        ("srun -n1 in an sbatch script", "slurm", 0, 1, 0, 1),
        ("salloc", "none", None, None, None, None),
        ("salloc with an interactive step", "none", None, None, None, None),
        ("python typed in srun -n4 --pty bash", "slurm", 0, 4, 0, 4),
        ("mpirun in an sbatch script, remote node", "open mpi", 3, 4, 0, 1),
        ("mpiexec of pals", "pals", 5, 8, 1, 4),
        ("mpiexec of pals --pmi=pmix", "pals", 0, None, 0, 4),
        ("jsrun", "jsm", 2, 6, 2, 3),
        ("flux run", "flux", 3, 4, 1, None),
        ("prun in a pmix server", "pmix", 1, None, None, None),
        ("an unknown launcher with pmi", "pmi", 1, 3, None, None),
    ],
)
def test_detects(
    name: str, kind: str, rank: int | None, size: int | None, local_rank: int | None, local_size: int | None
) -> None:
    found = launch.detect(ENVIRONS[name])
    assert (found.kind, found.rank, found.size, found.local_rank, found.local_size) == (
        kind,
        rank,
        size,
        local_rank,
        local_size,
    )
    assert set(found.variables) <= set(ENVIRONS[name])


def test_a_node_of_many_alike_has_its_own_count() -> None:
    environ = {**ENVIRONS["srun --mpi=none"], "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": "1"}
    assert launch.detect(environ).local_size == 3
    assert launch.detect({**environ, "SLURM_NODEID": "7"}).local_size is None


def check(name: str, library: str = OPEN_MPI, mpi_size: int = 1, modules: tuple[str, ...] = (), **more: str) -> None:
    environ = {**ENVIRONS[name], **more}
    launch.check_size(launch.detect(environ), mpi_size, environ, library, modules)


@pytest.mark.parametrize(
    ("name", "library", "cure"),
    [
        ("srun --mpi=none", OPEN_MPI, "--mpi=pmix"),
        ("srun --mpi=pmi2", OPEN_MPI, "--mpi=pmi2: use `srun --mpi=pmix`"),
        ("srun --mpi=pmix", MPICH, "--mpi=pmi2"),
        ("srun from a pty inside a step", OPEN_MPI, "--mpi=pmix"),
        ("mpiexec of mpich", OPEN_MPI, "That mpiexec belongs to mpich and mpi4py loaded Open MPI"),
        ("mpiexec of intel mpi", OPEN_MPI, "belongs to intel mpi"),
        ("mpirun of open mpi 5", MPICH, "That mpirun belongs to Open MPI"),
        ("mpirun of open mpi 4", OPEN_MPI, "one installation"),
        ("mpiexec of pals", OPEN_MPI, "--pmi=pmix"),
        ("mpiexec of pals --pmi=pmix", MPICH, "at least 4 ranks"),
        ("jsrun", OPEN_MPI, "Spectrum"),
        ("flux run", OPEN_MPI, "-o pmi=pmix"),
        ("prun in a pmix server", MPICH, "at least 2 ranks"),
        ("an unknown launcher with pmi", OPEN_MPI, "PMI_SIZE=3"),
    ],
)
def test_alarm_with_cause_and_cure(name: str, library: str, cure: str) -> None:
    with pytest.raises(LaunchError) as caught:
        check(name, library)
    assert cure in str(caught.value)
    assert library.split(",")[0].splitlines()[0] in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "plain python",
        "mpirun -np 1",
        "sbatch script",
        "srun -n1 in an sbatch script",
        "salloc",
        "salloc with an interactive step",
        "python typed in srun -n4 --pty bash",
    ],
)
def test_no_false_alarm(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", [n for n in ENVIRONS if n != "plain python"])
def test_no_alarm_when_mpi_has_several_ranks(name: str) -> None:
    check(name, mpi_size=2)


def test_a_notebook_inside_a_step_is_alone_on_purpose() -> None:
    check("srun --mpi=none", SLURM_PROCID="0", JPY_PARENT_PID="17")
    check("srun --mpi=none", modules=("ipykernel",))
    with pytest.raises(LaunchError):  # started from the notebook: the variable is inherited
        check("srun --mpi=none", JPY_PARENT_PID="17")


def test_the_way_out_that_the_message_names_works() -> None:
    for name in ("srun --mpi=none", "mpiexec of mpich", "mpirun of open mpi 5"):
        environ = dict(ENVIRONS[name])
        with pytest.raises(LaunchError) as caught:
            launch.check_size(launch.detect(environ), 1, environ, "some MPI", ())
        command = str(caught.value).rpartition("`env ")[2].rstrip("`").split(" -u ")
        for variable in command:
            environ.pop(variable.removeprefix("-u ").strip())
        launch.check_size(launch.detect(environ), 1, environ, "some MPI", ())


@pytest.fixture
def process_environ() -> Iterator[Mapping[str, str]]:
    """The process's environment, given back as it was."""
    before = dict(os.environ)
    yield config.environ()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", [n for n in ENVIRONS if n.startswith(("mpi", "srun --mpi", "flux"))])
def test_children_are_not_told_to_join(name: str, process_environ: Mapping[str, str]) -> None:
    config.export({**ENVIRONS[name], "PMIX_MCA_gds": "hash", "PRTE_ALLOW_RUN_AS_ROOT": "1"})
    removed = launch.after_mpi(process_environ)
    assert set(removed) == set(launch.joins({**ENVIRONS[name]})) and not launch.joins(process_environ)
    assert {"PMIX_MCA_gds", "PRTE_ALLOW_RUN_AS_ROOT"} <= set(process_environ)
    kept = {n for n in ENVIRONS[name] if n.startswith(("OMPI_COMM_WORLD", "SLURM_", "MPI_LOCAL", "FLUX_", "PALS_"))}
    assert kept <= set(process_environ)
    assert launch.after_mpi(process_environ) == {}


def test_a_plain_child_of_a_rank_is_alone_and_silent(process_environ: Mapping[str, str]) -> None:
    config.export(ENVIRONS["mpirun of open mpi 5"])
    launch.after_mpi(process_environ)
    assert launch.detect(process_environ).size == 2  # the rank itself, at a second init()
    child = launch.detect(process_environ, pid=os.getpid() + 1)
    assert child == launch.Launch("none")
    launch.check_size(child, 1, process_environ, OPEN_MPI, ())


def test_a_job_started_by_a_rank_counts_anew(process_environ: Mapping[str, str]) -> None:
    config.export(ENVIRONS["mpirun of open mpi 5"])
    launch.after_mpi(process_environ)
    config.export({**ENVIRONS["mpirun of open mpi 4"], "OMPI_COMM_WORLD_SIZE": "5"})
    assert launch.detect(process_environ, pid=os.getpid() + 1).size == 5
