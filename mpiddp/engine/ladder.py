"""The ladder of waiting: so many pushes at once, then giving the core away between pushes, then short sleeps. Pure.

On one node what is waited for comes within the time in which a core is given away. Between hosts a segment may take
longer than that to arrive. Nothing is lost then by sleeping, as long as the sleeps are short beside the segment: MPI
moves bytes only when somebody pushes, and what comes meanwhile must fit the system's buffers. An all-reduce of 32 MiB
over 1 Gbit/s between 2 hosts took 3.1 s of CPU per GB while each piece was waited for anew by giving the core away for
1 ms and then sleeping for 0.2 ms at a time, and 0.9 with what is here, in the same time.
"""

from __future__ import annotations

__all__ = ["BETWEEN_HOSTS_S", "ON_A_NODE_S", "SPINS", "longest_sleep_s", "renewed_yield_s"]

#: So many pushes at once.
SPINS = 2

#: For so long the core is given away between pushes. Between hosts nothing is worth a core for longer: with 1 ms 4 KiB
#: between 4 hosts took a fifth longer where the processor is slow, with 5 ms 32 MiB a fifth more of it.
ON_A_NODE_S, BETWEEN_HOSTS_S = 0.02, 0.003

#: What comes later than this, after its waiting began, comes from a link that is slow beside a core.
_SLOW_S = 0.0015

#: The least that is left of giving the core away where the link is slow.
_LEAST_S = 0.00003

#: The longer somebody has waited, the longer he may sleep at a time: he hears of the end too late by at most this part
#: of his waiting. 1 ms are 125 KB at 1 Gbit/s. With 0.5 ms at the most 32 MiB took an eighth more of the CPU; with 2 ms
#: they took longer.
_SLEEP_S, _SLEEP_PART, _LONGEST_SLEEP_S = 0.0002, 1 / 64, 0.001


def renewed_yield_s(yield_s: float, idle_s: float, has_slept: bool) -> float:
    """For how long to give the core away the next time, after something moved that was waited for for ``idle_s``.

    A quarter of what it was where the link is slow, twice as long where no sleep was needed.
    """
    if not has_slept:
        return min(BETWEEN_HOSTS_S, 2 * yield_s)
    return max(_LEAST_S, yield_s / 4) if idle_s > _SLOW_S else yield_s


def longest_sleep_s(waited_s: float, is_between_hosts: bool) -> float:
    """How long somebody may sleep at a time who has waited for so long."""
    return min(_LONGEST_SLEEP_S, max(_SLEEP_S, waited_s * _SLEEP_PART)) if is_between_hosts else _SLEEP_S
