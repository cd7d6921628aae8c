"""Columns: names that are known, names that `columns` gives, and rows that nobody could tell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myna.data.conversation import Message, ToolCall
from myna.data.fields import Unfit
from myna.data.files import Record
from myna.data.formats import FORMATS, FieldsSeen, convert, read_conversations, recognise
from myna.errors import ConfigError, DataError

Write = Callable[[str, str | bytes], Path]


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def messages(path: Path, columns: dict[str, str] | None = None) -> list[list[Message]]:
    rows = read_conversations([path], columns)
    return [list(conversation.messages) for conversation in rows.conversations]


def refusal(path: Path, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as error:
        read_conversations([path], columns)
    assert str(error.value).endswith("Training has not started.")
    return str(error.value)


Q, A = Message("user", "q"), Message("assistant", "a")


QUESTIONS = [form for form in FORMATS if "completion" in form.columns]


@pytest.mark.parametrize("form", QUESTIONS, ids=lambda form: form.name)
def test_every_pair_of_names_is_what_its_mapping_says(form: Any, write: Write) -> None:
    question, answer = form.required
    path = write("a.jsonl", lines({question: "q", answer: "a", "id": 7}))
    assert messages(path) == [[Q, A]]
    first, unused = read_conversations([path]).notes
    assert first.startswith(f"a.jsonl: 1 rows of {form.name}: user = {question}")
    assert first.endswith(f"; assistant, trained = {answer}")
    assert unused == "a.jsonl: fields that are not used: id (1 rows)"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Dolly
        ({"instruction": "q", "context": "c", "response": "a"}, [Message("user", "q\nc"), A]),
        # OpenOrca
        (
            {"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
            [Message("system", "s"), Q, A],
        ),
        # a reasoning data set of the tutorials
        (
            {"question": "q", "think": "hm", "answer": "a"},
            [Q, Message("assistant", "a", reasoning="hm")],
        ),
        # UltraChat: the prompt is also the first message
        (
            {"prompt": "q", "prompt_id": "x", "messages": [{"role": "user", "content": "q"},
             {"role": "assistant", "content": "a"}]},
            [Q, A],
        ),
        # the Alpaca of the hub carries a rendered text
        ({"instruction": "q", "input": "", "output": "a", "text": "Below is …"}, [Q, A]),
    ],
)  # fmt: skip
def test_columns_of_known_data_sets(write: Write, row: Any, expected: list[Message]) -> None:
    assert messages(write("a.jsonl", lines(row))) == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "Answer the question.", "question": "q", "answer": "a"},
            'the row has "instruction" beside "question" and "answer", and nobody can tell which '
            "of them is meant.\n  Say which, for example "
            "`columns: {prompt: instruction, completion: answer}`.",
        ),
        (
            {"question": "q", "answer": "5", "solution": "2 + 3 = 5"},
            'the row has "solution" beside "question" and "answer", and nobody can tell which of '
            "them is meant.\n  Say which, for example "
            "`columns: {prompt: question, completion: solution}`.",
        ),
        (
            {"question": "q", "context": "c", "answer": "a"},
            'the row has "context" beside "question" and "answer", and nobody can tell which of '
            "them is meant.\n  Say which, for example "
            "`columns: {prompt: question, input: context, completion: answer}`.",
        ),
        (
            {"Question": "q", "Complex_CoT": "t", "Response": "a"},
            'the row has "Question", "Complex_CoT", "Response"; expected messages or conversations '
            "(lists of messages), a question and its answer (instruction/output, inputs/targets, "
            "prompt/completion, question/answer …), chosen and rejected, or text.\n"
            '  "Question" looks like "question". "Response" looks like "response". Rename the '
            "fields, or say which is which, for example "
            "`columns: {prompt: Question, completion: Response}`.",
        ),
        (
            {"text": "good film", "label": 1},
            'the row has "label" beside "text", and nobody can tell which of them is meant.\n'
            "  Say which, for example `columns: {prompt: text, completion: label}` or "
            "`columns: {text: text}`.",
        ),
        (
            {"prompt": "q", "completion": "a", "label": False},
            'the row has a "label" of true or false, as data of wanted and unwanted answers do; '
            "every answer here would be trained.\n"
            "  Keep the rows whose answer is wanted, and delete the label.",
        ),
        (
            {"prompt": "q", "response": "a", "images": ["a.png"]},
            'the row has "images"; only text can be trained.\n'
            "  Delete the row, or the field if the text can do without it.",
        ),
        (
            {"system": "s", "system_prompt": "t", "prompt": "q", "response": "a"},
            'the row has both "system" and "system_prompt", which mean the same; expected one of '
            "them.\n  Delete one, or say which to read: `columns: {system: system}`.",
        ),
        ({"text": " \n"}, "text is empty; expected a text."),
        (
            {"chosen": "a", "rejected": "b"},
            "chosen is an answer and the row has no prompt; expected a prompt, or a chosen "
            "conversation with its question.",
        ),
        (
            {
                "prompt": "other",
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "rejected": [],
            },
            "prompt is no question of the conversation in chosen; expected the same in both.\n"
            "  Delete prompt, or write only the answer into chosen.",
        ),
        (
            {
                "prompt": "q",
                "messages": [{"role": "user", "content": "q"}],
                "chosen": "a",
                "rejected": "b",
            },
            'the row has "prompt" and "messages", and both may be what "chosen" answers.\n'
            "  Say which: `columns: {prompt: prompt}` or `columns: {messages: messages}`.",
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "user",
             "content": "a"}]},
            "the answer has no assistant message, so there is nothing to train.\n"
            "  Add the answer or delete the row.",
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "input": "x", "completion": "a"},
            "prompt is a list of messages, and input has a text for which there is no place.\n"
            "  Write it into the last message.",
        ),
        (
            {"prompt": "q", "think": "hm", "completion": [{"role": "assistant", "content": "a",
             "reasoning": "other"}]},
            "think has a text, and completion is not the one answer that it could belong to.\n"
            "  Write it into the message, as reasoning_content.",
        ),
        (
            {"messages": "[{'role': 'user', 'content': 'q'}]"},
            "messages is a text that is not JSON: Expecting property name enclosed in double "
            "quotes at character 3; it looks like Python's notation, JSON has double quotes "
            "(json.dumps).",
        ),
        ({"messages": '{"a": 1, "a": 2}'},
         'messages is a text that is not JSON: the key "a" occurs twice.'),
        ({"messages": "[NaN]"}, "messages is a text that is not JSON: NaN is not JSON."),
        ({"messages": "[1e999]"},
         "messages is a text that is not JSON: the number 1e999 is out of range."),
        ({"messages": "[" * 99_999},
         "messages is a text that is not JSON: lists or objects are nested too deeply."),
        ({"messages": f"[{'9' * 5000}]"},
         "messages is a text that is not JSON: a number has more than 4,300 digits."),
    ],
)  # fmt: skip
def test_rows_that_nobody_can_tell(write: Write, row: Any, expected: str) -> None:
    message = refusal(write("a.jsonl", lines(row)))
    assert message.removeprefix("a.jsonl line 1: ").startswith(expected)


def test_csv_cells_of_messages_and_tools_are_parsed_aloud(write: Write) -> None:
    cells = {
        "messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]',
        "tools": "",
    }
    path = write("a.jsonl", lines(cells, cells))
    assert messages(path) == [[Q, A], [Q, A]]
    assert "a.jsonl: the JSON text in messages was read as what it says (2 rows)" in (
        read_conversations([path]).notes
    )


def test_optional_columns_that_are_read_are_said(write: Write) -> None:
    row = {"question": "q", "answer": "a", "system_prompt": "s"}
    notes = read_conversations([write("a.jsonl", lines(row, row | {"system_prompt": ""}))]).notes
    assert notes == (
        "a.jsonl: 2 rows of question/answer: user = question, newline, input (if any); "
        "assistant, trained = answer",
        "a.jsonl: also read: system_prompt (1 rows)",
    )


def test_preferences_say_that_the_rejected_answer_is_not_used(write: Write) -> None:
    path = write("a.jsonl", lines({"prompt": "q", "chosen": "a", "rejected": "b"}))
    assert messages(path) == [[Q, A]]
    assert read_conversations([path]).notes == (
        "a.jsonl: 1 rows of preferences: assistant, trained = chosen; its prompt is context; "
        "rejected is not used",
        "a.jsonl: also read: prompt (1 rows)",
    )


def test_a_rejected_answer_with_faults_does_not_matter(write: Write) -> None:
    question = {"role": "user", "content": "q"}
    row = {
        "chosen": [question, {"role": "assistant", "content": "a"}],
        "rejected": [question, {"role": "assistant", "content": ""}],
    }
    assert messages(write("a.jsonl", lines(row))) == [[Q, A]]


# Columns of the settings


def test_names_of_the_settings_decide(write: Write) -> None:
    row = {"frage": "q", "antwort": "a", "prompt": "x", "text": "y", "rolle": "s"}
    columns = {"prompt": "frage", "completion": "antwort", "system": "rolle"}
    path = write("a.jsonl", lines(row))
    assert messages(path, columns) == [[Message("system", "s"), Q, A]]
    assert read_conversations([path], columns).notes == (
        "a.jsonl: 1 rows of frage/antwort: user = frage, newline, input (if any); assistant, "
        "trained = antwort",
        "a.jsonl: also read: rolle (1 rows)",
        "a.jsonl: fields that are not used: prompt (1 rows), text (1 rows)",
    )


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "q", "label": "a"}, {"prompt": "text", "completion": "label"}, [Q, A]),
        ({"frage": "q", "answer": "a"}, {"prompt": "frage"}, [Q, A]),
        ({"question": "x", "answer": "a", "q2": "q"}, {"prompt": "q2"}, [Q, A]),
        ({"messages": "x", "q": "q", "a": "a"}, {"prompt": "q", "completion": "a"}, [Q, A]),
        ({"dialog": [["q", "a"]], "q": "q2", "a": "a2"},
         {"prompt": "q", "completion": "a", "history": "dialog"},
         [Q, A, Message("user", "q2"), Message("assistant", "a2")]),
        ({"t": [{"wer": "A", "was": "q"}, {"wer": "B", "was": "a"}]},
         {"messages": "t", "role": "wer", "content": "was", "user_tag": "A", "assistant_tag": "B"},
         [Q, A]),
        ({"conversations": [{"from": "q", "value": "q"}, {"from": "f", "value": '{"name": "s"}'},
                            {"from": "o", "value": "1"}, {"from": "gpt", "value": "a"}]},
         {"user_tag": "q", "function_tag": "f", "observation_tag": "o"},
         [Q, Message("assistant", "", tool_calls=(ToolCall("s", {}),)), Message("tool", "1"), A]),
        ({"frage": "q", "gut": "a", "prompt": "x"}, {"prompt": "frage", "chosen": "gut"}, [Q, A]),
        ({"frage": "q", "chosen": "a", "rejected": "b", "messages": [{"role": "user"}]},
         {"prompt": "frage"}, [Q, A]),
    ],
)  # fmt: skip
def test_columns(write: Write, row: Any, columns: dict[str, str], expected: list[Message]) -> None:
    assert messages(write("a.jsonl", lines(row)), columns) == [expected]


def test_plain_text_of_another_name(write: Write) -> None:
    path = write("a.jsonl", lines({"absatz": "Es war einmal.", "label": 3}))
    (conversation,) = read_conversations([path], {"text": "absatz"}).conversations
    assert (conversation.text, conversation.messages) == ("Es war einmal.", ())


def test_a_column_that_is_not_there_is_named_with_those_found(write: Write) -> None:
    path = write("a.jsonl", lines({"Frage": "q", "antwort": "a"}))
    columns = {"prompt": "frage", "completion": "antwort"}
    assert refusal(path, columns) == (
        'a.jsonl line 1: the row has "Frage", "antwort" and no "frage"; expected frage, antwort '
        "(and, if wanted, input, system, history, reasoning, tools).\n"
        '  Is "Frage" meant? Training has not started.'
    )
    path = write("b.jsonl", lines({"q": "q", "b": "a"}))
    assert refusal(path, columns) == (
        'b.jsonl line 1: the row has "q", "b"; expected frage, antwort (and, if wanted, input, '
        "system, history, reasoning, tools), as `columns: {prompt: frage, completion: antwort}` "
        "says.\n  Mend `columns`. Training has not started."
    )
    path = write("c.jsonl", lines({"prompt": "q", "completion": "a", "persona": "s"}))
    assert refusal(path, {"system": "personna"}) == (
        'c.jsonl: columns.system is "personna", which no row has; the rows have "completion", '
        '"persona", "prompt".\n  Did you mean "persona"? Training has not started.'
    )


def test_columns_of_different_formats_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError) as error:
        read_conversations([write("a.jsonl", lines({"a": "b"}))], {"prompt": "a", "text": "b"})
    assert str(error.value) == (
        "columns has prompt, text, which no format has together; expected the columns of one: "
        "prompt and completion, messages, chosen, or text.\n"
        "  Give each data file its own `columns`, or take out those that are not meant."
    )


def test_tallies_of_parts_add_up_to_the_tally_of_the_whole(write: Write) -> None:
    """A file that is read in parts, perhaps by several processes, has the same notes."""
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "Bot", "content": "a"}], "n": n}
        for n in range(5)
    ]
    rows[3]["tools"] = [{"name": "f"}]
    path = write("a.jsonl", lines(*rows))
    place = read_conversations([path]).conversations[0].place
    form = recognise([Record(row, place) for row in rows])
    parts = [FieldsSeen(), FieldsSeen()]
    for row in rows:
        parts[row["n"] > 1].add(row, convert(row, form), form)
    parts[0].merge(parts[1])
    assert tuple(parts[0].notes("a.jsonl", form)) == read_conversations([path]).notes


def test_a_row_is_refused_with_the_name_of_its_own_column() -> None:
    form = next(form for form in FORMATS if form.name == "question/answer")
    with pytest.raises(Unfit) as refused:
        convert({"question": "q", "answer": " "}, form)
    assert refused.value.finding == "answer is empty; expected a text."
    assert "an empty answer would train the model to say nothing" in refused.value.mend
