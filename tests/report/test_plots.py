"""loss.png: drawn from events alone, for runs long, short and broken off."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from myna.report.plots import plot_loss


@pytest.mark.parametrize("steps", [0, 1, 2, 300])
def test_a_picture_for_any_number_of_steps(tmp_path: Path, steps: int) -> None:
    events = [
        {"event": "step", "step": step, "loss": 4 / step, "epoch": step / 100}
        for step in range(1, steps + 1)
    ]
    events += [{"event": "eval", "step": step, "loss": 3.0} for step in range(100, steps + 1, 100)]
    plot_loss(events, tmp_path / "loss.png")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (675, 1200)
    assert picture[..., :3].min() < 0.3  # something is drawn


def test_the_same_events_give_the_same_bytes(tmp_path: Path) -> None:
    events = [{"event": "step", "step": 1, "loss": 1.0, "epoch": 1.0}]
    for name in ("a.png", "b.png"):
        plot_loss(events, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
