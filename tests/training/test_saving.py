"""A disk that is full for a while costs warnings; the last checkpoint must be written."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from myna import run_dir
from myna.errors import StorageError
from myna.training.checkpoint import State, latest_checkpoint, load_best
from myna.training.events import EventLog
from myna.training.saving import Saving


class Disk:
    """Fails to flush as long as it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        whole = run_dir.os.fsync

        def fsync(descriptor: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            whole(descriptor)

        monkeypatch.setattr(run_dir.os, "fsync", fsync)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def begin(saving: Saving, step: int) -> None:
    tensors = {"a": torch.full((3,), float(step))}
    saving.begin(State(step), tensors, tensors)


def test_training_goes_on_and_tries_again_later_and_later(tmp_path: Path, disk: Disk) -> None:
    told: list[dict[str, Any]] = []
    root = tmp_path / "checkpoints"
    tries = []
    with EventLog(None, told.append) as events:
        saving = Saving(root, keep=2, every=10, events=events)
        for step in range(1, 31):
            disk.is_full = 10 <= step < 20
            if saving.is_due(step):
                tries.append(step)
                begin(saving, step)
                assert saving._writer is not None and saving._writer._thread is not None
                saving._writer._thread.join()
            saving.report(step)
        saving.finish(30)
    assert tries == [10, 11, 13, 17, 20, 30]  # 1, 2, 4 steps later, then as usual
    warnings = [event for event in told if event["event"] == "warning"]
    assert [event["step"] for event in warnings] == [10, 11, 13, 17]
    assert "No space left on device" in warnings[0]["message"]
    assert "tries again in 1 step:" in warnings[0]["message"]
    assert [event["step"] for event in told if event["event"] == "checkpoint"] == [20, 30]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_run_that_ends_on_a_full_disk_says_so_and_keeps_what_it_had(
    tmp_path: Path, disk: Disk
) -> None:
    with EventLog(None) as events:
        saving = Saving(tmp_path, keep=2, every=10, events=events)
        begin(saving, 10)
        saving.finish(10)
        disk.is_full = True
        begin(saving, 20)
        with pytest.raises(StorageError, match="No space left on device"):
            saving.finish(20)
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found.state.step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_what_is_written_is_the_moment_of_the_call(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1000)}
    with EventLog(None) as events:
        saving = Saving(tmp_path, keep=2, every=1, events=events)
        saving.begin(State(1), tensors, tensors)
        tensors["a"].fill_(7)  # as the next step does, while the file is being written
        saving.finish(1)
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and not found.adapter["a"].any()


def test_without_a_place_nothing_is_written() -> None:
    with EventLog(None) as events:
        saving = Saving(None, keep=2, every=1, events=events)
        begin(saving, 1)
        saving.report(1)
        saving.finish(1)


def test_the_best_adapter_waits_for_room_as_checkpoints_do(tmp_path: Path, disk: Disk) -> None:
    """No checkpoint speaks of a best adapter that is not there."""
    told: list[dict[str, Any]] = []
    root = tmp_path / "checkpoints"
    with EventLog(None, told.append) as events:
        saving = Saving(root, keep=2, every=10, events=events)
        for step in range(1, 21):
            disk.is_full = step in (10, 11)
            if step in (8, 12):
                saving.keep_best(step, 1 / step, {"a": torch.full((3,), float(step))})
            if saving.is_due(step):
                begin(saving, step)
                assert saving._writer is not None and saving._writer._thread is not None
                saving._writer._thread.join()
            if step == 11:
                assert [path.name for path in root.iterdir()] == []  # nor anything half written
            if step == 13:
                assert torch.equal(load_best(root)["a"], torch.full((3,), 12.0))
            saving.report(step)
        saving.finish(20)
    warnings = [event["message"] for event in told if event["event"] == "warning"]
    assert [message.partition(";")[0] for message in warnings] == [
        "the checkpoint of step 10 was not written",
        "the checkpoint of step 11 was not written",
    ]
    assert f"{root / 'best.safetensors'}: could not be written: No space left" in warnings[1]
    assert [event["step"] for event in told if event["event"] == "checkpoint"] == [13, 20]


def test_a_best_adapter_that_never_found_room_is_an_error_at_the_end(
    tmp_path: Path, disk: Disk
) -> None:
    with EventLog(None) as events:
        saving = Saving(tmp_path, keep=2, every=10, events=events)
        saving.keep_best(5, 0.5, {"a": torch.full((3,), 5.0)})
        begin(saving, 10)
        saving.finish(10)
        disk.is_full = True
        saving.keep_best(15, 0.4, {"a": torch.full((3,), 15.0)})
        begin(saving, 20)
        with pytest.raises(StorageError, match=r"best\.safetensors: could not be written: No sp"):
            saving.finish(20)
    # The run goes on from step 10 and its best, when there is room.
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found.state.step == 10
    assert torch.equal(load_best(tmp_path)["a"], torch.full((3,), 5.0))


def test_a_fault_of_ours_in_the_background_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with EventLog(None) as events:
        saving = Saving(tmp_path, keep=2, every=1, events=events)
        saving.begin(State(1, environment={"a": object()}), {}, {})  # no JSON
        with pytest.raises(TypeError):
            saving.finish(1)
