"""The order of ``init()`` and MPI's start, and what is said when it is too late."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_init_sets_what_open_mpi_reads_at_its_start(mpirun: Any) -> None:
    script = """
        import os
        import mpiddp

        mpiddp.init()
        assert os.environ["OMPI_MCA_btl_tcp_links"] == "2"
        assert not [n for n in os.environ if n.startswith(("PMIX_RANK", "PMI_RANK", "PMI_FD", "PRTE_LAUNCHED"))]
        mpiddp.barrier()
    """
    done = mpirun(script, 2)
    assert "WARNING" not in done.output, done


@pytest.mark.parametrize("level", ["single", "multiple"])
def test_mpi_first(mpirun: Any, level: str) -> None:
    script = f"""
        import mpi4py
        mpi4py.rc.thread_level = "{level}"
        from mpi4py import MPI
        import torch
        import mpiddp

        mpiddp.init()
        assert (mpiddp.rank(), mpiddp.size()) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
        assert mpiddp.allreduce(torch.ones(3), op=mpiddp.Sum).tolist() == [2, 2, 2]
        MPI.COMM_WORLD.Barrier()
    """
    done = mpirun(script, 2)
    assert "WARNING" not in done.output, "one node, and nothing was asked for: nothing is lost"


def test_too_late_for_what_was_asked_for(mpirun: Any) -> None:
    if mpirun.flavour != "open mpi":
        pytest.skip("the settings are Open MPI's")
    script = "from mpi4py import MPI\nimport mpiddp\nmpiddp.init()\nmpiddp.barrier()\n"
    done = mpirun(script, 2, env={"MPIDDP_FAULT_TOLERANT": "1"})
    assert done.output.count("too early for OMPI_MCA_pml=ob1") == 1 and "from mpi4py import MPI" in done.output


def test_a_choice_of_the_user_is_left_alone(mpirun: Any) -> None:
    script = """
        import os
        import mpiddp

        mpiddp.init()
        assert os.environ["OMPI_MCA_btl_tcp_links"] == "3" and os.environ["OMPI_MCA_pml"] == "ob1"
        mpiddp.barrier()
    """
    mpirun(script, 2, env={"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl_tcp_links": "3", "MPIDDP_FAULT_TOLERANT": "1"})


def test_ranks_that_yield_and_ranks_that_do_not_go_together(mpirun: Any) -> None:
    """Yielding is chosen from the cores of each node: nodes may differ in it."""
    script = """
        import os
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
        os.environ["OMPI_MCA_mpi_yield_when_idle"] = str(rank % 2)
        import torch
        import mpiddp

        mpiddp.init()
        for _ in range(20):
            assert mpiddp.allreduce(torch.ones(1000), op=mpiddp.Sum)[0] == 2
    """
    mpirun(script, 2, env={"OMPI_MCA_mpi_yield_when_idle": None})


def test_init_again_after_shutdown(mpirun: Any) -> None:
    script = """
        import mpiddp

        for _ in range(3):
            mpiddp.init()
            assert mpiddp.size() == 2
            mpiddp.barrier()
            mpiddp.shutdown()
        mpiddp.init()
        raise SystemExit(3 if mpiddp.rank() == 1 else 0)
    """
    assert "exits with code 3" in mpirun(script, 2, expect=3).output
