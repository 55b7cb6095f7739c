"""The all-reduce table as a picture: time and bus bandwidth over size. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .sizes import size_text
from .table import Row

__all__ = ["draw", "problem", "series"]


def problem() -> str | None:
    """Why nothing can be drawn, with the cure; None if it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib, which is not installed on rank 0: pip install 'mpiddp[plot]'"
    return None


def series(rows: Sequence[Row], value: str) -> dict[str, tuple[list[int], list[float]]]:
    """For each contender its sizes in bytes and what ``value`` is there; rows that lack it are left out."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row[value] is not None:
            sizes, values = found.setdefault(row["contender"], ([], []))
            sizes.append(row["size_bytes"])
            values.append(row[value])
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture to ``path``; its suffix says which kind: .png, .svg, .pdf."""
    import matplotlib  # type: ignore[import-not-found, import-untyped, unused-ignore]

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot  # type: ignore[import-not-found, import-untyped, unused-ignore]

    figure, (times, bandwidths) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axes, value, label in ((times, "time_us", "time, us"), (bandwidths, "busbw_GBs", "bus bandwidth, GB/s")):
        for name, (sizes, values) in series(rows, value).items():
            axes.plot(sizes, values, marker="o", markersize=3, label=name)
        _scale(axes, label, sorted({row["size_bytes"] for row in rows}))
    times.legend()
    if rows:
        figure.suptitle(f"all-reduce of {rows[0]['dtype']} over {rows[0]['ranks']} ranks")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _scale(axes: Any, label: str, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log" if label.startswith("time") else "linear")
    shown = sizes[:: max(1, len(sizes) // 7)]
    axes.set_xticks(shown, [size_text(size) for size in shown], rotation=30)
    axes.minorticks_off()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
