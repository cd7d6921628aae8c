"""Checkpoints: whole or absent, intact or not used."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from myna.errors import ConfigError, StorageError
from myna.training.checkpoint import (
    MANIFEST,
    SCHEMA,
    Best,
    Checkpoint,
    State,
    folder_of,
    latest_checkpoint,
    load_best,
    save_best,
    save_checkpoint,
)


def save(root: Path, step: int) -> Path:
    adapter = {"q.lora_A": torch.full((2, 3), float(step))}
    optimizer = {"q.lora_A.exp_avg": torch.full((2, 3), -float(step))}
    return save_checkpoint(root, State(step, best_loss=0.5), adapter, optimizer, keep=2)


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return latest_checkpoint(root, said.append), said


def test_what_was_saved_is_what_is_found(tmp_path: Path) -> None:
    assert latest(tmp_path) == (None, [])
    save(tmp_path, 5)
    found, said = latest(tmp_path)
    assert found is not None and said == []
    assert found.state == State(5, best_loss=0.5)
    assert torch.equal(found.adapter["q.lora_A"], torch.full((2, 3), 5.0))
    assert torch.equal(found.optimizer["q.lora_A.exp_avg"], torch.full((2, 3), -5.0))


def test_the_newest_two_stay_whatever_the_clock_says(tmp_path: Path) -> None:
    import os

    for step in (1, 2, 10):
        save(tmp_path, step)
    os.utime(folder_of(tmp_path, 10), (0, 0))
    save(tmp_path, 11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content)
    found, said = latest(tmp_path)
    assert found is not None and found.state.step == 1
    assert len(said) == 1 and said[0].startswith("checkpoint step-00000002 is damaged (")
    assert said[0].endswith(
        "); renamed to step-00000002.corrupt. "
        "The run goes on from step-00000001; 1 step is lost and computed again"
    )
    assert (tmp_path / "step-00000002.corrupt").is_dir()


def test_no_single_bit_goes_unseen(tmp_path: Path) -> None:
    """Every bit of the manifest, and some of every other file."""
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        bits = range(8 * len(whole))
        for bit in bits if path.name == "MANIFEST.json" else draw.sample(bits, 60):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            found, said = latest(tmp_path)
            assert found is not None and found.state.step == 1 and len(said) == 1, (path.name, bit)
            (damaged,) = tmp_path.glob("*.corrupt")
            damaged.rename(folder)
        path.write_bytes(whole)
    found, said = latest(tmp_path)
    assert found is not None and found.state.step == 2 and said == []


def test_a_second_damaged_one_of_the_same_step_does_not_replace_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        (save(tmp_path, 1) / "state.json").unlink()
        assert latest(tmp_path)[0] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001.corrupt",
        "step-00000001.corrupt-2",
    ]


def test_old_ones_stay_until_the_new_one_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    whole = Path.write_bytes

    def failing_disk(self: Path, content: bytes) -> int:
        broken = bytearray(content)
        if self.name == "adapter.safetensors":
            broken[-1] ^= 1
        return whole(self, bytes(broken))

    monkeypatch.setattr(Path, "write_bytes", failing_disk)
    with pytest.raises(StorageError, match="does not read back"):
        save(tmp_path, 3)
    monkeypatch.undo()
    found, _ = latest(tmp_path)
    assert found is not None and found.state.step == 2
    assert folder_of(tmp_path, 1).is_dir()


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    aside = tmp_path / ".step-00000002.tmp-77"
    aside.mkdir()
    (aside / "state.json").write_text("{")
    found, said = latest(tmp_path)
    assert found is not None and found.state.step == 1 and said == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # it is swept away


def test_one_that_was_being_replaced_gets_its_name_back(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / ".step-00000001.old-77")  # killed between two renames
    found, said = latest(tmp_path)
    assert found is not None and found.state.step == 1 and said == []


def test_each_damaged_one_is_told_with_what_it_costs(tmp_path: Path) -> None:
    for step in (10, 30, 70):
        save_checkpoint(tmp_path, State(step), {}, {}, keep=3)
    for step in (30, 70):
        path = folder_of(tmp_path, step) / "adapter.safetensors"
        path.write_bytes(path.read_bytes() + b"!")
    found, said = latest(tmp_path)
    assert found is not None and found.state.step == 10
    assert said == [
        f"checkpoint step-000000{step} is damaged (adapter.safetensors does not have the bytes "
        f"that were written); renamed to step-000000{step}.corrupt. The run goes on from "
        f"step-00000010; {lost} steps are lost and computed again"
        for step, lost in ((70, 60), (30, 20))
    ]


def test_where_no_other_is_intact_the_run_begins_again(tmp_path: Path) -> None:
    (save(tmp_path, 5) / MANIFEST).unlink()
    assert latest(tmp_path) == (
        None,
        [
            "checkpoint step-00000005 is damaged (FileNotFoundError: No such file or directory); "
            "renamed to step-00000005.corrupt. No other one is intact: the run begins again; "
            "5 steps are lost and computed again"
        ],
    )


def rewrite_schema(folder: Path, schema: int) -> None:
    """As a version with another format would write the manifest."""
    *lines, _ = (folder / MANIFEST).read_text().splitlines()
    text = json.dumps(json.loads("\n".join(lines)) | {"schema": schema}, indent=1)
    (folder / MANIFEST).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")


def test_one_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    rewrite_schema(folder, SCHEMA)
    assert latest(tmp_path)[0] is not None  # so are they written here
    rewrite_schema(folder, 7)
    for content in ("whole", "other files"):
        with pytest.raises(ConfigError) as caught:
            latest(tmp_path)
        assert str(caught.value) == (
            f"{folder} was written by a newer version of myna: its format is 7, and this version "
            "reads up to 1.\n"
            "  Go on with that version, or begin another run with --fresh."
        ), content
        (folder / "adapter.safetensors").unlink(missing_ok=True)
    assert folder.is_dir()


def test_what_a_state_holds_is_known_by_its_schema() -> None:
    """With another field an older version cannot read it: raise SCHEMA after a release."""
    names = "best_loss best_score best_step environment evaluations_without_gain loss_scaling "
    names += "plans run skipped_steps step"
    assert (SCHEMA, sorted(field.name for field in dataclasses.fields(State))) == (1, names.split())


def test_best_adapter(tmp_path: Path) -> None:
    save_best(tmp_path / "checkpoints", Best(3, 0.25, {"a": torch.ones(2)}))
    assert torch.equal(load_best(tmp_path / "checkpoints")["a"], torch.ones(2))
