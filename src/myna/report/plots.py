"""loss.png: the training loss of every step, its trend, and the held-out loss.

Owns one picture. Reads events only.
"""

import io
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from myna.report.curves import trend
from myna.run_dir import write_file

INK = "#1f4e79"
HELD_OUT = "#c0392b"


def plot_loss(events: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw the loss curve into `path` (PNG); epochs are marked by thin vertical lines.

    Raises StorageError where it cannot be written.
    """
    events = list(events)
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "eval"]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    losses = [(event["step"], event["loss"]) for event in steps]
    axes.plot(*_columns(losses), color=INK, alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(*_columns(trend(losses)), color=INK, linewidth=1.8, label="trend")
    if evaluations:
        axes.plot(
            [event["step"] for event in evaluations],
            [event["loss"] for event in evaluations],
            color=HELD_OUT,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label="held-out rows",
        )
    for earlier, later in pairwise(steps):
        if int(later["epoch"]) > int(earlier["epoch"]) and later is not steps[-1]:
            axes.axvline(later["step"], color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_file(path, picture.getvalue())


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
