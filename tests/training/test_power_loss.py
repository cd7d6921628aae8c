"""A power cut at any moment of a save loses no checkpoint that was told to be written.

`benchmarks/power_loss.py` records what a save does and makes the states that a cut may leave;
`benchmarks/reliability.py` does the same with a whole run.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hurt_runs import lost_by
from myna import run_dir
from myna.training.checkpoint import Best, State, save_best, save_checkpoint
from power_loss import Recording, power_cuts, recorded


def save(root: Path, step: int) -> None:
    tensors = {"a": torch.full((3,), float(step))}
    save_best(root / "checkpoints", Best(step, 1.0, tensors))
    state = State(step, best_step=step)
    save_checkpoint(root / "checkpoints", state, tensors, tensors, keep=2)
    with open(root / "events.jsonl", "a") as events:
        events.write(f'{{"event": "checkpoint", "step": {step}}}\n')


def recorded_save(root: Path, before: int) -> Recording:
    """A save after so many others; after two, the oldest checkpoint is removed."""
    root.mkdir()
    for step in range(1, before + 1):
        save(root, step)
    with recorded(root) as recording:
        save(root, before + 1)
    return recording


def losses(recording: Recording, folder: Path) -> Iterator[str]:
    known: dict[int, str | int] = {}
    for left in power_cuts(recording):
        if wrong := lost_by(left, folder, known):
            yield f"after {left.moment} operations, {left.what}: {wrong}"


@pytest.mark.parametrize(("before", "renamed"), [(0, 2), (2, 3)])
def test_no_power_cut_loses_a_checkpoint(tmp_path: Path, before: int, renamed: int) -> None:
    recording = recorded_save(tmp_path / "run", before)
    kinds = [operation.kind for operation in recording.operations]
    assert kinds.count("rename") == renamed  # the best adapter, the checkpoint, and the oldest
    assert kinds.count("flush") >= 8  # five files and three folders
    assert list(losses(recording, tmp_path / "left")) == []


@pytest.mark.parametrize("name", ["_sync", "sync_folder"])
def test_a_save_that_flushes_too_little_is_found_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states are hard enough: without one of the two flushes something is lost."""
    monkeypatch.setattr(run_dir, name, lambda path: None)
    assert next(losses(recorded_save(tmp_path / "run", 2), tmp_path / "left"), None)


def test_the_recording_ends_as_the_folder_does(tmp_path: Path) -> None:
    """Everything that was done was seen: replayed whole, it gives the folder as it is."""
    root = tmp_path / "run"
    *_, last = power_cuts(recorded_save(root, 2))
    there = {str(path.relative_to(root)): path for path in root.rglob("*")}
    assert last.running.keys() == there.keys()
    for name, content in last.running.items():
        assert content == (there[name].read_bytes() if there[name].is_file() else None)
