"""Defects of documents: one file says what a run is, and the run directory keeps it."""

from pathlib import Path

from .conftest import SOME, Checkpoint, Terminal


def test_files_disagree(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Every command reads the one YAML; the run keeps it, and refuses to go on under another."""
    job = terminal.job(checkpoint("llama3"), SOME, system="You are a bird.")
    shown = terminal.shown(job)
    assert terminal.run("train", job).code == 0
    assert terminal.shown("runs/job") == shown
    said = terminal.run("train", job, "lora.rank=8")
    assert said.code == 2
    assert "lora.rank" in said.text and "4" in said.text and "8" in said.text


def test_copy_paste_leftovers(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """A path or key of another job: named with the near one, before anything is loaded."""
    job = terminal.job(checkpoint("llama3"), SOME)
    said = terminal.run("train", job, "data=row.jsonl")
    assert said.code == 3 and "row.jsonl" in said.text and "rows.jsonl" in said.text
    said = terminal.run("train", job, f"model={terminal.folder}/no/such/model")
    assert said.code == 2 and "no/such/model" in said.text
    said = terminal.run("train", job, "train.batchsize=4")
    assert said.code == 2 and 'Did you mean "train.batch_size"?' in said.text
    assert not Path("runs/job/config.yaml").exists()


def test_run_not_finished(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """A run that was cut off has no adapter to show, and says how to finish it."""
    assert terminal.run("train", terminal.job(checkpoint("llama3"), SOME)).code == 0
    (terminal.folder / "runs" / "job" / "adapter").rename(terminal.folder / "elsewhere")
    said = terminal.run("chat", "runs/job", "--prompt", "Who?")
    assert said.code == 2
    assert "this run is not finished" in said.text and "myna train" in said.text
