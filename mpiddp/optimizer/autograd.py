"""When a backward ends.

Autograd calls back at the end of a graph task. A reentrant checkpoint runs a backward inside a node of the outer one:
a graph task of its own, at whose end the outer one goes on. So the callback of a task that ended inside a node asks
the nodes that come next to queue one at the end of the outer task.

Several may watch one backward, such as the optimizers of two models that make one loss. The first whose turn comes
lets all of them begin what is to be done, before any waits for other ranks: those may have reached fewer of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BackwardEnd"]


class BackwardEnd:
    """Calls ``ending()`` and then ``ended()``, each once, when the outermost backward that :meth:`watch` was called in
    has ended; between them, ``ending()`` of all that watched it."""

    def __init__(self, ending: Callable[[], None], ended: Callable[[], None]) -> None:
        self._ending, self._ended = ending, ended
        self._watched: set[int] = set()
        self._has_begun = False  # ending() was called, ended() was not
        _everyone.add(self)

    def watch(self) -> None:
        """To be called from a hook, in any graph task."""
        task = torch._C._current_graph_task_id()
        if task not in self._watched and task != -1:
            self._watched.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._task_ended(task))

    def _task_ended(self, task: int) -> None:
        if task not in self._watched:
            return  # forgotten meanwhile
        outer = torch._C._current_autograd_node()
        if outer is None:
            self._begin_all(task)
            self.forget()
            self._ended()
            return
        self._watched.discard(task)
        for following, _ in outer.next_functions:
            if following is not None:
                self._watch_from(following)

    def _begin_all(self, task: int) -> None:
        for end in [each for each in _everyone if task in each._watched and not each._has_begun]:
            end._has_begun = True
            end._ending()

    def _watch_from(self, node: Any) -> None:
        handles: list[Any] = []

        def run(_: Any) -> None:
            handles.pop().remove()
            self.watch()

        handles.append(node.register_prehook(run))

    def forget(self) -> None:
        """Whatever is under way, call nobody back."""
        self._watched.clear()
        self._has_begun = False


_everyone: weakref.WeakSet[BackwardEnd] = weakref.WeakSet()
