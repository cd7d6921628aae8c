"""`myna report`, and the page that `myna train` leaves: of real runs, however they ended."""

import contextlib
import html
import io
import json
import os
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from myna.cli import report
from myna.cli.train import Options
from myna.cli.train import run as train
from myna.config_file import load_config
from myna.errors import ConfigError, Interrupted, StorageError
from myna.run_dir import RunDir
from myna.training.events import read_events


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: rows.jsonl\ndtype: float32\nheld_out: 4\n"
        "lora_r: 4\ntrain: {epochs: 1, batch_size: 4, learning_rate: 1e-3, save_steps: 2}\n"
    )
    return path


def run(job: Path, *overrides: str) -> tuple[RunDir, str]:
    console = Console(file=io.StringIO(), width=100)
    finished = train(load_config(job, overrides), Options(), console=console)
    return finished.directory, console.file.getvalue()  # type: ignore[attr-defined]


def made(directory: RunDir, output: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=20)
    report.run(directory.path, output, console=console)
    page = output or directory.report
    assert console.file.getvalue() == f"The page is {page}\n"  # type: ignore[attr-defined]
    return page.read_text(encoding="utf-8")


def test_training_ends_with_a_page_of_what_was_trained(job: Path, tiny_model: Path) -> None:
    directory, said = run(job, "report_to=tensorboard")
    assert "runs/job/report.html      how it went, as a page for a browser" in said
    page = directory.report.read_text(encoding="utf-8")
    assert 'class="state finished"' in page and "<b>5</b><span>of 5 steps" in page
    steps = [each for each in read_events(directory.events) if each["event"] == "step"]
    trained = sum(each["trained_tokens"] for each in steps)
    assert f"<th>tokens trained</th><td>{trained:,}</td>" in page
    assert "<th>lora.rank</th><td>4</td><td>job.yaml line 5 (lora_r)</td>" in page.replace(
        f"{job.parent}/", ""
    )
    assert made(directory) == page  # nothing has happened since
    # The tokens on it are those of transformers, for a row that was trained.
    (first, *_) = json.loads(directory.sample.read_text())
    line = int(first["place"].removeprefix("rows.jsonl line "))
    row = json.loads(job.with_name("rows.jsonl").read_text().splitlines()[line - 1])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row["output"]},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith("".join(first["context"] + first["trained"]))
    assert "".join(first["trained"]).startswith(row["output"])
    assert len(list((directory.path / "tensorboard").iterdir())) == 1
    # The Python on it runs as it stands.
    (code,) = re.findall(r'<pre class="command">(from peft .*?)</pre>', page, re.DOTALL)
    said_by_code = io.StringIO()
    with contextlib.redirect_stdout(said_by_code):
        exec(html.unescape(code).replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert said_by_code.getvalue().endswith("\n")


def test_a_finished_run_is_finished_whether_its_pictures_can_be_drawn_or_not(job: Path) -> None:
    for name in ("loss.png", "report.html"):  # folders, where files would be
        (job.parent / "runs" / "job" / name).mkdir(parents=True)
    directory, said = run(job)
    assert directory.adapter.is_dir()
    assert "warning: runs/job/loss.png was not drawn: " in said
    assert "warning: runs/job/report.html was not drawn: " in said
    assert "myna report runs/job      how it went, as a page for a browser" in said
    with pytest.raises(StorageError, match=r"report\.html: could not be written"):
        report.write_report(directory)


def test_a_run_that_was_stopped_has_a_page_and_so_has_the_resumed_one(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from myna.cli.progress import TrainingDisplay

    shown = TrainingDisplay.__call__

    def stop_after_three(display: TrainingDisplay, event: dict[str, object]) -> None:
        shown(display, event)
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDisplay, "__call__", stop_after_three)
        with pytest.raises(Interrupted):
            run(job)
    directory = RunDir(Path("runs/job"))
    assert not directory.report.exists()
    page = made(directory)
    assert (
        'class="state stopped"' in page
        and "<b>3</b><span>of 5 steps" in page
        and "Use it" not in page
    )
    assert "<code>myna train runs/job</code> goes on from the last checkpoint" in page
    run(job)
    page = directory.report.read_text(encoding="utf-8")
    assert 'class="state finished"' in page and "<b>5</b><span>of 5 steps" in page
    assert "<th>resumed</th><td>once</td>" in page


def test_a_page_elsewhere_and_places_that_are_no_run(job: Path, tmp_path: Path) -> None:
    directory, _ = run(job)
    before = directory.report.read_bytes()
    page = made(directory, tmp_path / "page.html")
    assert page.encode() == before
    with pytest.raises(ConfigError, match="nowhere: no such run directory"):
        report.write_report(RunDir(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no run is in this folder"):
        report.write_report(RunDir(tmp_path))
