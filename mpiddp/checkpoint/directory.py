"""A directory of checkpoints on disk: written whole or not at all, checked before they are read. No MPI.

A checkpoint is a directory ``step-00000120`` with its files and ``manifest.json``, which lists them with their sizes
and checksums. It is written under another name and renamed when everything in it is on disk, so that a crash at any
moment leaves either the old checkpoints or the old ones and the new one. A step that is saved a second time becomes
``step-00000120.1``: the first is not touched before the second is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError
from ..log import logger

__all__ = ["Damaged", "Directory", "Draft", "Stored", "checked_file", "fsync_directory", "write_file"]

_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?$")
_DRAFT = re.compile(r"\.step-\d+\.draft-[0-9a-f]+$")
_MANIFEST = "manifest.json"
_FORMAT = 1
_READ_NBYTES = 1 << 20

_MISSING = (FileNotFoundError, NotADirectoryError)

#: A file's size in bytes and its CRC-32.
Sum = tuple[int, int]


class Damaged(CheckpointError):
    """A checkpoint that is not what was written, and never will be again."""


@dataclass(frozen=True, order=True)
class Stored:
    """A checkpoint in a directory, good or not; the latest is the greatest."""

    step: int
    attempt: int
    path: Path

    def manifest(self) -> dict[str, Any]:
        """What it says of itself. Raises what :meth:`check` does."""
        try:
            found = json.loads((self.path / _MANIFEST).read_text())
            if (number := int(found["format"])) > _FORMAT:  # what else is in it, nobody knows
                raise CheckpointError(f"{self.path} has format {number}, and this version reads up to {_FORMAT}")
            files = {str(name): (int(nbytes), int(crc)) for name, (nbytes, crc) in found["files"].items()}
            return {"files": files, "size": int(found["size"])}
        except (*_MISSING, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"its {_MANIFEST} cannot be read ({type(error).__name__}: {error})") from error

    def check(self) -> None:
        """Read every file once; raise :class:`Damaged` where one is missing, short, or has another checksum.

        What may be whole, and cannot be read now or by this version, is no damage: OSError, CheckpointError.
        """
        for name, (nbytes, crc) in self.manifest()["files"].items():
            try:
                found = checked_file(self.path / name)
            except _MISSING as error:
                raise Damaged(f"{name} cannot be read ({error})") from error
            if found[0] != nbytes:
                raise Damaged(f"{name} has {found[0]} bytes in place of {nbytes}")
            if found[1] != crc:
                raise Damaged(f"{name} has checksum {found[1]:08x} in place of {crc:08x}")


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written."""

    directory: Directory
    step: int
    path: Path

    def commit(self, files: Mapping[str, Sum], size: int) -> Path:
        """Make it a checkpoint of ``files`` (names relative to ``path``), written by ``size`` ranks; return its path.

        Each file must be on disk already (:func:`write_file`). Raises CheckpointError where one is not seen here.
        """
        for name, (nbytes, _) in files.items():
            seen = (self.path / name).stat().st_size if (self.path / name).exists() else None
            if seen != nbytes:
                raise CheckpointError(
                    f"{name} should have {nbytes} bytes and {'is not there' if seen is None else f'has {seen}'} as "
                    "rank 0 sees it: the directory must lie on a file system that all ranks share"
                )
        manifest = {"format": _FORMAT, "step": self.step, "size": size, "files": files}
        write_file(self.path / _MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        for folder in {(self.path / name).parent for name in files} | {self.path}:
            fsync_directory(folder)
        final = self.directory.free_name(self.step)
        self.path.rename(final)
        fsync_directory(self.directory.path)
        return final

    def discard(self) -> None:
        """Take it away: it failed."""
        shutil.rmtree(self.path, ignore_errors=True)


class Directory:
    """State: ``_refused``, the names of checkpoints that were found damaged: each is reported once, and goes first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._refused: set[str] = set()

    def stored(self) -> list[Stored]:
        """All that are there, good or not, the latest last."""
        try:
            names = [path.name for path in self.path.iterdir()]
        except FileNotFoundError:
            return []
        matches = [match for name in names if (match := _NAME.match(name))]
        return sorted(Stored(int(m[1]), int(m[2] or 0), self.path / m[0]) for m in matches)

    def latest(self) -> Stored | None:
        """The latest that is whole; the damaged ones before it are passed over, with a warning each. Reads it once.

        None where there are none. Raises CheckpointError where all are damaged, or one may be whole and is unreadable.
        """
        everything = self.stored()
        for stored in reversed(everything):
            try:
                stored.check()
            except Damaged as error:
                if not self.is_refused(stored):
                    self._refused.add(stored.path.name)
                    logger.warning("the checkpoint %s is passed over: %s", stored.path, error)
                continue
            except OSError as error:
                raise CheckpointError(
                    f"{stored.path} cannot be read, though it may be whole ({error}): try again, or move it away"
                ) from error
            return stored
        if everything:
            raise CheckpointError(f"all that are there are damaged ({len(everything)}): to begin anew, remove them")
        return None

    def is_refused(self, stored: Stored) -> bool:
        """Whether :meth:`latest` has found it damaged."""
        return stored.path.name in self._refused

    def begin(self, step: int) -> Draft:
        """A new, empty draft."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f".step-{step:08d}.draft-{uuid.uuid4().hex[:12]}"
        path.mkdir()
        return Draft(self, step, path)

    def free_name(self, step: int) -> Path:
        """What a checkpoint of ``step`` is to be called."""
        attempts = [stored.attempt for stored in self.stored() if stored.step == step]
        return self.path / f"step-{step:08d}{f'.{max(attempts) + 1}' if attempts else ''}"

    def prune(self, keep: int, newest: Path) -> None:
        """Take away all but the ``keep`` latest; never ``newest``, which has just been written and counts.

        A good one goes only when none is left that was found damaged.
        """
        others = [stored for stored in self.stored() if stored.path != newest]
        others.sort(key=lambda stored: (not self.is_refused(stored), stored))
        for stored in others[: max(0, len(others) - (keep - 1))]:
            # Renamed first: what is half removed must not pass for a damaged checkpoint.
            doomed = self.path / f".{stored.path.name.partition('.')[0]}.draft-{uuid.uuid4().hex[:12]}"
            try:
                stored.path.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:  # the new one is written all the same
                logger.warning("the old checkpoint %s could not be removed: %s", stored.path, error)

    def clean(self) -> None:
        """Take away the drafts that a crash has left. Only where nobody else writes to this directory."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.path.iterdir():
                if _DRAFT.match(path.name):
                    shutil.rmtree(path, ignore_errors=True)


class _Summed:
    """A binary file that is written from its beginning to its end, with the checksum of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.nbytes = self.crc = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.nbytes += (length := memoryview(data).nbytes)
        return length

    def flush(self) -> None:
        self._file.flush()


def write_file(path: Path, write: Callable[[Any], object]) -> Sum:
    """Let ``write(file)`` fill a new file and wait until it is on disk; return its size and checksum."""
    with path.open("xb") as file:
        summed = _Summed(file)
        write(summed)
        file.flush()
        os.fsync(file.fileno())
    return summed.nbytes, summed.crc


def checked_file(path: Path) -> Sum:
    """The size and the checksum of a file."""
    nbytes = crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_NBYTES):
            nbytes, crc = nbytes + len(block), zlib.crc32(block, crc)
    return nbytes, crc


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
