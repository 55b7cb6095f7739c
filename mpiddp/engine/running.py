"""An exchange under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import trace
from ..errors import CollectiveError
from ..transport.base import Link, Steps
from ..transport.nccl import NcclError
from .request import Handle

if TYPE_CHECKING:
    from .meet import Gathering

__all__ = ["Running", "beginning", "finishing"]


class Running:
    """The generator, and who waits for it; of a lane, the how-manieth launch it is, else its tag, if it has one."""

    __slots__ = ("gathering", "handles", "lane", "mark", "number", "steps")

    def __init__(
        self,
        handles: Sequence[Handle],
        steps: Steps,
        lane: int = -1,
        number: int = -1,
        gathering: Gathering | None = None,
    ) -> None:
        self.handles, self.steps, self.lane, self.number, self.gathering = handles, steps, lane, number, gathering
        self.mark: int | None = None  # what it yielded last: another value means that it moved

    @property
    def is_begun(self) -> bool:
        """Whether the members are known to take part; where they are to meet, some may be awaited still."""
        return self.gathering is None or self.gathering.meeting.is_met

    def resume(self) -> bool | None:
        """True if it has ended, None if it has moved, False if it waits. What it raises belongs to those who wait."""
        try:
            mark = next(self.steps)
        except StopIteration:
            pass
        except NcclError as error:
            for handle in self.handles:
                handle.fail(CollectiveError(f"{handle.name!r} failed: {error}"))
        except Exception as error:
            for handle in self.handles:
                handle.fail(error)
        else:
            if mark == self.mark:
                return False
            self.mark = mark
            return None
        if trace.active():
            trace.instant("done", name=self.handles[0].name, of=self.handles)
        return True


def beginning(build: Callable[[], Steps]) -> Steps:
    """What ``build`` makes, made when it is first resumed: what that raises, too, belongs to those who wait."""
    yield from build()


def finishing(start: Callable[[Link], Steps], link: Link, handle: Handle, result: Any) -> Steps:
    """The exchange that ``start`` makes, and then the handle is done."""
    with trace.span("exchange", name=handle.name, of=(handle,)):
        yield from start(link)
    handle.finish(result)
