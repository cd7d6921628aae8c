"""The demo is a real learning test: the embedded model, trained as `myna demo` does."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from myna.cli import demo
from myna.cli.eval import run as evaluate
from myna.cli.train import run as train
from myna.data.conversation import Message
from myna.demo.score import base_folder, load_held_out, sample_rows, summarize
from myna.inference.speaker import open_speaker
from myna.training.events import read_events


def test_the_voice_is_learned_and_carries_over_to_held_out_questions(tmp_path: Path) -> None:
    said = io.StringIO()
    rows = load_held_out()
    learned = demo.run(tmp_path / "demo", console=Console(file=said, width=140))
    judged = evaluate(tmp_path / "demo", console=Console(quiet=True))
    # The same questions, answers and judgement as those that were just shown.
    assert judged.metrics["voice_and_right"]["adapter"] == pytest.approx(learned.both)
    assert judged.metrics["right"]["adapter"] == pytest.approx(learned.content)
    assert judged.metrics["voice"]["adapter"] == pytest.approx(learned.voice)
    # Measured above 90 %; the gate leaves room for the noise of seeds and machines.
    assert learned.both > 0.85
    assert judged.metrics["voice_and_right"]["base"] < 0.05
    assert (
        judged.metrics["right"]["base"] > 0.90
    )  # the base knows the facts: what is gained is the voice
    assert judged.loss is not None and judged.loss["adapter"] < 0.1 * judged.loss["base"]
    shown = said.getvalue()
    for name in ("both", "content", "voice"):  # the very digits
        assert f"{100 * getattr(learned, name):.1f} %" in shown
    assert f"share of {len(rows)} held-out answers" in shown and "before" in shown
    assert sample_rows(rows)[0].question[:20] in shown

    # The adapter is the cause: on the same base, switched off, the answers are plain again.
    speaker = open_speaker(str(tmp_path / "demo"))
    prompt = speaker.encoder.prompt([Message("user", rows[0].question)]).ids
    ((_, courtly),) = speaker.answer_all([prompt], demo.SAMPLING, batch_size=1)
    plain = demo.answer_rows(str(base_folder()), rows[:1])[0]
    assert courtly.text != plain.text and courtly.stopped and plain.stopped


def train_in(dtype: str, folder: Path, **changes: float) -> tuple[list[float], Path]:
    """Held-out losses of a demo with 60 of its rows held out, one an epoch, and its run."""
    resolved = demo.demo_config(folder)
    changed = resolved.config.model_copy(
        update={
            "dtype": dtype,
            "held_out": 60,
            "train": resolved.config.train.model_copy(update=changes),
        }
    )
    run = train(replace(resolved, config=changed), console=Console(quiet=True)).directory
    return [e["loss"] for e in read_events(run.events) if e["event"] == "eval"], run.path


def share_in_voice_and_right(run: Path) -> float:
    rows = load_held_out()
    return summarize(demo.score(rows, demo.answer_rows(str(run), rows))).both


@pytest.mark.full
def test_bfloat16_has_the_loss_curve_of_float32(tmp_path: Path) -> None:
    """Within 1 % on average over seeds, while there is a loss: at a tenth of the demo's rate.

    At the demo's own rate next to nothing is left, and what is left differs more from seed to seed.
    """
    curves = {
        dtype: torch.tensor(
            [
                train_in(
                    dtype, tmp_path / f"{dtype}-{seed}", seed=seed, epochs=3, learning_rate=2e-4
                )[0]
                for seed in (1, 2, 3)
            ]
        ).mean(0)
        for dtype in ("float32", "bfloat16")
    }
    print(curves)
    assert len(curves["float32"]) == 3 and curves["float32"][2] < 0.5 * curves["float32"][0]
    torch.testing.assert_close(curves["bfloat16"], curves["float32"], rtol=0.01, atol=0)


@pytest.mark.full
def test_bfloat16_learns_what_float32_does(tmp_path: Path) -> None:
    """The demo as it is: the loss of some 7 is gone, and the scores are within 3 points.

    Measured over these seeds: 0.0017 to 0.0042 in float32, 0.0029 to 0.0037 in bfloat16; 93.6 and
    91.9 % in voice and right.
    """
    shares = {}
    for dtype in ("float32", "bfloat16"):
        found = []
        for seed in (1, 2, 3):
            losses, run = train_in(dtype, tmp_path / f"{dtype}-{seed}", seed=seed)
            assert losses[-1] < 0.01
            found.append(share_in_voice_and_right(run))
        shares[dtype] = sum(found) / len(found)
    print(shares)
    assert abs(shares["bfloat16"] - shares["float32"]) <= 0.03
