"""Training that can be taken up again: state that is committed, restored and made equal on all ranks, and the loop.

::

    state = mpiddp.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0)

    @mpiddp.elastic.run
    def train(state):
        for state.epoch in range(state.epoch, epochs):
            for number, batch in enumerate(loader):
                ...
                state.sampler.record_batch(number, batch_size)
                state.commit()
            state.sampler.set_epoch(state.epoch + 1)

    train(state)
"""

from __future__ import annotations

from .base import ObjectState, State
from .hosts import HostsUpdatedInterrupt, HostUpdate
from .loop import run
from .sampler import ElasticSampler
from .state import TorchState

__all__ = ["ElasticSampler", "HostUpdate", "HostsUpdatedInterrupt", "ObjectState", "State", "TorchState", "run"]
