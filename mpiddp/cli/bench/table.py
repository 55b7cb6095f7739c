"""Rows of results: as aligned text on the terminal while they come, and as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .place import say

__all__ = ["Column", "Report", "Row", "head", "line", "number"]

#: One line of a table by the columns' names; None is a value that does not exist, such as the ratio to nobody.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """``name`` is the CSV file's, ``title`` stands above the column of ``width``; ``text`` formats a value."""

    name: str
    title: str
    width: int
    text: Callable[[Any], str] = str
    is_left: bool = False

    def cell(self, value: Any) -> str:
        """The value, or a dash, to the right unless the column is a left one."""
        shown = "-" if value is None else self.text(value)
        return shown.ljust(self.width) if self.is_left else shown.rjust(self.width)


def number(digits: int) -> Callable[[Any], str]:
    """A formatter: so many digits behind the point."""
    return lambda value: f"{value:.{digits}f}"


def head(columns: Sequence[Column]) -> str:
    """The line of titles."""
    titles = [c.title.ljust(c.width) if c.is_left else c.title.rjust(c.width) for c in columns]
    return "  ".join(titles).rstrip()


def line(columns: Sequence[Column], row: Row) -> str:
    """One row."""
    return "  ".join(column.cell(row[column.name]) for column in columns).rstrip()


class Report:
    """Says each row as it comes, keeps it, and writes it to the CSV file at ``path``, if any; files are rank 0's.

    The file is opened at once, so that a path that cannot be written is known before anything is measured.
    """

    def __init__(self, columns: Sequence[Column], path: Path | None, is_writer: bool) -> None:
        self.columns, self.rows = tuple(columns), list[Row]()
        try:
            self._file: IO[str] | None = path.open("w", newline="") if path and is_writer else None
        except OSError as error:
            raise SystemExit(f"mpiddp: error: --csv {path} cannot be written: {error.strerror}") from None
        self._writer = csv.DictWriter(self._file, [c.name for c in columns]) if self._file else None

    def __enter__(self) -> Report:
        if self._writer:
            self._writer.writeheader()
        say(head(self.columns))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def add(self, row: Row) -> None:
        """Take one row."""
        self.rows.append(row)
        say(line(self.columns, row))
        if self._writer and self._file:
            self._writer.writerow({name: "" if value is None else value for name, value in row.items()})
            self._file.flush()

    def __repr__(self) -> str:
        return f"Report({len(self.rows)} rows of {len(self.columns)} columns)"
