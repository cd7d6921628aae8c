"""The load and the hostile clients of `benchmarks/serving.py`, in its small form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


@pytest.mark.full
def test_a_server_stands_load_and_harm(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--soak", "0.1", "--results", str(results)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert all(one["wrong_answers"] == 0 for one in found["load"]["contenders"].values())
    assert found["fuzz"]["faults"] == found["fuzz"]["connections_made"] == 0
    assert found["names"]["faults"] == found["names"]["files_opened"] == 0
    assert found["connections"]["healthz_failed"] == 0
    assert found["connections"]["descriptors_return"]
    assert found["aborts"]["descriptors_return"]
    assert found["soak"]["answered"] > 0
    assert found["soak"]["wrong_adapter"] == found["soak"]["failed"] == 0
    assert found["soak"]["alive"]
