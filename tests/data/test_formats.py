import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from myna.data.formats import read_conversations
from myna.data.sources import Source
from myna.errors import DataError

NAN = float("nan")
Write = Callable[[str, str | bytes], Path]


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def turns(path: Path) -> list[list[tuple[str, str]]]:
    return [
        [(message.role, message.content) for message in conversation.messages]
        for conversation in read_conversations([path]).conversations
    ]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_conversations([path])
    assert str(error.value).endswith("Training has not started.")
    return str(error.value)


def messages(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_input_follows_the_instruction_on_a_new_line(write: Write) -> None:
    # 46 of 61 tutorials glue both without anything between them.
    path = write(
        "a.jsonl",
        lines(
            {"instruction": "翻译", "input": "你好", "output": "hello"},
            {"instruction": "hi", "input": "", "output": " yes\n"},
            {"instruction": "hi", "input": None, "output": "yes"},
            {"instruction": "", "input": "only", "output": "yes"},
        ),
    )
    assert turns(path) == [
        [("user", "翻译\n你好"), ("assistant", "hello")],
        [("user", "hi"), ("assistant", " yes\n")],
        [("user", "hi"), ("assistant", "yes")],
        [("user", "only"), ("assistant", "yes")],
    ]


def test_system_and_history_of_an_instruction(write: Write) -> None:
    path = write(
        "a.jsonl",
        lines(
            {
                "system": "Be brief.",
                "history": [["q1", "a1"], ["q2", "a2"]],
                "instruction": "q3",
                "output": "a3",
            }
        ),
    )
    assert turns(path) == [
        [
            ("system", "Be brief."),
            ("user", "q1"),
            ("assistant", "a1"),
            ("user", "q2"),
            ("assistant", "a2"),
            ("user", "q3"),
            ("assistant", "a3"),
        ]
    ]


def test_bluelm_markers_become_turns(write: Write) -> None:
    path = write(
        "a.jsonl",
        lines(
            {"inputs": "[|Human|]:你好\n[|AI|]:", "targets": "好"},
            {"inputs": "<s>[|Human|]:1\n[|AI|]:2</s>[|Human|]:3[|AI|]:", "targets": "4"},
            {"inputs": "plain", "targets": "text"},
        ),
    )
    rows = read_conversations([path])
    assert turns(path) == [
        [("user", "你好"), ("assistant", "好")],
        [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")],
        [("user", "plain"), ("assistant", "text")],
    ]
    # vivo trains targets only.
    assert [message.trained for message in rows.conversations[1].messages] == [
        True,
        False,
        True,
        True,
    ]
    assert rows.notes[1] == (
        "a.jsonl: BlueLM's role markers in inputs were read as turns; only targets is trained "
        "(2 rows)"
    )


def test_bluelm_markers_out_of_order(write: Write) -> None:
    path = write("a.jsonl", lines({"inputs": "x[|Human|]:你好", "targets": "好"}))
    assert refusal(path) == (
        "a.jsonl line 1: inputs holds BlueLM's role markers in the order [|Human|]: with text "
        "before the first; expected [|Human|]: and [|AI|]: in turn, beginning with [|Human|]: and "
        "ending with [|AI|]: with nothing behind it.\n  Write the plain text without markers, or "
        "all turns with them. Training has not started."
    )


def test_messages_with_parts_reasoning_and_tools(write: Write) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c", "reasoning_content": "why", "name": None},
        ],
        "tools": [{"name": "search"}],
    }
    (conversation,) = read_conversations([write("a.jsonl", lines(row))]).conversations
    assert [message.content for message in conversation.messages] == ["s", "ab", "c"]
    assert conversation.messages[2].reasoning == "why"
    assert conversation.tools == ({"type": "function", "function": {"name": "search"}},)


def test_the_mapping_and_unused_fields_are_said(write: Write) -> None:
    rows = [{"instruction": "a", "output": "b", "id": 1}, {"instruction": "a", "output": "b"}]
    notes = read_conversations([write("a.json", json.dumps(rows))]).notes
    assert notes == (
        "a.json: 2 rows of instruction/input/output: user = instruction, newline, input (if any); "
        "assistant, trained = output",
        "a.json: fields that are not used: id (1 rows)",
    )


def test_a_last_question_without_answer_is_left_out_aloud(write: Write) -> None:
    path = write("a.jsonl", lines(messages(("user", "q"), ("assistant", "a"), ("user", "r"))))
    assert turns(path) == [[("user", "q"), ("assistant", "a")]]
    assert "a.jsonl: the last user turn has no answer and is left out (1 rows)" in (
        read_conversations([path]).notes
    )


def test_wrong_role_is_listed_once_with_all_lines(write: Write) -> None:
    bad = messages(("user", "q"), ("asistant", "a"))
    good = messages(("user", "q"), ("assistant", "a"))
    assert refusal(write("train.jsonl", lines(good, bad, good, bad))) == (
        'train.jsonl line 2: messages[1].role is "asistant"; expected system, user, assistant or '
        'tool.\n  Did you mean "assistant"?  2 rows have this fault: lines 2, 4. Training has not '
        "started."
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            messages(("hunam", "q"), ("gpt", "a")),
            'messages[0].role is "hunam"; expected system, user, assistant or tool.\n'
            '  Did you mean "human"?',
        ),
        (
            messages(("user", "q")),
            "the row has no assistant message, so there is nothing to train.\n"
            "  Add the answer or delete the row.",
        ),
        (
            messages(("user", "q"), ("assistant", " \n")),
            "messages[1].content (assistant) is empty; expected a text.\n  Fill it in or delete "
            "the "
            "row: an empty answer would train the model to say nothing.",
        ),
        (
            messages(("user", "q"), ("user", "r"), ("assistant", "a")),
            "messages[1] is of role user after user; expected assistant.\n"
            "  Join the two user messages into one.",
        ),
        (
            messages(("user", "q"), ("system", "s"), ("assistant", "a")),
            "messages[1] is of role system after user; expected assistant.\n"
            "  A system message stands first, once.",
        ),
        (
            messages(
                ("assistant", "a"),
            ),
            "the row has an answer and no user message before it, so nothing asks for it.\n"
            "  Add the question. A text that answers nothing can stand in a column `text`: it is "
            "trained whole.",
        ),
        ({"messages": []}, "messages is an empty list; expected a list of role/content objects."),
        (
            {"messages": [{"role": "user", "text": "q"}]},
            'messages[0] has "role", "text" and no "content"; expected "role" and "content" (and '
            '"reasoning_content").',
        ),
        (
            {"messages": [{"role": "assistant", "content": "q", "tool_calls": [1]}]},
            'messages[0].tool_calls[0] is a call with the number 1; expected "name" and '
            '"arguments", by themselves or under "function".',
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content is null; expected a text.",
        ),
        (
            {"instruction": "q", "output": ""},
            "output is empty; expected a text.\n  Fill it in or delete the row: an empty answer "
            "would train the model to say nothing.",
        ),
        (
            {"instruction": "q", "input": ""},
            'the row has "instruction", "input" and no "output"; expected instruction, output '
            "(and, if wanted, input, system, history, reasoning, tools).",
        ),
        (
            {"instruction": 5, "output": "a"},
            "instruction is the number 5; expected a text.\n  Write it in double quotes.",
        ),
        (
            {"instruction": "q", "inputs": "x", "output": "a"},
            'the row has a field "inputs", which would not be used.\n  Did you mean "input"?',
        ),
        (
            {"instruction": "q", "output": "a", "history": ["b"]},
            "history is of another shape; expected a list of [question, answer] pairs of texts.",
        ),
        (
            {"frage": "q", "antwort": "a"},
            'the row has "frage", "antwort"; expected messages or conversations (lists of '
            "messages), a question and its answer (instruction/output, inputs/targets, "
            "prompt/completion, question/answer …), chosen and rejected, or text.\n"
            "  Rename the fields, or say which is which, for example "
            "`columns: {prompt: frage, completion: antwort}`.",
        ),
        (
            {"Message": []},
            'the row has "Message"; expected messages or conversations (lists of messages), a '
            "question and its answer (instruction/output, inputs/targets, prompt/completion, "
            "question/answer …), chosen and rejected, or text.\n"
            '  "Message" looks like "messages". Rename the fields, or say which is which, for '
            "example `columns: {prompt: COLUMN, completion: COLUMN}`.",
        ),
    ],
)
def test_rows_that_do_not_fit(write: Write, row: Any, expected: str) -> None:
    message = refusal(write("a.jsonl", lines(row)))
    assert message.removeprefix("a.jsonl line 1: ").startswith(expected)


def test_a_row_unlike_the_others_says_which_keys_it_has(write: Write) -> None:
    path = write(
        "a.jsonl", lines({"instruction": "q", "output": "a"}, {"Instruction": "q", "output": "a"})
    )
    assert refusal(path) == (
        'a.jsonl line 2: the row has "Instruction", "output" and no "instruction"; expected '
        "instruction, output (and, if wanted, input, system, history, reasoning, tools).\n"
        '  Is "Instruction" meant? Training has not started.'
    )


def test_broken_json_and_bad_rows_are_one_error(write: Write) -> None:
    path = write("a.jsonl", lines({"instruction": "q", "output": ""}) + '\n{"instruction": }\n')
    message = refusal(path)
    assert "a.jsonl line 1: output is empty" in message
    assert "a.jsonl line 2, column 17: broken JSON: found " in message


def test_empty_list(write: Write) -> None:
    assert refusal(write("a.json", "[ ]")) == (
        "a.json holds no rows; expected at least one.\n  Training has not started."
    )


def test_the_reference_data(write: Write) -> None:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "huanhuan.json"
    if not path.exists():
        pytest.skip("huanhuan.json is not beside the repository")
    rows = read_conversations([path])
    assert len(rows.conversations) == 3729
    assert rows.content_hash == "1bbe8b09857274adc58186919622554df7f71dcee8655537f6a8b80993d6e6f3"


def test_bad_rows_are_skipped_where_that_is_asked_for(write: Write) -> None:
    good = {"instruction": "a", "output": "b"}
    path = write(
        "a.jsonl",
        lines(good, {"instruction": "a", "output": 1}) + "\n{oops\n" + lines(good, {"x": NAN}),
    )
    rows = read_conversations([path], on_bad_row="skip")
    assert [conversation.place.line for conversation in rows.conversations] == [1, 4]
    assert rows.refused == {"json": 1, "not_a_number": 1, "type": 1}
    note = "1 bad row skipped (json), the first: a.jsonl line 3, column 2: broken JSON: "
    assert any(said.startswith(note) for said in rows.notes)
    assert refusal(path).count("a.jsonl line") == 3


def test_the_number_of_rows_is_that_of_the_entry(write: Write) -> None:
    row = {"instruction": "a", "output": "b"}
    paths = [write(name, lines(*[row] * 3)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    sources = [Source(path, rows=4, entry=0) for path in paths[:2]] + [Source(paths[2], entry=1)]
    places = [
        (conversation.place.file.name, conversation.place.line)
        for conversation in read_conversations(sources).conversations
    ]
    assert places == [
        *(("a.jsonl", line) for line in (1, 2, 3)),
        ("b.jsonl", 1),
        *(("c.jsonl", line) for line in (1, 2, 3)),
    ]


def test_how_a_file_is_read_is_said(write: Write) -> None:
    path = write("a.csv", "instruction;output\na;b\n")
    notes = read_conversations([path]).notes
    assert notes[0] == "a.csv: CSV divided by a semicolon, columns instruction, output"
    assert notes[1].startswith("a.csv: 1 rows of instruction/input/output")
