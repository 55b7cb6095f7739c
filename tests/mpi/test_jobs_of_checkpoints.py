"""Whole jobs: a sharded checkpoint at other numbers of ranks, and the command that starts jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SHARDED = """
    import sys, torch, mpiddp
    from pathlib import Path
    from torch import nn

    mpiddp.init()
    folder, oracle = Path(sys.argv[1]), Path(sys.argv[1] + ".pt")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(45, 7)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    if mpiddp.size() > 1:
        optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters(), shard=True)
    checkpoints = mpiddp.checkpoint.Checkpoints(folder, model=model, optimizer=optimizer)
    step = checkpoints.restore()
    if mpiddp.size() > 1:
        optimizer.consolidate_state_dict(0)
    if mpiddp.rank() == 0 and step:
        for kept, now in zip(torch.load(oracle), (model.state_dict(), optimizer.state_dict()), strict=True):
            torch.testing.assert_close(now, kept, rtol=0, atol=0)
        print("as it was on", mpiddp.size())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 5, 5)).square().sum().backward()
        optimizer.step()
    checkpoints.save(step + 2)
    if mpiddp.size() > 1:
        optimizer.consolidate_state_dict(0)
    if mpiddp.rank() == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), oracle)
"""


@pytest.mark.slow
def test_a_sharded_checkpoint_at_other_numbers_of_ranks(mpirun, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text("\n".join(line[4:] for line in SHARDED.splitlines()))
    for n, said in ((3, ""), (2, "as it was on 2"), (0, "as it was on 1"), (2, "as it was on 2")):
        assert mpirun([script, tmp_path / "checkpoints"], n).stdout.strip() == said


SLOW = """
    import sys, time, torch, mpiddp
    from mpiddp.checkpoint import checkpoints as module

    mpiddp.init()
    checkpoints = mpiddp.checkpoint.Checkpoints(sys.argv[1], model=torch.nn.Linear(3, 3))
    write, load = module.write_file, checkpoints._load
    module.write_file = lambda *what: (time.sleep(5), write(*what))[1]
    checkpoints._load = lambda: (time.sleep(5), load())[1]
    checkpoints.save(7)
    if checkpoints.restore() == 7 and mpiddp.rank() == 0:
        print("went on")
"""


@pytest.mark.slow
def test_who_waits_for_a_slow_file_system_does_not_give_up(mpirun, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text("\n".join(line[4:] for line in SLOW.splitlines()))
    done = mpirun([script, tmp_path / "checkpoints"], 2, env={"MPIDDP_STALL_ABORT_S": "2"})
    assert done.stdout.strip() == "went on"


@pytest.mark.slow
def test_run_starts_ranks_and_keeps_the_exit_code(mpirun) -> None:
    code = "import mpiddp, sys; mpiddp.init(); print('one of', mpiddp.size()); mpiddp.barrier(); sys.exit(7)"
    done = mpirun(["-m", "mpiddp", "run", "-np", "2", sys.executable, "-c", code], 0, expect=7)
    assert done.stdout.count("one of 2") == 2 and "mpirun" in done.stderr.splitlines()[0], done
