"""The picture of the reference job: bars of speed and memory from the results file.

Owns the drawing only; every number in it is one of `results/reference_job.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LABELS = {
    "tutorial": "tutorial's recipe\n(float32)",
    "peft": "transformers + peft\nat its best",
    "trl": "trl\nat its best",
    "liger": "peft + Liger",
    "unsloth": "Unsloth",
    "myna": "myna",
    "myna_compiled": "myna, compiled",
}
PEERS, OURS = "#a9b4c2", "#2a6f5e"


def draw(results: Path, target: Path, workload: str = "A", device: str = "cpu") -> None:
    """Samples per second of each league, and peak memory, as horizontal bars with their numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stored = json.loads(results.read_text())
    leagues = {
        key: league
        for key, league in stored.items()
        if key.startswith(f"{workload}, ") and league["device"] == device
    }
    if not leagues:
        raise SystemExit(f"{results}: nothing measured for workload {workload} on {device}")
    first = next(iter(leagues.values()))
    panels = [
        (f"rows per second, dropout {league['dropout']:g}", _bars(league, _samples), "{:.1f}")
        for league in leagues.values()
    ]
    panels.append(("peak memory, GB", _bars(first, _gigabytes), "{:.1f}"))
    named = panels[0][1].keys()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 0.72 * len(panels[0][1]) + 1.5), squeeze=False
    )
    for number, (axis, (title, bars, text)) in enumerate(zip(axes[0], panels, strict=True)):
        names = list(bars)[::-1]
        drawn = axis.barh(
            [LABELS[name] for name in names],
            [bars[name] for name in names],
            color=[OURS if name.startswith("myna") else PEERS for name in names],
            height=0.68,
        )
        axis.bar_label(drawn, [text.format(bars[name]) for name in names], padding=4, fontsize=11)
        axis.set_title(title, fontsize=12, loc="left")
        axis.set_xlim(0, 1.18 * max(bars.values()))
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(
            left=False,
            bottom=False,
            labelbottom=False,
            labelleft=number == 0 or bars.keys() != named,
        )
    figure.text(0.01, 0.02, _caption(first), fontsize=8.5, color="#555555", linespacing=1.4)
    figure.tight_layout(rect=(0, 0.11, 1, 1), w_pad=2)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _bars(league: Mapping[str, Any], value: Any) -> dict[str, float]:
    return {name: value(entry) for name, entry in league["contenders"].items()}


def _samples(entry: Mapping[str, Any]) -> float:
    return float(entry["samples_per_second"])


def _gigabytes(entry: Mapping[str, Any]) -> float:
    return float(entry["peak_bytes"]) / 1e9


def _caption(league: Mapping[str, Any]) -> str:
    shape, hardware = league["shape"], league["hardware"]
    place = league["device"]
    if place == "cpu":
        place = f"{league['threads']} threads on a CPU ({hardware['processor']})"
    return (
        f"{league['title']}; the same rows in each step, losses and first adapter.\n"
        f"{shape['model_type']} of hidden size {shape['hidden']}, {shape['layers']} layers, LoRA "
        f"of rank {shape['rank']}; {place}; medians of {league['rounds']} interleaved rounds."
    )
