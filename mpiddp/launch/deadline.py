"""A bound on the first words between ranks: where MPI has chosen a wrong interface, they would wait for ever in it.

A call into MPI cannot be interrupted, so a thread of its own says what is wrong, and ends the job.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from ..log import logger
from .interfaces import Interface, interfaces, suspects

__all__ = ["first_words", "name_network", "unreached"]


@contextlib.contextmanager
def first_words(timeout_s: float, who: str, end_job: Callable[[], object] | None, library: str = "") -> Iterator[None]:
    """Log why, and call ``end_job``, if the block takes longer than ``timeout_s`` (0: never).

    ``end_job`` is None where the others may come much later, since MPI was started before: then it is only a warning.
    ``library`` is what MPI calls itself.
    """

    def over() -> None:
        text = unreached(who, timeout_s, interfaces(), library)
        if end_job is None:
            logger.warning("%s, or they have not called init() yet", text)
        else:
            logger.critical("%s", text)
            end_job()

    timer = threading.Timer(timeout_s, over)
    timer.daemon = True
    if timeout_s > 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def unreached(who: str, timeout_s: float, found: list[Interface], library: str) -> str:
    """What to tell the user: the interfaces, which of them is likely to be the wrong one, and what to do."""
    usable = [each for each in found if not each.is_loopback]
    wrong = suspects(usable)
    right = [each for each in usable if each not in wrong] or usable
    said = (
        f"{who}: no answer from the other ranks within {timeout_s:g} s. This host has the interfaces "
        f"{', '.join(map(str, usable)) or 'lo alone'}. "
    )
    if wrong:
        said += f"{' and '.join(map(str, wrong))} may be the wrong one: other hosts may have the same address. "
    name = ",".join(each.name for each in right) or "eth0"
    return said + (
        f"Name what joins the hosts, {name_network(library, name)}. A firewall between the hosts looks the same. "
        "MPIDDP_INIT_TIMEOUT_S sets this limit; 0: none"
    )


def name_network(library: str, name: str) -> str:
    """How the MPI that calls itself ``library`` is told of the interfaces ``name``; an unknown one may be Open MPI."""
    if not library or "open mpi" in library.lower():
        return (
            f"such as `mpirun --mca btl_tcp_if_include {name} ...` (or a network, 10.0.0.0/8), or "
            "OMPI_MCA_btl_tcp_if_include in every rank's environment"
        )
    first = name.split(",")[0]
    return (
        f"such as `mpiexec -iface {first} -genv FI_TCP_IFACE {first} ...`, or for an MPI over UCX "
        f"UCX_NET_DEVICES={first} in every rank's environment"
    )
