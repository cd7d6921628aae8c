"""What plan.json keeps of a run, apart from a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from myna.cli.resumption import (
    FORMAT,
    changed_settings,
    replans_noted,
    stored_compute,
    stored_memory_plans,
)
from myna.config_file import load_config
from myna.errors import ConfigError
from myna.run_dir import RunDir
from myna.training.memory import MemoryPlan

FIRST = MemoryPlan("tokens", 8192, 0, 28).to_json()


def plan(step: int, layers: int) -> dict[str, Any]:
    made = MemoryPlan("tokens", 8192, layers, 28, step=step).to_json()
    return {"event": "plan", "part": "step", "step": step, "memory": made}


def test_a_new_run_has_no_plan(tmp_path: Path) -> None:
    assert stored_compute(RunDir(tmp_path)) is None
    assert stored_memory_plans(RunDir(tmp_path)) == []


def test_plans_are_added_as_events_tell_of_them(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    directory.config.touch()
    begun = {"device": "cpu", "dtype": "float32", "memory": FIRST, "replans": []}
    directory.plan.write_text(json.dumps(begun))
    note = replans_noted(directory)
    note({"event": "plan", "memory": FIRST})  # the first, which is in the file
    note({"event": "step", "step": 2})
    note(plan(3, 7))
    note(plan(9, 14))
    assert [(p["step"], p["layers_recomputed"]) for p in stored_memory_plans(directory)] == [
        (1, 0),
        (3, 7),
        (9, 14),
    ]
    # Resumed from before step 9 with less memory: what was planned there is void.
    note(plan(5, 14))
    assert [p["step"] for p in stored_memory_plans(directory)] == [1, 3, 5]
    assert all(MemoryPlan(**stored) for stored in stored_memory_plans(directory))
    compute = stored_compute(directory)
    assert compute is not None and compute.dtype == "float32"


def test_a_run_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """Before its settings, of which this version may not know some."""
    directory = RunDir(tmp_path)
    directory.config.write_text("train: {something_new: 5}\n")
    directory.plan.write_text(json.dumps({"format": FORMAT + 1, "device": "cpu"}))
    config = load_config(None, flags={"model": "m", "data": ["d.jsonl"]}).config
    with pytest.raises(ConfigError) as caught:
        changed_settings(directory, config)
    assert str(caught.value) == (
        f"{tmp_path} holds a run of a newer version of myna: its format is 2, and this version "
        "reads up to 1.\n"
        "  Go on with that version, or start another run with --fresh."
    )
