"""Runs that are hurt survive: a twentieth of what `benchmarks/reliability.py` does."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


def test_no_injury_loses_a_run(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--results", str(results)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads(results.read_text())["kinds"]
    assert len(kinds) == 15
    assert all(kind["survived"] == kind["trials"] > 0 for kind in kinds.values())
