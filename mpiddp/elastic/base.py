"""State that training can go back to: plain Python objects. Models and optimizers are in state.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ArgumentError
from ..functions import broadcast_object
from .hosts import HostNotices, HostsUpdatedInterrupt, HostUpdate
from .snapshot import keep, restored

__all__ = ["ObjectState", "State"]


class State:
    """What :func:`run` needs of a state. A subclass says how it is saved, restored and synchronised."""

    def __init__(self) -> None:
        self._host_notices = HostNotices()
        self._reset_callbacks: list[Callable[[], Any]] = []
        #: How often :meth:`commit` was called.
        self.commits = 0

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Call these, in this order, after each reset and before the state is synchronised: the world may have another
        size then, and the learning rate has to follow, say."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """The world has been made anew: forget notices about the old one, :meth:`reset`, and call the callbacks."""
        self._host_notices.drop()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float | None = None, update: int = HostUpdate.added) -> None:
        """Note that hosts have come or are to go. May be called on any rank and in any thread.

        The next :meth:`commit` or :meth:`check_host_updates` raises HostsUpdatedInterrupt on all ranks.
        """
        self._host_notices.tell(time.time() if timestamp is None else timestamp, HostUpdate(update))

    def commit(self) -> None:
        """Save, then :meth:`check_host_updates`. To be called on all ranks at the same point of training.

        It copies everything to host memory: often enough that little is lost, seldom enough that it costs little.
        """
        self.save()
        self.commits += 1
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raise HostsUpdatedInterrupt on all ranks if any of them has been told of a change. Collective."""
        update = self._host_notices.agree()
        if update:
            raise HostsUpdatedInterrupt(skip_sync=update == HostUpdate.removed)

    def save(self) -> None:
        """Keep the present values, for :meth:`restore`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is saved")

    def restore(self) -> None:
        """Go back to the values last saved."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is restored")

    def sync(self) -> None:
        """Take over the values of rank 0. Collective."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is synchronised")

    def reset(self) -> None:
        """Fit the state to a new world; nothing to do for most."""

    def settle(self, exchanging: bool) -> None:
        """After a failure, before :meth:`restore`: end what is half done. Called on all ranks together; ``exchanging``:
        some rank is not :meth:`is_settled`."""

    def is_settled(self) -> bool:
        """Whether nothing is half done on this rank."""
        return True


class ObjectState(State):
    """Plain Python objects: each keyword becomes an attribute of the state, to be read and set as one likes.

    ``state = ObjectState(epoch=0, losses=[])`` and then ``state.epoch += 1``. They are copied when they are saved, so
    that a restore undoes what was appended to a list since. They travel pickled, from rank 0. Copies of tensors lie in
    host memory; a restore puts them back on their devices.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self._check(attributes)
        self._names = list(attributes)
        for name, value in attributes.items():
            setattr(self, name, value)
        self._saved = self._copied()

    def save(self) -> None:
        """Keep copies of the attributes."""
        self._saved = self._copied()

    def restore(self) -> None:
        """Set the attributes to what was saved last."""
        for name, value in self._saved.items():
            setattr(self, name, restored(name, value))

    def sync(self) -> None:
        """Set the attributes to rank 0's, and save them."""
        if self._names:
            values = broadcast_object({name: getattr(self, name) for name in self._names}, 0, "elastic.objects")
            for name in self._names:
                setattr(self, name, values[name])
        self.save()

    def _check(self, names: Iterable[str]) -> None:
        taken = [name for name in names if name == "commits" or hasattr(type(self), name) or name.startswith("_")]
        if taken:
            raise ArgumentError(f"a {type(self).__name__} cannot have attributes called {', '.join(taken)}")

    def _copied(self) -> dict[str, Any]:
        return {name: keep(name, getattr(self, name)) for name in self._names}
