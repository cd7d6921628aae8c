"""What is asked, what it is compared with, and where it stands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myna.errors import DataError
from myna.evaluation.rows import has_answers, rows_of_questions

DIALOGUES = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 1?"},
            {"role": "assistant", "content": "It is 7!"},
            {"role": "user", "content": " And 2? "},
            {"role": "assistant", "content": "你好"},
        ]
    },
]


def test_every_trained_answer_is_a_row_with_its_own_question(
    rows_from: Callable[..., Any],
) -> None:
    rows = rows_from(DIALOGUES).rows
    assert [(row.place, row.question, row.reference) for row in rows] == [
        ("rows.jsonl line 1", "a", "b"),
        ("rows.jsonl line 2", "What is 1?", "It is 7!"),
        ("rows.jsonl line 2, answer 2", " And 2? ", "你好"),
    ]
    assert all(row.prompt_ids == row.example.prompt_ids for row in rows)


def test_a_plain_text_is_not_asked(rows_from: Callable[..., Any]) -> None:
    (row,) = rows_from([{"text": "Once upon a time."}]).rows
    assert (row.question, row.reference, row.prompt_ids) == ("", None, ())
    assert row.example is not None


def test_questions_without_answers(rows_from: Callable[..., Any], tmp_path: Path) -> None:
    encoder = rows_from(DIALOGUES).prepared.encoder
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "你好"}\n{"prompt": "b", "completion": ""}\n')
    assert not has_answers(path) and has_answers(tmp_path / "rows.jsonl")
    assert has_answers(tmp_path / "missing.jsonl")  # who reads it says that it is not there
    rows = rows_of_questions(path, encoder)
    assert [(row.question, row.reference, row.example) for row in rows] == [
        ("你好", None, None),
        ("b", None, None),
    ]
    assert encoder.tokenizer.decode(list(rows[0].prompt_ids)) == (
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    )
    path.write_text('{"prompt": "<|im_end|>"}\n{"prompt": "b"}\n{"prompt": "<pad>"}\n')
    with pytest.raises(DataError) as refused:
        rows_of_questions(path, encoder)
    assert 'questions.jsonl line 1: The user text of turn 1 contains "<|im_end|>"' in str(
        refused.value
    )
    assert "questions.jsonl line 3: " in str(refused.value)
