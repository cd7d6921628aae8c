"""Killed at random moments: what was to be made is absent or whole, and the next try makes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRIALS = Path(__file__).parent / "killed_exports.py"


def outcomes(adapter: Path, folder: Path, trials: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(TRIALS), str(adapter), str(folder), str(trials)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def check(adapter: Path, folder: Path, trials: int) -> None:
    found = outcomes(adapter, folder, trials)
    assert found["trials"] == 2 * trials
    assert found["half"] == 0
    assert found["absent"] + found["whole"] == 2 * trials
    assert found["absent"] > 0, "all were killed too late to say anything"
    assert found["left over"] == 0


def test_five_times(make_base, make_adapter, tmp_path) -> None:
    check(make_adapter(make_base()), tmp_path, 5)


@pytest.mark.full
def test_fifty_times(make_base, make_adapter, tmp_path) -> None:
    check(make_adapter(make_base()), tmp_path, 50)
