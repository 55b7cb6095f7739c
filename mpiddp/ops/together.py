"""Operations without a tensor: the barrier, and join for uneven data."""

from __future__ import annotations

import torch

from .. import runtime
from ..engine import Kind
from ..process_set import ProcessSet, global_process_set
from .submit import channel_of, submit, wait_for

__all__ = ["barrier", "join"]

#: The name of every join: a rank can be in one at a time.
_JOIN = "mpiddp.join"


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return on each member after every member has come here. Waits for the members of the set alone."""
    nothing = torch.empty(0, dtype=torch.uint8)
    wait_for(submit(channel_of(process_set), Kind.BARRIER, nothing, nothing, None, blocking=True))


def join(device: int = -1) -> int:
    """Say that this rank has no more data; return, when all have said so, the rank that said so last.

    Until then this rank contributes zeros to the sums and averages of the others (in every process set that it belongs
    to) and to their optimizers' gradients; an average still divides by the full size. Anything but a sum, an average or
    a barrier raises on the others while anyone has joined. If several ranks join at once the highest is the answer.

    The parameters of a rank that joined early are stale when this returns: broadcast them from the returned rank.
    ``device`` is accepted for Horovod's sake; zeros are made where they are needed.
    """
    here = runtime.current()
    nothing = torch.empty(0, dtype=torch.uint8)
    channels = here.channels()
    requests = [submit(channel, Kind.JOIN, nothing, nothing, _JOIN, extent=(channel.unnamed,)) for channel in channels]

    def is_over() -> bool:
        return all(request.done for request in requests) or any(request.error is not None for request in requests)

    def is_needed() -> bool:
        return any(lane.cycle < lane.wanted_cycle for channel in channels for lane in channel.lanes)

    while not is_over():
        here.engine.wait_until(lambda: is_over() or is_needed(), "the other ranks' join")
        for channel in channels:
            for lane in channel.lanes:
                lane.serve_joined()
    for request in requests:
        if request.error is not None:
            raise request.error
    return int(requests[0].result)
