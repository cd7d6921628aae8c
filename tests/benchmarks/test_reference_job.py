"""The side-by-side program from end to end, at a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reference_job import compare

ROOT = Path(__file__).parents[2]
HUANHUAN = ROOT.parent / "shared" / "data" / "huanhuan.json"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/reference_job.py", "--shape", "tiny", "--threads", "1"]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.full
@pytest.mark.skipif(not HUANHUAN.exists(), reason="needs ../shared/data/huanhuan.json")
def test_equal_losses_then_figures_then_picture(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    results, picture = tmp_path / "results.json", tmp_path / "picture.png"
    arguments = ["--rounds", 1, "--results", results, "--picture", picture]
    done = run("--workload", "A", "--data", HUANHUAN, "--dropout", 0, 0.1, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads(results.read_text())
    assert list(stored) == ["A, dropout 0, cpu", "A, dropout 0.1, cpu"]
    for league in stored.values():
        assert list(league["contenders"]) == ["tutorial", "peft", "trl", "myna"]
        for entry in league["contenders"].values():
            assert entry["samples_per_second"] > 0 and entry["peak_bytes"] > 1e8
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unequal_work_ends_the_program_with_contender_step_and_both_numbers() -> None:
    compare("trl", [11.50, 11.41], [11.50, 11.40], 0.02, "loss")
    with pytest.raises(
        SystemExit, match=r"trl, step 2: loss is 11\.41, expected 11\.4 within 0\.0001"
    ):
        compare("trl", [11.50, 11.41], [11.50, 11.40], 1e-4, "loss")
    with pytest.raises(SystemExit, match="step 1: loss is nan"):
        compare("trl", [float("nan")], [11.5], 0.02, "loss")
    with pytest.raises(SystemExit, match="myna reported 1 times its loss, expected 2"):
        compare("myna", [11.5], [11.5, 11.4], 0.02, "loss")


def test_a_tiny_shape_is_not_mixed_with_real_results() -> None:
    done = run()
    assert done.returncode == 1
    assert "--shape tiny measures nothing: name another file by --results." in done.stderr
