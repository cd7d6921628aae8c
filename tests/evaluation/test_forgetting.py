"""The forgetting probe: the loss on a neutral text, before and after."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myna.evaluation.forgetting import NEUTRAL, probe
from myna.evaluation.losses import losses_of
from myna.inference.speaker import Speaker


def test_the_shipped_text_is_a_few_dozen_sentences_in_two_languages() -> None:
    lines = [json.loads(line) for line in NEUTRAL.read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"text"} for line in lines)
    texts = [line["text"] for line in lines]
    assert len(set(texts)) == len(texts) == 48
    assert sum(text.isascii() for text in texts) == 24
    assert all(len(text.encode()) < 128 for text in texts)  # also for the shortest of contexts


def test_both_losses_over_all_tokens(
    speaker: Speaker, rows_from: Callable[..., Any], tmp_path: Path
) -> None:
    texts = [{"text": "Water boils."}, {"text": "图书馆每天早上九点开门。"}]
    examples = rows_from(texts).prepared.dataset.examples
    found = probe(speaker.model, tmp_path / "mine.txt", examples, pad_id=speaker.pad_id)
    losses = losses_of(speaker.model, examples, pad_id=speaker.pad_id)
    assert found.to_json() == {
        "text": str(tmp_path / "mine.txt"),
        "tokens": sum(len(example.completion_ids) - 1 for example in examples),
        **losses.mean(),
    }
    assert found.base != pytest.approx(found.adapter, rel=1e-3)
    shipped = probe(speaker.model, NEUTRAL, examples, pad_id=speaker.pad_id)
    assert shipped.text == "neutral sentences, English and Chinese"
