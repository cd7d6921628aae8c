"""The demo is a real learning test: the embedded model, trained as `myna demo` does."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from myna.cli import demo
from myna.cli.train import run as train
from myna.data.conversation import Message
from myna.demo.score import base_folder, load_held_out, sample_rows, summarize
from myna.inference.speaker import open_speaker
from myna.training.events import read_events


def test_the_voice_is_learned_and_carries_over_to_held_out_questions(tmp_path: Path) -> None:
    said = io.StringIO()
    rows = load_held_out()
    learned = demo.run(tmp_path / "demo", console=Console(file=said, width=140))
    before = summarize(demo.score(rows, demo.answer_rows(str(base_folder()), rows)))
    # Measured above 90 %; the gate leaves room for the noise of seeds and machines.
    assert learned.both > 0.85
    assert before.both < 0.05
    assert before.content > 0.90  # the base knows the facts: what is gained is the voice
    shown = said.getvalue()
    assert f"share of {len(rows)} held-out answers" in shown and "before" in shown
    assert sample_rows(rows)[0].question[:20] in shown

    # The adapter is the cause: on the same base, switched off, the answers are plain again.
    speaker = open_speaker(str(tmp_path / "demo"))
    prompt = speaker.encoder.prompt([Message("user", rows[0].question)]).ids
    ((_, courtly),) = speaker.answer_all([prompt], demo.SAMPLING, batch_size=1)
    plain = demo.answer_rows(str(base_folder()), rows[:1])[0]
    assert courtly.text != plain.text and courtly.stopped and plain.stopped


def train_in(dtype: str, seed: int, folder: Path) -> tuple[float, float]:
    """Last held-out loss of a demo with 60 of its rows held out, and its share of good answers."""
    resolved = demo.demo_config(folder)
    changed = resolved.config.model_copy(
        update={
            "dtype": dtype,
            "held_out": 60,
            "train": resolved.config.train.model_copy(update={"seed": seed}),
        }
    )
    run = train(replace(resolved, config=changed), console=Console(quiet=True)).directory
    losses = [event["loss"] for event in read_events(run.events) if event["event"] == "eval"]
    assert len(losses) == 7, "one evaluation an epoch"
    rows = load_held_out()
    return losses[-1], summarize(demo.score(rows, demo.answer_rows(str(run.path), rows))).both


@pytest.mark.full
def test_bfloat16_ends_where_float32_does(tmp_path: Path) -> None:
    """The same rows held out, the same order of rows and first adapter for both, by the seed."""
    found = {
        dtype: [train_in(dtype, seed, tmp_path / f"{dtype}-{seed}") for seed in (1, 2, 3)]
        for dtype in ("float32", "bfloat16")
    }
    print(found)
    losses = {dtype: sum(loss for loss, _ in runs) / 3 for dtype, runs in found.items()}
    shares = {dtype: sum(share for _, share in runs) / 3 for dtype, runs in found.items()}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01), found
    assert abs(shares["bfloat16"] - shares["float32"]) <= 0.03, found
