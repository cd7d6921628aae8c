"""A run directory made by hand (`made_run.py`)."""

import json
import sys
from pathlib import Path

import pytest

from myna.run_dir import RunDir

sys.path.insert(0, str(Path(__file__).parent))

from made_run import CONFIG, DATA, PLAN, SAMPLE, SAVED, START, step, write_events


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run of six steps in two epochs, with everything but an evaluation."""
    directory = RunDir(tmp_path / "parrot")
    directory.adapter.mkdir(parents=True)
    (directory.adapter / "adapter_config.json").write_text(json.dumps({"r": 4}))
    (directory.adapter / "myna.json").write_text(json.dumps(SAVED))
    (directory.path / "run.lock").write_text("1\n")
    directory.config.write_text(CONFIG)
    directory.plan.write_text(json.dumps(PLAN))
    directory.data.write_text(json.dumps(DATA))
    directory.sample.write_text(json.dumps(SAMPLE))
    write_events(
        directory.events,
        START,
        {"event": "plan", **PLAN},
        *map(step, (1, 2, 3)),
        {"event": "eval", "step": 3, "loss": 0.75, "rows": 2, "tokens": 20},
        {"event": "warning", "step": 4, "message": "the loss is 8, more than it was"},
        *map(step, (4, 5, 6)),
        {"event": "eval", "step": 6, "loss": 0.875, "rows": 2, "tokens": 20},
        {"event": "end", "step": 6, "best_step": 3, "best_loss": 0.75},
    )
    return directory
