"""One rank fails, the job ends: MPI alone would leave the other ranks waiting for ever.

:func:`install` watches for what ends a Python process before its time: an uncaught exception, one in a thread of the
library, a non-zero exit code, Ctrl-C and SIGTERM. Each says which rank it was, and aborts the job. It acts in the
process that called it and in no child of that; in a world of one it leaves Python as it is.
"""

from __future__ import annotations

from .install import act_on_pending, install, pending, uninstall

__all__ = ["act_on_pending", "install", "pending", "uninstall"]
