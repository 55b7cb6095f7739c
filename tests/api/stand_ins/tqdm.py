"""As much of tqdm as scripts need in order to run."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class tqdm:  # noqa: N801 - its name
    def __init__(self, total: int, desc: str, disable: bool = False) -> None:
        self.total, self.desc, self.disable, self.done = total, desc, disable, 0
        self.postfix: dict[str, Any] = {}

    def __enter__(self) -> tqdm:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.disable:
            print(f"{self.desc}: {self.done}/{self.total} {self.postfix}", flush=True)

    def set_postfix(self, postfix: dict[str, Any]) -> None:
        self.postfix = postfix

    def update(self, number: int) -> None:
        self.done += number
