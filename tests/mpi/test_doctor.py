"""mpiddp doctor on real ranks: what it gathers, when one rank is wrong, and when one does not answer."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_the_facts_of_all_ranks(mpirun: Any) -> None:
    done = mpirun(["-m", "mpiddp", "doctor", "--json"], 2, expect=None, env={"HOROVOD_CYCLE_TIME": "1"})
    read = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.rc == read["exit_code"] < 2, done
    assert [r["rank"] for r in read["ranks"]] == [0, 1] and {r["size"] for r in read["ranks"]} == {2}
    assert all(r["libmpi"] and r["thread_level"] == "multiple" and r["memory"] for r in read["ranks"])
    assert {r["pml"] for r in read["ranks"]} <= ({"ob1", "ucx", "cm"} if mpirun.flavour == "open mpi" else {""})
    (pair,) = read["pairs"]
    assert pair["ranks"] == [0, 1] and pair["gigabytes_per_s"] > 0.05 and pair["latency_us"] > 0
    assert "horovod-ignored" in [f["name"] for f in read["findings"]]


def test_a_setting_that_one_rank_has_wrong(mpirun: Any) -> None:
    script = """
        import os, sys
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
            os.environ["MPIDDP_BUCKETS"] = "1"
        from mpiddp.cli import main
        sys.exit(main(["doctor"]))
    """
    done = mpirun(script, 2, expect=None)
    assert done.rc != 0 and "error: unknown setting MPIDDP_BUCKETS (on rank 1) [setting]" in done.stdout, done
    assert done.stdout.count("[setting]") == 1


def test_a_rank_that_does_not_answer(mpirun: Any) -> None:
    script = """
        import os, signal, sys
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
            from mpi4py import MPI
            signal.pause()
        from mpiddp.cli import main
        sys.exit(main(["doctor", "--timeout", "3"]))
    """
    done = mpirun(script, 2, expect="failure")
    assert "within 3 s there was no answer from all ranks while finding out who shares a node" in " ".join(
        done.stdout.split()
    )


def test_a_rank_without_libucx_is_found_out(mpirun: Any, tmp_path: Any) -> None:
    """Ranks of one layer start together, whoever has the wheel; then all agree on no."""
    (tmp_path / "libucx.py").write_text("loaded = []\ndef load_library():\n    loaded.append(1)\n")
    script = f"""
        import os, sys
        rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
        if rank == "0":
            sys.path.insert(0, {os.fspath(tmp_path)!r})
        import dataclasses
        import mpiddp
        from mpiddp import launch, runtime
        from mpiddp.transport import probe

        mpiddp.init()
        if launch.mpi_is_wheel(os.environ):
            assert os.environ["OMPI_MCA_pml"] == "ucx"
            assert rank == "1" or sys.modules["libucx"].loaded
        else:
            assert "OMPI_MCA_pml" not in os.environ and "libucx" not in sys.modules

        look = probe.capability
        def with_cuda(*facts):
            found = look(*facts)
            return dataclasses.replace(found, pml="ucx", ucx_has_cuda=rank == "0", is_wheel=True)
        probe.capability = with_cuda
        def never(device):
            raise AssertionError("tried")
        world = runtime.current().world
        answer = probe.cuda_aware(world.comm, world.nodes, 0, "Open MPI v5", True, never)
        assert not answer.yes and answer.why == "the UCX that Open MPI v5 uses has no CUDA on rank 1", answer
        assert "on every host" in answer.cure
        assert mpiddp.local_device().type in ("cpu", "cuda")

        import torch
        from mpiddp.cli.doctor.measure import between_devices
        for is_aware in (True, False):
            assert between_devices(world.comm, 1 - world.rank, torch.device("cpu"), is_aware, 1 << 20) > 1e7
        mpiddp.barrier()
    """
    mpirun(script, 2, env={"MPIDDP_CUDA_AWARE": "1", "OMPI_MCA_pml": None})


def test_too_late_for_ucx(mpirun: Any) -> None:
    if mpirun.flavour != "open mpi":
        pytest.skip("the settings are Open MPI's")
    script = """
        import os
        from mpi4py import MPI
        import mpiddp
        from mpiddp import launch

        is_wheel = launch.mpi_is_wheel(os.environ)
        mpiddp.init()
        assert "OMPI_MCA_pml" not in os.environ
        mpiddp.barrier()
        if MPI.COMM_WORLD.rank == 0:
            print("too early" if is_wheel else "nothing lost")
    """
    done = mpirun(script, 2, env={"MPIDDP_CUDA_AWARE": "1", "OMPI_MCA_pml": None})
    is_said = "OMPI_MCA_pml=ucx: call mpiddp.init() above the line `from mpi4py import MPI`" in done.output
    assert is_said == ("too early" in done.stdout), done
