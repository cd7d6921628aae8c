"""Keep what a version writes, so that every later one can be shown to read it.

    python tools/keep_release.py

makes `tests/golden/releases/VERSION/`: a run that a signal stopped in the middle, with one
checkpoint, and the finished adapter of the same run with its losses and some answers. Run it once
for each release, on a processor, and commit the folder; `tests/test_releases.py` resumes the run
and asks the adapter with the code of the day. `base/` beside it, the tiny model they all train, is
made once and stays. Where a path was, files say @HERE@.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from myna import __version__  # noqa: E402
from myna.training.events import read_events  # noqa: E402
from tiny_model import save_tiny_model  # noqa: E402

RELEASES = ROOT / "tests" / "golden" / "releases"
HERE = "@HERE@"
JOB = """\
model: base
data: rows.jsonl
dtype: float32
template: chatml
system: Answer like a bird.
held_out: 4
lora: {rank: 2, dropout: 0.1}
train: {epochs: 60, batch_size: 6, learning_rate: 2e-2, eval_steps: 50, save_steps: 20,
  keep_best: true}
"""
STOPPED_AFTER = 150
KINDS = ("chirp", "tweet", "caw")


def begin(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "myna", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )


def steps(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_bytes().count(b'"event": "step"') if events.exists() else 0


def write_job(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB)
    rows = [
        {"instruction": f"Bird {n}, say {KINDS[n % 3]}.", "output": f"{KINDS[n % 3].title()}!"}
        for n in range(28)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"instruction": f"Bird 40, say {kind}."} for kind in KINDS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def train(folder: Path) -> None:
    """Stop a run in the middle, keep it, and finish it elsewhere."""
    run = folder / "runs" / "job"
    process = begin(folder, "train", "job.yaml")
    while steps(run) < STOPPED_AFTER and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    assert code == 75, f"stopped after {steps(run)} steps with {code}"
    shutil.copytree(run, folder / "stopped")
    assert begin(folder, "train", "job.yaml").wait() == 0


def keep(folder: Path, target: Path) -> None:
    """What a later version needs, in as few files as it takes."""
    for name in ("job.yaml", "rows.jsonl", "questions.jsonl"):
        shutil.copy(folder / name, target / name)
    stopped = target / "runs" / "job"
    shutil.copytree(folder / "stopped", stopped)
    (stopped / "run.lock").unlink()
    for older in sorted((stopped / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(older)
    shutil.copytree(folder / "runs" / "job" / "adapter", target / "runs" / "finished" / "adapter")
    events = list(read_events(folder / "runs" / "job" / "events.jsonl"))
    answers = (folder / "answers.jsonl").read_text().splitlines()
    expected = {
        "losses": [event["loss"] for event in events if event["event"] == "step"],
        "answers": [json.loads(line)["answer"] for line in answers],
    }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for path in target.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            path.write_bytes(path.read_bytes().replace(str(folder).encode(), HERE.encode()))


def main() -> None:
    target = RELEASES / __version__
    assert not target.exists(), f"{target} is there; what a release wrote is never written again"
    if not (RELEASES / "base").exists():
        save_tiny_model(RELEASES / "base")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(RELEASES / "base", folder / "base")
        write_job(folder)
        train(folder)
        asked = ("generate", "runs/job", "questions.jsonl", "-o", "answers.jsonl")
        assert begin(folder, *asked, "--temperature", "0").wait() == 0
        target.mkdir(parents=True)
        keep(folder, target)
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total:,} bytes")


if __name__ == "__main__":
    main()
