"""The demo is a real learning test: the embedded model, trained as `myna demo` does."""

import io
from pathlib import Path

from rich.console import Console

from myna.cli import demo
from myna.data.conversation import Message
from myna.demo.score import base_folder, load_held_out, sample_rows, summarize
from myna.inference.speaker import open_speaker


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
