"""On a machine with a GPU: whose is which, no context on the way, and what MPI really does."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this PyTorch can use"),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_has_one_and_init_touches_none(mpirun: Any, ranks: int) -> None:
    script = """
        import mpiddp, torch
        mpiddp.init()
        assert not torch.cuda.is_initialized()
        device = mpiddp.local_device()
        assert device == torch.device("cuda", mpiddp.local_rank() % torch.cuda.device_count()), device
        properties = torch.cuda.get_device_properties(device)
        gpu = mpiddp.runtime.current().gpu.gpu
        assert gpu.name == properties.name
        if hasattr(properties, "uuid"):
            assert str(properties.uuid) == gpu.uuid
        mpiddp.barrier()
    """
    done = mpirun(script, ranks)
    assert ("share a GPU" in done.output) == (ranks > torch.cuda.device_count())


def test_visible_devices_may_be_set_after_init(mpirun: Any) -> None:
    script = """
        import os, mpiddp, torch
        mpiddp.init()
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        assert torch.ones(3, device="cuda").sum().item() == 3 and torch.cuda.device_count() == 1
    """
    mpirun(script, 2)


def test_what_mpi_does_is_found_out_without_harm(mpirun: Any) -> None:
    script = """
        import mpiddp
        mpiddp.init()
        answer = mpiddp.runtime.current().cuda_aware
        if mpiddp.rank() == 0:
            print("ANSWER", answer.yes, answer.why, answer.cure)
        mpiddp.barrier()
    """
    plain = mpirun(script, 2)
    assert "ANSWER" in plain.stdout and "tensors on GPUs" in plain.output
    asked = mpirun(script, 2, env={"MPIDDP_CUDA_AWARE": "1"})
    if importlib.util.find_spec("libucx") and mpirun.flavour == "open mpi":
        assert "ANSWER True a child process has sent" in asked.stdout, asked
    never = mpirun(script, 2, env={"MPIDDP_CUDA_AWARE": "0"})
    assert "ANSWER False MPIDDP_CUDA_AWARE=0" in never.stdout
