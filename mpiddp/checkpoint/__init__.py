"""Checkpoints of a whole job, and leaving in good order when its time is up.

::

    checkpoints = mpiddp.checkpoint.Checkpoints("checkpoints", model=model, optimizer=optimizer, sampler=sampler)
    step = checkpoints.restore()  # 0 where there is nothing yet
    for epoch in range(sampler.next_epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            ...
            step += 1
            sampler.record(len(inputs))
            if checkpoints.preempted():
                checkpoints.leave(step)
            if step % 1000 == 0:
                checkpoints.save(step)
        sampler.finish_epoch()
"""

from __future__ import annotations

from .checkpoints import Checkpoints

__all__ = ["Checkpoints"]
