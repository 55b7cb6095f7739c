"""Operations without a tensor: the barrier, and join for uneven data."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from threading import Thread

import torch

from .. import runtime
from ..engine import Engine, Kind, Lane
from ..errors import MpiddpError
from ..process_set import ProcessSet, global_process_set
from .submit import channel_of, submit, wait_for

__all__ = ["barrier", "join"]

#: The name of every join: a rank can be in one at a time.
_JOIN = "mpiddp.join"


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return on each member after every member has come here. Waits for the members of the set alone."""
    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
    wait_for(submit(channel_of(process_set), Kind.BARRIER, nothing, nothing, None, blocking=True))


def join(device: int = -1) -> int:
    """Say that this rank has no more data; return, when all have said so, the rank that said so last.

    Until then this rank contributes zeros to the sums and averages of the others (in every process set that it belongs
    to) and to their optimizers' gradients; an average still divides by the full size. Anything but a sum, an average or
    a barrier raises on the others while anyone has joined. If several ranks join at once the highest is the answer.

    The parameters of a rank that joined early are stale when this returns: broadcast them from the returned rank.
    Raises MpiddpError at once on a rank that has an optimizer with ``shard=True``.
    ``device`` is accepted for Horovod's sake; zeros are made where they are needed.
    """
    here = runtime.current()
    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
    channels = here.channels()
    lanes = [lane for channel in channels for lane in channel.lanes]
    if _refusal(lanes) is not None:
        gc.collect()  # an optimizer that nobody uses any more is no reason
    refusal = _refusal(lanes)
    if refusal is not None:
        raise MpiddpError(refusal)
    requests = [submit(channel, Kind.JOIN, nothing, nothing, _JOIN, extent=(channel.unnamed,)) for channel in channels]

    def is_over() -> bool:
        return all(request.done for request in requests) or any(request.error is not None for request in requests)

    if len(lanes) > 1:
        _serve_at_once(here.engine, lanes, is_over)
    else:
        _serve(here.engine, lanes, is_over)
    for request in requests:
        if request.error is not None:
            raise request.error
    return int(requests[0].result)


def _refusal(lanes: Sequence[Lane]) -> str | None:
    return next((why for lane in lanes if lane.refusal is not None and (why := lane.refusal())), None)


def _serve(engine: Engine, lanes: Sequence[Lane], is_over: Callable[[], bool]) -> None:
    """Until the join is over, take part with zeros in what others do in ``lanes``, in one after the other."""

    def is_needed() -> bool:
        return any(lane.cycle < lane.wanted_cycle for lane in lanes)

    while not is_over():
        engine.wait_until(lambda: is_over() or is_needed(), "the other ranks' join")
        for lane in lanes:
            lane.serve_joined()


def _serve_at_once(engine: Engine, lanes: Sequence[Lane], is_over: Callable[[], bool]) -> None:
    """Serve each lane in a thread of its own: a rank that is waited for in one may itself wait in another, as when two
    optimizers share a backward. Where MPI lets only this thread in, it pushes for all of them."""
    failed: list[Exception] = []

    def is_done() -> bool:
        return bool(failed) or is_over()

    def serve(lane: Lane) -> None:
        try:
            _serve(engine, [lane], is_done)
        except Exception as error:
            failed.append(error)

    threads = [Thread(target=serve, args=(lane,), name=f"mpiddp-{lane!r}", daemon=True) for lane in lanes]

    def is_served() -> bool:
        return bool(failed) or (is_over() and not any(thread.is_alive() for thread in threads))

    with engine.serving():
        for thread in threads:
            thread.start()
        engine.wait_until(is_served, "the other ranks' join")
    if failed:
        raise failed[0]
