"""Seeing that the interpreter is about to exit, and with which code.

Neither atexit nor sys.excepthook learns of it: SystemExit is dealt with in C, and sys.exit() may be caught by the
script, so that the call itself says nothing. But when a SystemExit has left the last frame, the interpreter asks it
for its ``code``, and that is the only time that ``code`` is read while no Python frame is running. So
``SystemExit.code`` is watched: the class stays the same object, whoever reads or sets the attribute gets what was
always there, and one read, the interpreter's own, is noticed. It covers ``raise SystemExit(3)``, ``exit()``,
argparse, and subclasses, and nothing that is caught.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["exit_status", "unwatch", "watch"]


class _WatchedCode:
    """The original descriptor of ``SystemExit.code``, and a call when the interpreter reads it."""

    def __init__(self, original: Any, on_exit: Callable[[object], None]) -> None:
        self.original, self.on_exit = original, on_exit

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.original
        value = self.original.__get__(instance, owner)
        try:
            sys._getframe(1)
        except ValueError:  # no caller: it is the interpreter
            self.on_exit(value)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        self.original.__set__(instance, value)

    def __delete__(self, instance: Any) -> None:
        self.original.__delete__(instance)


def watch(on_exit: Callable[[object], None]) -> bool:
    """Call ``on_exit(code)`` when the interpreter exits by SystemExit; False where this Python does not let us."""
    if sys.implementation.name != "cpython" or isinstance(_namespace().get("code"), _WatchedCode):
        return False
    _replace(_WatchedCode(_namespace()["code"], on_exit))
    if sys.version_info < (3, 12):
        # Before 3.12 an exception raised in C, as by sys.exit, becomes an object only when somebody catches it.
        sys.exit = _exit
    return True


def unwatch() -> None:
    """Undo :func:`watch`."""
    current = _namespace().get("code")
    if isinstance(current, _WatchedCode):
        _replace(current.original)
    if sys.exit is _exit:
        sys.exit = _original_exit


def _namespace() -> dict[str, Any]:
    """The dictionary behind the read-only view ``SystemExit.__dict__``."""
    return next(d for d in gc.get_referents(SystemExit.__dict__) if isinstance(d, dict))


def _replace(descriptor: Any) -> None:
    _namespace()["code"] = descriptor
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))  # the interpreter caches attributes of classes


_original_exit = sys.exit


def _exit(status: object = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status)."""
    raise SystemExit(*status) if isinstance(status, tuple) else SystemExit(status)


def exit_status(code: object) -> int:
    """What the operating system will be told, 0-255: of None, a number, or anything else (which is printed)."""
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1
