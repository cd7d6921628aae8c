"""Rows of every shape up to the answer that is to be generated."""

import json
from pathlib import Path

import pytest

from myna.data.conversation import Message
from myna.errors import DataError
from myna.inference.questions import Question, list_refusals, read_questions


def questions_of(tmp_path: Path, *rows: object) -> list[Question]:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return read_questions(path)


def test_instructions_with_and_without_answers(tmp_path: Path) -> None:
    first, second, third = questions_of(
        tmp_path,
        {"instruction": "你好", "input": "", "output": "臣妾给皇上请安"},
        {"instruction": "翻译", "input": "hello"},
        {"instruction": "说", "system": "你是甄嬛", "output": ""},
    )
    assert first.messages == (Message("user", "你好"),)
    assert first.reference == "臣妾给皇上请安"
    assert second.messages == (Message("user", "翻译\nhello"),)
    assert second.reference is None
    assert third.messages == (Message("system", "你是甄嬛"), Message("user", "说"))
    assert third.reference is None
    assert str(second.place) == "questions.jsonl line 2"


def test_messages_are_taken_up_to_the_last_of_the_user(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    whole, open_ended = questions_of(tmp_path, {"messages": turns}, {"messages": turns[:3]})
    assert [message.content for message in whole.messages] == ["a", "b", "c"]
    assert whole.reference == "d"
    assert open_ended.messages == whole.messages
    assert open_ended.reference is None


def test_bluelm_inputs_with_its_markers(tmp_path: Path) -> None:
    plain, marked = questions_of(
        tmp_path,
        {"inputs": "你好", "targets": "好"},
        {"inputs": "[|Human|]:你好[|AI|]:好</s>[|Human|]:你是谁[|AI|]:"},
    )
    assert (plain.messages, plain.reference) == ((Message("user", "你好"),), "好")
    assert [message.content for message in marked.messages] == ["你好", "好", "你是谁"]


def test_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text('[{"instruction": "a"},\n {"instruction": "b"}]')
    assert [question.messages[0].content for question in read_questions(path)] == ["a", "b"]


def refusal(tmp_path: Path, *rows: object) -> str:
    with pytest.raises(DataError) as refused:
        questions_of(tmp_path, *rows)
    return str(refused.value)


def test_all_rows_that_cannot_be_asked_are_listed(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "asistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": " "}]},
        5,
    )
    lines = text.splitlines()
    assert lines[-1] == "Nothing was generated."
    assert 'questions.jsonl line 2: messages[0].role is "asistant"' in text
    assert "questions.jsonl line 3: messages[0].content (user) is empty" in text
    assert "questions.jsonl line 4: the row is the number 5" in text


def test_a_file_of_another_shape(tmp_path: Path) -> None:
    text = refusal(tmp_path, {"frage": "a"})
    assert 'the row has "frage"; expected messages or conversations' in text
    assert text.endswith("Nothing was generated.")


def test_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text("[]")
    with pytest.raises(DataError) as refused:
        read_questions(path)
    assert str(refused.value) == ("questions.json holds no rows; expected at least one.")
    path.write_text("")
    with pytest.raises(DataError) as refused:
        read_questions(path)
    assert str(refused.value).endswith("Nothing was generated.")


def test_a_screenful_of_refusals_is_listed_and_the_rest_counted() -> None:
    text = list_refusals([f"row {number}" for number in range(1025)])
    assert text.splitlines()[19:] == ["row 19", "and 1,005 more rows.", "Nothing was generated."]
