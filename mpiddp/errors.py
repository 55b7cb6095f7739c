"""Every exception that mpiddp raises on purpose.

::

    RuntimeError
    +-- MpiddpError
        +-- NotInitializedError   (also a ValueError)  a call that needs init()
        +-- ConfigError           (also a ValueError)  an unusable setting
        +-- ArgumentError         (also a ValueError)  an argument that cannot be used
        +-- CheckpointError       a checkpoint that could not be written or read
        +-- LaunchError           the launcher and MPI disagree about the job
        +-- WorkerProcessError    a collective in a child process of a rank
        +-- DuplicateNameError    (also a ValueError)  one name twice in flight
        +-- CollectiveError       a collective that failed (HorovodInternalError)
            +-- MismatchError     the ranks asked for different things
            +-- RankLeftError     a rank that is needed has ended or shut down
            +-- StallError        a rank that is needed did not come in time
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "DuplicateNameError",
    "LaunchError",
    "MismatchError",
    "MpiddpError",
    "NotInitializedError",
    "RankLeftError",
    "StallError",
    "WorkerProcessError",
]


class MpiddpError(RuntimeError):
    """The root of the tree."""


class NotInitializedError(MpiddpError, ValueError):
    """A call that needs ``mpiddp.init()`` came before it, or after ``mpiddp.shutdown()``."""


class ConfigError(MpiddpError, ValueError):
    """A setting is unknown, malformed or contradicts another one."""


class ArgumentError(MpiddpError, ValueError):
    """An argument that cannot be used, found on this rank before anything was sent."""


class CheckpointError(MpiddpError):
    """A checkpoint could not be written or read; raised on every rank, and no other checkpoint was touched."""


class LaunchError(MpiddpError):
    """The launcher started N ranks and MPI knows of another number."""


class WorkerProcessError(MpiddpError):
    """A collective was called in a child process of a rank, such as a DataLoader worker."""


class DuplicateNameError(MpiddpError, ValueError):
    """A name was submitted again while it was still in flight on this rank; nothing was sent."""


class CollectiveError(MpiddpError):
    """A collective failed. Horovod's name for it is ``HorovodInternalError``."""


class MismatchError(CollectiveError):
    """The ranks submitted one name with different shapes, dtypes, ops, roots or kinds."""


class RankLeftError(CollectiveError):
    """A rank that others wait for has ended or shut down."""


class StallError(CollectiveError):
    """A rank that others wait for did not come within the time that was set."""
