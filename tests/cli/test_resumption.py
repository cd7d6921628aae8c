"""What plan.json keeps of a run, apart from a run."""

import json
from pathlib import Path
from typing import Any

from myna.cli.resumption import replans_noted, stored_compute, stored_memory_plans
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
