"""``mpiddp doctor``: what a job on these ranks finds here, what is wrong with it, and what to do.

examine.py collects the facts on every rank (machine.py, measure.py); the checks are functions from facts to findings
and ask nothing of anybody; report.py writes. So a check is tested with facts that were recorded elsewhere.
"""

from __future__ import annotations

from .arguments import COMMAND

__all__ = ["COMMAND"]
