"""Lists of messages: what each entry may say, what is said aloud, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from myna.data.conversation import Message, Place, ToolCall
from myna.data.fields import Parsed, Unfit
from myna.data.files import Record
from myna.data.formats import convert, recognise

Row = dict[str, Any]
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
Q, A = Message("user", "q"), Message("assistant", "a")


def read(row: Row) -> Parsed:
    return convert(row, recognise([Record(row, Place(Path("rows.jsonl"), 1, 1))]))


def refusal(*entries: Row, **columns: Any) -> str:
    with pytest.raises(Unfit) as refused:
        read({"messages": list(entries), **columns})
    return f"{refused.value.finding} {refused.value.mend}".strip()


def answer(**more: Any) -> Row:
    return {**ASSISTANT, **more}


def calling(*calls: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            [USER, answer(train="yes")],
            'messages[1].train is the text "yes"; expected true or false.',
        ),
        ([USER, answer(train=1)], "messages[1].train is the number 1; expected true or false."),
        (
            [USER, answer(weight=-1)],
            "messages[1].weight is the number -1; expected 0 or a number from 1e-6 to 1e6.",
        ),
        (
            [USER, answer(weight=True)],
            "messages[1].weight is true; expected 0 or a number from 1e-6 to 1e6.",
        ),
        (
            [USER, answer(weight=10**400)],
            "messages[1].weight is the number 10000000000000000000; expected 0 or a number from "
            "1e-6 to 1e6.",
        ),
        (
            [USER, answer(loss=float("nan"))],
            "messages[1].loss is the number nan; expected true, false, 0 or a number from 1e-6 to "
            "1e6.",
        ),
        (
            [USER, answer(train=True, loss=False)],
            'messages[1] says different things in "train", "loss"; expected one flag, or the same.',
        ),
        (
            [USER, answer(weight=2, loss=3)],
            'messages[1] says different things in "weight", "loss"; expected one flag, or the '
            "same.",
        ),
        (
            [{**USER, "train": True}, ASSISTANT],
            'messages[0] is to be trained ("train") and is of role user; only answers of the '
            "assistant are. Delete the flag. A text that is trained whole can stand in a column "
            "`text`.",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "q"},
              {"type": "image_url", "image_url": {"url": "a.png"}}]}, ASSISTANT],
            'messages[0].content[1] is of type "image_url"; expected a part of text. Only text can '
            'be trained. A part is written {"type": "text", "text": …}.',
        ),
        (
            [{"role": "user", "content": ["q"]}, ASSISTANT],
            'messages[0].content[0] is the text "q"; expected a part of text. Only text can be '
            'trained. A part is written {"type": "text", "text": …}.',
        ),
        (
            [{**USER, "images": ["a.png"]}, ASSISTANT],
            'messages[0] has "images"; only text can be trained. Delete the row, or the field if '
            "the text can do without it.",
        ),
        (
            [USER, answer(toolcalls=[1])],
            'messages[1] has a field "toolcalls", which would not be used. Did you mean '
            '"tool_calls"?',
        ),
        (
            [{**USER, "from": "human"}, ASSISTANT],
            'messages[0] has both "role" and "from"; expected one of them. Delete the one that is '
            "not meant.",
        ),
        (
            [{"from": "human", "text": "q"}],
            'messages[0] has "from", "text" and no "value"; expected "from" and "value".',
        ),
        (
            [{**USER, "reasoning": "why"}, ASSISTANT],
            'messages[0].reasoning is the text "why" of role user; expected a text of an '
            "assistant.",
        ),
        (
            [USER, answer(reasoning="a", reasoning_content="b")],
            'messages[1] has different texts in "reasoning_content", "reasoning"; expected one '
            "reasoning.",
        ),
        (
            [USER, {"role": "tool", "content": "1"}, ASSISTANT],
            "messages[1] is of role tool after user; expected assistant. The result of a tool "
            "stands behind the assistant's call.",
        ),
        (
            [USER, ASSISTANT, ASSISTANT],
            "messages[2] is of role assistant after assistant; expected user or tool. Join the two "
            "assistant messages into one.",
        ),
        (
            [{**USER, "tool_calls": [{"name": "f"}]}, ASSISTANT],
            "messages[0] has tool calls and is of role user; only an assistant calls tools.",
        ),
        (
            [USER, {"role": "tool_call", "content": "f()"}],
            "messages[1].content is a text that is not JSON: Expecting value at character 1.",
        ),
        (
            [USER, {"role": "tool_call", "content": "3"}],
            'messages[1].content is the number 3; expected a call, {"name": …, "arguments": {…}}.',
        ),
        (
            [USER, calling({"function": {"arguments": {}}})],
            'messages[1].tool_calls[0] is a call with "arguments"; expected "name" and '
            '"arguments", by themselves or under "function".',
        ),
        (
            [USER, calling({"name": "f", "arguments": "{"})],
            "the arguments of messages[1].tool_calls[0] (f) is a text that is not JSON: Expecting "
            "property name enclosed in double quotes at character 2.",
        ),
        (
            [USER, calling({"name": "f", "arguments": [1]})],
            "the arguments of messages[1].tool_calls[0] (f) are a list; expected an object, or the "
            "JSON text of one.",
        ),
        (
            [USER, calling({"name": "f", "id": 7})],
            "messages[1].tool_calls[0].id is the number 7; expected a text.",
        ),
        (
            [USER, {"role": "assistant", "content": "a", "tool_calls": {"name": "f"}}],
            "messages[1].tool_calls is an object; expected a list of calls.",
        ),
        (
            [USER, calling({"name": "f"}), {"role": "tool", "content": {"a": 1}}, ASSISTANT],
            "messages[2].content is an object; expected a text. Write it as the text of its JSON.",
        ),
        (
            [USER, calling({"name": "f"}), {"role": "tool", "content": "1", "tool_call_id": 3}],
            "messages[2].tool_call_id is the number 3; expected a text.",
        ),
        ([{"input": "q", "output": ""}], "messages[0].output is empty; expected a text. Fill it in "
         "or delete the row: an empty answer would train the model to say nothing."),
    ],
)  # fmt: skip
def test_entries_that_are_refused(entries: list[Row], expected: str) -> None:
    assert refusal(*entries) == expected


def test_two_system_texts_are_refused() -> None:
    system = {"role": "system", "content": "s"}
    assert read({"messages": [system, USER, ASSISTANT], "system": "s"}).messages == [
        Message("system", "s"),
        Q,
        A,
    ]
    assert refusal(system, USER, ASSISTANT, system="t") == (
        "system and messages[0] are two different system texts; expected one. Delete one of them."
    )


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ({"name": "f"}, "tools is an object; expected a list of JSON schemas."),
        ([1], "tools is a list; expected a list of JSON schemas."),
        (
            [{"type": "function"}],
            'tools[0] has "type" and no function with a name; expected {"type": "function", '
            '"function": {"name": …, "parameters": …}}.',
        ),
        ([{"name": 3}], "tools[0].name is the number 3; expected a text."),
        ("f", "tools is a text that is not JSON: Expecting value at character 1."),
    ],
)
def test_tools_that_are_refused(tools: Any, expected: str) -> None:
    assert refusal(USER, ASSISTANT, tools=tools) == expected


def test_tools_may_be_texts_of_json_and_blank() -> None:
    wrapped = {"type": "function", "function": {"name": "f"}}
    for tools in ([wrapped], ['{"name": "f"}'], '[{"name": "f", "type": "function"}]'):
        assert read({"messages": [USER, ASSISTANT], "tools": tools}).tools == (wrapped,)
    for tools in (None, [], "", "[]"):
        assert read({"messages": [USER, ASSISTANT], "tools": tools}).tools is None


def test_what_is_read_otherwise_than_written_is_said() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "s", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "q"}] * 2, "id": 4},
            {**calling({"name": "f", "arguments": {"a": None}}), "role": "model"},
            {"role": "observation", "content": ""},
            answer(weight=0.5),
            USER,
        ],
        "tools": [{"name": "f"}],
    }
    found = read(row)
    assert found.messages == [
        Message("system", "s"),
        Message("user", "qq"),
        Message("assistant", "", tool_calls=(ToolCall("f", {"a": None}),)),
        Message("tool", ""),
        Message("assistant", "a", weight=0.5),
    ]
    assert set(found.remarks) == {
        'role "developer" is read as system',
        'role "model" is read as assistant',
        'role "observation" is read as tool',
        "contents in several parts of text are joined without a gap",
        '"id" of single messages is not used',
        "arguments of tool calls hold null; Arrow and Parquet write it for keys that a row lacks",
        "train, weight and loss of single messages are obeyed",
        "the last user turn has no answer and is left out",
        'bare tools are wrapped as {"type": "function", "function": …}, as servers are sent them',
    }


def test_a_result_without_answer_is_left_out_aloud() -> None:
    call = calling({"name": "f", "arguments": ""})
    found = read({"messages": [USER, call, {"role": "tool", "content": "1"}]})
    assert found.messages == [Q, Message("assistant", "", tool_calls=(ToolCall("f", {}),))]
    assert found.remarks == ("the last result of a tool has no answer and is left out",)


def test_calls_in_a_row_are_one_turn_and_old_function_calls_are_calls() -> None:
    entries = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "function_call", "value": '{"name": "g", "arguments": "{}"}'},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    both = (ToolCall("f", {"a": 1}), ToolCall("g", {}))
    wanted = [Q, Message("assistant", "", tool_calls=both), Message("tool", "1")]
    assert read({"conversations": entries}).messages == [*wanted, Message("tool", "2"), A]
    old = {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": ""}}
    result = {"role": "function", "name": "g", "content": "2"}
    assert read({"messages": [USER, old, result, ASSISTANT]}).messages == [
        Q,
        Message("assistant", "", tool_calls=(ToolCall("g", {}),)),
        Message("tool", "2", name="g"),
        A,
    ]


def test_a_greeting_is_context_and_said() -> None:
    greeting = {"from": "gpt", "value": "hello"}
    rest = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = read({"conversations": [greeting, *rest]})
    assert found.messages == [Message("assistant", "hello", trained=False), Q, A]
    assert found.remarks == (
        "the assistant's greeting before the first question is context, not trained",
    )
    kept = read({"conversations": [{**greeting, "train": True}, *rest], "system": "s"})
    assert kept.messages == [Message("system", "s"), Message("assistant", "hello"), Q, A]
