"""Begins and ends timelines, and brings what all ranks have recorded into one file.

Rank 0 writes the file. When it begins or ends a timeline it tells the others, so that a call on rank 0 alone is
enough; where all ranks call, each begins and ends at its own call. A rank that has ended asks for rank 0's time and
then hands over its part, piece by piece, a piece for each answer. All of it travels with the negotiation's messages,
in whatever push comes next: nobody ever waits for a rank, apart from rank 0 at the end, within a bound.

State: touched by the thread that calls and, under the engine's lock, by pushes; each step replaces one attribute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .. import trace
from ..engine import Channel, Engine
from ..engine.wire import NEWS
from ..errors import ArgumentError
from ..log import logger
from .chrome import Chrome
from .clock import Clock
from .recorder import Recorder

__all__ = ["Timeline"]

#: A piece of a part on its way: large enough to be quick, small enough to be sent at once.
_PIECE_NBYTES = 128 << 10


class Timeline:
    """One for each rank, over the channel of all ranks. ``bound_s``: so long rank 0 waits for a silent rank."""

    def __init__(self, engine: Engine, channel: Channel, host: str, bound_s: float) -> None:
        self._engine, self._channel, self._host, self._bound_s = engine, channel, host, bound_s
        self._rank, self._size = channel.link.rank, channel.link.size
        self._begun = self._called = self._ended = 0  # timelines so far: begun, called for here, ended
        self._recorder: Recorder | None = None
        self._mark_cycles = False
        self._path = ""
        # On rank 0.
        self._file: IO[bytes] | None = None
        self._came: set[int] = set()
        self._heard_s = 0.0
        # On the others.
        self._clock = Clock()
        self._kept: Recorder | None = None  # what has been recorded and not handed over
        self._kept_path = ""
        self._pieces: Iterator[bytes] | None = None
        news = channel.news
        news["timeline begins"], news["timeline ends"] = self._begins, self._ends
        news["timeline time"], news["timeline next"] = self._time_came, self._next_piece
        if channel.coordinator is not None:
            channel.coordinator.news["timeline ask"] = self._asked
            channel.coordinator.news["timeline piece"] = self._piece_came

    # -- the calls -----------------------------------------------------------------------------------------------------

    def start(self, path: str, mark_cycles: bool = False) -> None:
        """Begin to record on this rank; on rank 0 create the file and tell the others to begin."""
        if self._called == self._begun and self._recorder is not None:
            raise ArgumentError(f"a timeline is being recorded already, to {self._path}: call stop_timeline() first")
        if self._rank == 0:
            self._file = Path(path).open("wb")  # noqa: SIM115
            self._write(_HEAD)
            self._came = {0}
            self._channel.tell_coordinator(NEWS, "timeline begins", self._begun + 1, path, mark_cycles)
        self._called += 1
        self._engine.alone(lambda: self._begins(self._called, path, mark_cycles))

    def stop(self) -> None:
        """End it. On rank 0: wait for the others' parts, each as long as it keeps coming, and finish the file."""
        if self._recorder is None:
            return
        number = self._begun
        if self._rank == 0:
            self._channel.tell_coordinator(NEWS, "timeline ends", number)
        self._engine.alone(lambda: self._ends(number))
        if self._rank == 0:
            self._collect()

    def finish(self) -> None:
        """Before this rank shuts down: end what is being recorded; what rank 0 does not take is left in a file."""
        self.stop()
        if self._kept is None:
            return
        self._heard_s = time.monotonic()
        self._engine.wait_until(lambda: self._kept is None or self._is_silent(), "the timeline's file")
        self._engine.alone(self._keep_to_myself)

    # -- on every rank -------------------------------------------------------------------------------------------------

    def _begins(self, number: int, path: str, mark_cycles: bool) -> None:
        if number <= self._begun:
            return
        self._begun, self._path, self._mark_cycles = number, path, mark_cycles
        self._recorder = Recorder()
        trace.add_sink(self._recorder)

    def _ends(self, number: int) -> None:
        recorder = self._recorder
        if number <= self._ended or recorder is None:
            return
        self._ended, self._recorder = number, None
        self._called = max(self._called, number)
        trace.remove_sink(recorder)
        if self._rank == 0:
            for piece in self._format(recorder, Clock(error_ns=0)):
                self._write(piece)
            return
        self._keep_to_myself()  # what is left of the timeline before
        self._kept, self._kept_path, self._clock, self._pieces = recorder, self._path, Clock(), None
        self._channel.attention += 1
        self._ask()

    def _format(self, recorder: Recorder, clock: Clock) -> Iterator[bytes]:
        """The part of this rank in pieces of whole lines, each with the comma behind it."""
        chrome = Chrome(self._rank, self._size, self._host, clock.shift_ns, self._mark_cycles)
        known = f"clock within {clock.error_ns / 1000:.1f} us of rank 0's" if clock.error_ns >= 0 else "clock unknown"
        label = f'{{"name": "process_labels", "ph": "M", "pid": {self._rank}, "args": {{"labels": "{known}"}}}},\n'
        piece = [label.encode()]
        nbytes = 0
        for line in chrome.lines(recorder.replay(), time.monotonic_ns()):
            piece.append(line.encode() + b",\n")
            nbytes += len(piece[-1])
            if nbytes >= _PIECE_NBYTES:
                yield b"".join(piece)
                piece, nbytes = [], 0
        yield b"".join(piece)

    def _is_silent(self) -> bool:
        return time.monotonic() - self._heard_s > self._bound_s

    # -- on the ranks that hand over -----------------------------------------------------------------------------------

    def _ask(self) -> None:
        self._channel.tell_coordinator(NEWS, "timeline ask", time.monotonic_ns())

    def _time_came(self, asked_ns: int, there_ns: int) -> None:
        if self._kept is None:
            return
        self._heard_s = time.monotonic()
        self._clock.answer(asked_ns, there_ns, time.monotonic_ns())
        if not self._clock.is_known:
            self._ask()
        elif self._pieces is None:
            self._pieces = self._format(self._kept, self._clock)
            self._next_piece(self._ended, True)

    def _next_piece(self, number: int, is_taken: bool) -> None:
        """Rank 0 has taken the piece before; or it takes no more."""
        if self._pieces is None or number != self._ended or self._kept is None:
            return
        self._heard_s = time.monotonic()
        if not is_taken:
            self._keep_to_myself()
            return
        piece = next(self._pieces, b"")
        self._channel.tell_coordinator(NEWS, "timeline piece", self._ended, piece)
        if not piece:
            self._let_go()

    def _let_go(self) -> None:
        self._kept = self._pieces = None
        self._channel.attention -= 1

    def _keep_to_myself(self) -> None:
        """Nothing is lost if rank 0 does not take it."""
        if self._kept is None:
            return
        path = f"{self._kept_path}.rank{self._rank}"
        try:
            with Path(path).open("wb") as file:
                file.write(_HEAD)
                for piece in self._format(self._kept, self._clock):
                    file.write(piece)
                file.write(_tail(self._rank))
            logger.warning("rank 0 did not take this rank's part of the timeline: it is in %s", path)
        except OSError as error:
            logger.error("this rank's part of the timeline is lost: %s", error)
        self._let_go()

    # -- on rank 0 -----------------------------------------------------------------------------------------------------

    def _asked(self, member: int, asked_ns: int) -> None:
        coordinator = self._channel.coordinator
        assert coordinator is not None
        self._heard_s = time.monotonic()
        coordinator.tell(member, NEWS, "timeline time", asked_ns, time.monotonic_ns())

    def _piece_came(self, member: int, number: int, piece: bytes) -> None:
        coordinator = self._channel.coordinator
        assert coordinator is not None
        self._heard_s = time.monotonic()
        is_taken = self._file is not None and number == self._begun
        if is_taken and not piece:
            self._came.add(member)
            return
        self._write(piece if is_taken else b"")
        coordinator.tell(member, NEWS, "timeline next", number, is_taken)

    def _write(self, piece: bytes) -> None:
        """A full disk ends the timeline, not the training."""
        try:
            if self._file is not None:
                self._file.write(piece)
        except OSError as error:
            logger.error("the timeline in %s is incomplete: %s", self._path, error)
            self._file = None

    def _collect(self) -> None:
        coordinator = self._channel.coordinator
        assert coordinator is not None
        self._heard_s = time.monotonic()
        self._engine.alone(self._listen)

        def has_all() -> bool:
            return len(self._came | coordinator.left.keys()) == self._size or self._is_silent()

        try:
            self._engine.wait_until(has_all, "the other ranks' timelines")
        finally:
            self._engine.alone(self._close)
        missing = [rank for rank in range(self._size) if rank not in self._came]
        if missing:
            logger.warning(
                "the timeline in %s lacks rank %s: nothing came within %g s", self._path, ", ".join(map(str, missing)),
                self._bound_s,
            )  # fmt: skip

    def _listen(self) -> None:
        self._channel.attention += 1

    def _close(self) -> None:
        self._channel.attention -= 1
        self._write(_tail(0))
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __repr__(self) -> str:
        state = f"recording for {self._path}" if self._recorder else "handing over" if self._kept else "idle"
        return f"Timeline(rank {self._rank}, {state})"


_HEAD = b'{"displayTimeUnit": "ms", "traceEvents": [\n'


def _tail(rank: int) -> bytes:
    """The last event, which has no comma behind it."""
    return b'{"name": "process_sort_index", "ph": "M", "pid": %d, "args": {"sort_index": %d}}\n]}\n' % (rank, rank)
