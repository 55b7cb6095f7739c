"""Child processes of a rank: they know who their parent is, may not communicate, and do it no harm."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

DATASET = """
from mpi4py import MPI  # as datasets do that read through parallel HDF5

import torch
import mpiddp


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.tensor([index**2, mpiddp.rank(), mpiddp.size(), mpiddp.local_rank()])


class Communicates(Squares):
    def __getitem__(self, index):
        mpiddp.allreduce(torch.ones(2))


class AsksMpi(Squares):
    def __getitem__(self, index):
        return torch.tensor([index, MPI.COMM_WORLD.Get_size()])
"""

LOADS = """
import sys

import torch
import mpiddp
from dataset import Communicates, Squares

if __name__ == "__main__":
    mpiddp.init()
    method = sys.argv[1]

    def loader(dataset):
        return torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=method)

    for epoch in range(2):
        rows = torch.cat(list(loader(Squares())))
        assert rows[:, 0].tolist() == [i**2 for i in range(16)]
        assert rows[0, 1:].tolist() == [mpiddp.rank(), mpiddp.size(), mpiddp.local_rank()], rows
        total = mpiddp.allreduce(rows[:, 0].float(), op=mpiddp.Sum)
        assert torch.equal(total, rows[:, 0] * mpiddp.size())
    try:
        list(loader(Communicates()))
    except mpiddp.WorkerProcessError as error:
        print("refused:", str(error).splitlines()[-1])
    mpiddp.barrier()
    print("done")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dataset.py").write_text(DATASET)
    return tmp_path


def script(folder: Path, source: str) -> Path:
    path = folder / "train.py"
    path.write_text(textwrap.dedent(source))
    return path


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))]
)
def test_data_loader(mpirun: Any, folder: Path, method: str) -> None:
    done = mpirun([str(script(folder, LOADS)), method], 2)
    assert done.stdout.count("done") == 2, done
    assert done.stdout.count("refused:") == 2 and "DataLoader worker" in done.stdout, done


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn"])
def test_mpi_in_a_worker_is_a_world_of_one(mpirun: Any, folder: Path, method: str) -> None:
    source = f"""
        import torch
        import mpiddp
        from dataset import AsksMpi

        if __name__ == "__main__":
            mpiddp.init()
            loader = torch.utils.data.DataLoader(AsksMpi(), num_workers=1, multiprocessing_context="{method}")
            assert all(row[0, 1] == 1 for row in loader)
            mpiddp.barrier()
            print("done")
    """
    assert mpirun(script(folder, source), 2).stdout.count("done") == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver"])
def test_a_script_that_calls_init_above_its_main_guard(mpirun: Any, folder: Path, method: str) -> None:
    """A new worker runs the script's top level again: init() there takes the parent's word and starts no MPI."""
    source = f"""
        import sys
        import torch
        import mpiddp

        mpiddp.init()

        class Ranks(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                mpiddp.init()
                assert "mpi4py.MPI" not in sys.modules and not mpiddp.is_initialized()
                return mpiddp.rank()

        if __name__ == "__main__":
            loader = torch.utils.data.DataLoader(Ranks(), num_workers=2, multiprocessing_context="{method}")
            assert [int(rank) for rank in loader] == [mpiddp.rank()] * 4
            mpiddp.barrier()
            print("done")
    """
    assert mpirun(script(folder, source), 2).stdout.count("done") == 2


@pytest.mark.slow
def test_a_worker_that_is_terminated(mpirun: Any, folder: Path) -> None:
    """Neither the job nor the rank: what init() has installed acts in the process that called it alone."""
    source = """
        import multiprocessing
        import signal
        import time
        import mpiddp

        def work(at_work):
            at_work.set()
            time.sleep(60)

        def fail(at_work):
            at_work.set()
            raise SystemExit(3)

        if __name__ == "__main__":
            mpiddp.init()
            for method in ("fork", "spawn", "forkserver"):
                context = multiprocessing.get_context(method)
                at_work = context.Event()
                worker = context.Process(target=work, args=(at_work,))
                worker.start()
                assert at_work.wait(60)
                worker.terminate()
                worker.join(20)
                assert worker.exitcode == -signal.SIGTERM, (method, worker.exitcode)
                worker = context.Process(target=fail, args=(at_work,))
                worker.start()
                worker.join(60)
                assert worker.exitcode == 3, (method, worker.exitcode)
                mpiddp.barrier()
            print("done")
    """
    done = mpirun(script(folder, source), 2)
    assert done.stdout.count("done") == 2 and "the job ends" not in done.output, done


@pytest.mark.slow
def test_a_loader_that_is_left_in_the_middle(mpirun: Any, folder: Path) -> None:
    """An iterator that is dropped terminates its workers."""
    source = """
        import torch
        import mpiddp
        from dataset import Squares

        if __name__ == "__main__":
            mpiddp.init()
            for epoch in range(3):
                loader = torch.utils.data.DataLoader(Squares(), num_workers=2, persistent_workers=True)
                next(iter(loader))
                del loader
                mpiddp.barrier()
            print("done")
    """
    assert mpirun(script(folder, source), 2).stdout.count("done") == 2


@pytest.mark.slow
def test_a_plain_subprocess_is_a_world_of_one(mpirun: Any, folder: Path) -> None:
    evaluate = folder / "evaluate.py"
    evaluate.write_text("import mpiddp\nmpiddp.init()\nprint('evaluates', mpiddp.rank(), mpiddp.size())\n")
    source = f"""
        import subprocess
        import sys
        import mpiddp

        mpiddp.init()
        if mpiddp.rank() == 1:
            command = [sys.executable, {str(evaluate)!r}]
            print(subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout)
        mpiddp.barrier()
    """
    assert "evaluates 0 1" in mpirun(script(folder, source), 2).stdout
