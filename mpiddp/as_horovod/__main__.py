"""The command: ``python [options] -m mpiddp.as_horovod script.py args...``, or ``... -m module args...``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import config

__all__ = ["command", "main", "search_path"]

_USAGE = """\
usage: python -m mpiddp.as_horovod script.py [arguments of the script]
       python -m mpiddp.as_horovod -m module [arguments of the module]

Runs a script or a module as Python does, where `import horovod.torch` gets mpiddp, in that run and its child
processes alone. On several ranks: mpirun -n 4 python -m mpiddp.as_horovod script.py
"""

_NAME = "mpiddp.as_horovod"

#: It holds a sitecustomize.py, which Python runs when it starts.
_STARTUP = Path(__file__).resolve().parent / "startup"


def main(arguments: Sequence[str]) -> int:
    """Become the Python that runs the script; returns an exit code only if that cannot be."""
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(_USAGE)
        return 0 if arguments else 2
    if arguments[0].startswith("-") and arguments[0] not in ("-m", "-c", "-"):
        sys.stderr.write(f"{_NAME}: unknown option {arguments[0]}: Python's own go before -m {_NAME}\n{_USAGE}")
        return 2
    if sys.flags.ignore_environment or sys.flags.no_site:
        sys.stderr.write(f"{_NAME} works through PYTHONPATH and sitecustomize: start Python without -I, -E and -S\n")
        return 2
    config.export({"PYTHONPATH": search_path(config.environ().get("PYTHONPATH", ""))})
    program = command(sys.executable, sys.orig_argv, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return os.execv(program[0], program)


def search_path(present: str) -> str:
    """PYTHONPATH with our directory in front."""
    others = [part for part in present.split(os.pathsep) if part and part != str(_STARTUP)]
    return os.pathsep.join([str(_STARTUP), *others])


def command(executable: str, original: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The command line without us: ``python -u -m mpiddp.as_horovod train.py`` as ``python -u train.py``.

    Whatever stands before ``-m`` stays, such as ``-m coverage run``.
    """
    before = list(original[1 : len(original) - len(arguments)])
    if before and before[-1].endswith(f"m{_NAME}"):  # -mNAME
        before[-1:] = [before[-1].removesuffix(_NAME), _NAME]
    if len(before) < 2 or before[-1] != _NAME or not before[-2].endswith("m"):
        return [executable, *arguments]
    flags = before[-2].removesuffix("m")  # what is left of -um is -u
    return [executable, *before[:-2], *([flags] if flags != "-" else []), *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
