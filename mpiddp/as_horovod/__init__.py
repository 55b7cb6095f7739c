"""``python -m mpiddp.as_horovod train.py``: ``import horovod.torch`` gets mpiddp, in that run alone.

Nothing is installed or changed. Python is started again with one directory more on PYTHONPATH, whose
``sitecustomize`` answers imports of ``horovod``: so the script runs as it runs plainly, and its worker processes, which
import it anew, are answered too.
"""

from __future__ import annotations

__all__: list[str] = []
