"""The fixture ``hosts``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fixtures import LAUNCHER, Mpirun
from tests.harness.job import Completed

from .hosts import Hosts, Unavailable

__all__ = ["HostsFactory", "hosts"]


class HostsFactory:
    """``hosts(2, rate_mbit=1000)`` makes some; ``hosts.run(some, what, ...)`` runs a job on them to its end."""

    def __init__(self, config: pytest.Config, directory: Path) -> None:
        self.opened = list[Hosts]()
        self._launcher, self._directory = config.stash[LAUNCHER], directory

    def __call__(self, count: int, rate_mbit: float | None = None, delay_us: float = 0) -> Hosts:
        """See :class:`Hosts`. Skips the test, with the reason, where it cannot be."""
        if self._launcher is None or self._launcher.flavour != "open mpi" or self._launcher.version < (5,):
            pytest.skip("jobs on several hosts are started by Open MPI 5's mpirun")
        try:
            self.opened.append(Hosts(count, rate_mbit, delay_us))
        except Unavailable as reason:
            pytest.skip(f"no hosts on this machine: {reason}")
        return self.opened[-1]

    def start(self, on: Hosts, what: Any, ranks_per_host: int = 1, **options: Any) -> Any:
        """Start a job: ``what`` as for the fixture ``mpirun``, ``options`` as of :meth:`Hosts.start`."""
        assert self._launcher is not None
        return on.start(self._launcher, Mpirun.program(what, self._directory), ranks_per_host, **options)

    def run(
        self, on: Hosts, what: Any, ranks_per_host: int = 1, *, timeout_s: float = 300,
        expect: int | str = 0, **options: Any,
    ) -> Completed:  # fmt: skip
        """:meth:`start`, and wait; ``expect`` is the exit code that it must have, or "failure" for any but 0."""
        completed: Completed = self.start(on, what, ranks_per_host, **options).wait(timeout_s)
        assert not completed.timed_out, f"not over within {timeout_s:g} s\n{completed}"
        assert (completed.rc != 0) if expect == "failure" else (completed.rc == expect), str(completed)
        return completed


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    """Several hosts on this machine, with jobs of the test's own; closed when the test ends."""
    factory = HostsFactory(request.config, tmp_path)
    yield factory
    for each in factory.opened:
        each.close()
