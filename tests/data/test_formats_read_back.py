"""Random conversations, written in every format by writers of this test, are read back the same."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Message, Place, ToolCall
from myna.data.fields import Parsed
from myna.data.files import Record
from myna.data.formats import convert, recognise

Row = dict[str, Any]

TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n"\\{}[]<>:😀甄'),
    min_size=1,
    max_size=10,
).filter(str.strip)
NAME = st.sampled_from(["search", "get_weather", "run", "查找"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([0.5, -2.25]) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


def read(row: Row, columns: dict[str, str] | None = None) -> Parsed:
    row = json.loads(json.dumps(row))
    record = Record(row, Place(Path("rows.jsonl"), 1, 1))
    return convert(row, recognise([record], columns))


@st.composite
def dialogues(draw: st.DrawFn, *, min_turns: int = 1) -> list[Message]:
    """Perhaps a system text, then questions and answers."""
    turns = draw(st.lists(st.tuples(TEXT, TEXT), min_size=min_turns, max_size=3))
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


@st.composite
def calls(draw: st.DrawFn) -> ToolCall:
    return ToolCall(
        draw(NAME),
        draw(st.dictionaries(TEXT, VALUE, max_size=2)),
        draw(st.none() | st.sampled_from(["call_1", "call_2"])),
    )


@st.composite
def tool_dialogues(draw: st.DrawFn) -> list[Message]:
    """Calls, several at once, and their results between a question and its answer."""
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append(Message("user", draw(TEXT)))
        for _ in range(draw(st.integers(0, 2))):
            asked = tuple(draw(st.lists(calls(), min_size=1, max_size=2)))
            content = draw(st.just("") | TEXT)
            messages.append(Message("assistant", content, tool_calls=asked))
            messages += [
                Message("tool", draw(st.just("") | TEXT), name=call.name, tool_call_id=call.id)
                for call in asked
            ]
        reasoning = draw(st.none() | TEXT)
        messages.append(Message("assistant", draw(TEXT), reasoning))
    return messages


TOOLS = st.lists(
    st.fixed_dictionaries({"name": NAME, "description": TEXT, "parameters": st.just({})}),
    min_size=1,
    max_size=2,
)


def wrapped(tools: list[Row]) -> tuple[Row, ...]:
    return tuple({"type": "function", "function": tool} for tool in tools)


# The writers, from what the formats' own documents say


def history_row(messages: Sequence[Message], question: str, answer: str) -> Row:
    """Alpaca's, LLaMA-Factory's and ms-swift's: the last exchange in columns, the rest a list."""
    row: Row = {}
    rest = list(messages)
    if rest[0].role == "system":
        row["system"] = rest.pop(0).content
    pairs = [[rest[at].content, rest[at + 1].content] for at in range(0, len(rest), 2)]
    row[question], row[answer] = pairs.pop()
    return row | ({"history": pairs} if pairs else {})


def openai_entry(message: Message, draw: st.DrawFn) -> Row:
    entry: Row = {"role": message.role, "content": message.content}
    if message.content and draw(st.booleans()):
        cut = draw(st.integers(0, len(message.content)))
        parts = [message.content[:cut], message.content[cut:]]
        entry["content"] = [{"type": "text", "text": part} for part in parts]
    if message.tool_calls:
        if not message.content:
            entry["content"] = draw(st.sampled_from(["", None]))
        entry["tool_calls"] = [openai_call(call, draw) for call in message.tool_calls]
    if message.reasoning is not None:
        entry[draw(st.sampled_from(["reasoning_content", "reasoning"]))] = message.reasoning
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            entry[key] = getattr(message, key)
    if draw(st.booleans()):  # as Arrow pads the rows of a table
        entry = {"tool_calls": None, "name": None, "weight": None, "refusal": None} | entry
    return entry


def openai_call(call: ToolCall, draw: st.DrawFn) -> Row:
    arguments: Any = call.arguments
    if draw(st.booleans()):
        arguments = json.dumps(arguments, ensure_ascii=draw(st.booleans()))
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


SPELLINGS = {
    "system": ["system", "System"],
    "user": ["human", "user", "Human"],
    "assistant": ["gpt", "assistant", "chatgpt", "bot", "model"],
    "tool": ["observation", "tool", "function"],
}


def share_gpt_entries(message: Message, draw: st.DrawFn, keys: tuple[str, str]) -> list[Row]:
    if message.tool_calls:
        written = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        if draw(st.booleans()):
            return [{keys[0]: "function_call", keys[1]: json.dumps(call)} for call in written]
        value = json.dumps(written if len(written) > 1 else written[0])
        return [{keys[0]: "function_call", keys[1]: value}]
    spelling = draw(st.sampled_from(SPELLINGS[message.role]))
    return [{keys[0]: spelling, keys[1]: message.content}]


@settings(max_examples=60, deadline=None)
@given(st.data(), dialogues())
def test_columns_of_a_question_and_an_answer(data: st.DataObject, messages: list[Message]) -> None:
    names = [("instruction", "output"), ("inputs", "targets"), ("prompt", "completion")]
    names += [("prompt", "response"), ("question", "answer"), ("query", "response")]
    names += [("input", "output"), ("instruction", "response"), ("problem", "solution")]
    question, answer = data.draw(st.sampled_from(names))
    row = history_row(messages, question, answer)
    if question not in ("inputs", "input") and row[question].strip():
        first, newline, second = row[question].partition("\n")
        if newline and first.strip() and second.strip():
            row[question], row["input"] = first, second
    if data.draw(st.booleans()):  # a CSV's empty cells
        row = {"system": "", "history": ""} | row
    reasoning = data.draw(st.none() | TEXT)
    if reasoning is not None:
        row[data.draw(st.sampled_from(["reasoning", "think", "reasoning_content"]))] = reasoning
    *before, last = messages
    assert read(row).messages == [*before, replace(last, reasoning=reasoning)]


@settings(max_examples=60, deadline=None)
@given(st.data(), dialogues() | tool_dialogues(), st.none() | TOOLS)
def test_openai_messages(
    data: st.DataObject, messages: list[Message], tools: list[Row] | None
) -> None:
    entries = [openai_entry(message, data.draw) for message in messages]
    column = data.draw(st.sampled_from(["messages", "conversations"]))
    row: Row = {column: entries}
    if tools is not None:
        written = data.draw(st.sampled_from([tools, list(wrapped(tools))]))
        row["tools"] = data.draw(st.sampled_from([written, json.dumps(written)]))
    if data.draw(st.booleans()):  # a CSV's cell
        row[column] = json.dumps(entries, ensure_ascii=False)
    found = read(row)
    assert found.messages == messages
    assert found.tools == (None if tools is None else wrapped(tools))


@settings(max_examples=60, deadline=None)
@given(st.data(), dialogues() | tool_dialogues(), st.none() | TOOLS)
def test_share_gpt(data: st.DataObject, messages: list[Message], tools: list[Row] | None) -> None:
    messages = [
        replace(
            message,
            content="" if message.tool_calls else message.content,
            tool_calls=tuple(replace(call, id=None) for call in message.tool_calls),
            reasoning=None,
            name=None,
            tool_call_id=None,
        )
        for message in messages
    ]
    keys = data.draw(st.sampled_from([("from", "value"), ("role", "content")]))
    rest = list(messages)
    row: Row = {}
    if rest[0].role == "system" and data.draw(st.booleans()):
        row["system"] = rest.pop(0).content
    column = data.draw(st.sampled_from(["conversations", "conversation"]))
    row[column] = [
        entry for message in rest for entry in share_gpt_entries(message, data.draw, keys)
    ]
    if tools is not None:
        row["tools"] = json.dumps(tools)
    found = read(row)
    assert found.messages == messages
    assert found.tools == (None if tools is None else wrapped(tools))


@settings(max_examples=30, deadline=None)
@given(dialogues())
def test_conversations_of_exchanges(messages: list[Message]) -> None:
    """xtuner's and Firefly's: each entry is a question and its answer."""
    for question, answer in (("input", "output"), ("human", "assistant")):
        rest = list(messages)
        first: Row = {"system": rest.pop(0).content} if rest[0].role == "system" else {}
        exchanges = [
            {question: rest[at].content, answer: rest[at + 1].content}
            for at in range(0, len(rest), 2)
        ]
        exchanges[0] = first | exchanges[0]
        assert read({"conversation": exchanges}).messages == messages


def as_context(messages: Sequence[Message]) -> list[Message]:
    return [
        replace(message, trained=False) if message.role == "assistant" else message
        for message in messages
    ]


@settings(max_examples=60, deadline=None)
@given(st.data(), dialogues())
def test_lists_of_messages_in_prompt_and_completion(
    data: st.DataObject, messages: list[Message]
) -> None:
    """trl's conversational form: what the prompt says is context."""
    *before, last = messages
    prompt = [{"role": message.role, "content": message.content} for message in before]
    answer = {"role": "assistant", "content": last.content}
    row = {
        "prompt": prompt,
        "completion": data.draw(st.sampled_from([[answer], last.content, answer])),
    }
    assert read(row).messages == [*as_context(before), last]


@settings(max_examples=80, deadline=None)
@given(st.data(), dialogues(), TEXT)
def test_preferences(data: st.DataObject, messages: list[Message], rejected: str) -> None:
    def entries(texts: Sequence[Message], keys: tuple[str, str] = ("role", "content")) -> list[Row]:
        roles = {"user": "human", "assistant": "gpt"} if keys[0] == "from" else {}
        return [{keys[0]: roles.get(m.role, m.role), keys[1]: m.content} for m in texts]

    *before, last = messages
    bad = replace(last, content=rejected)
    rows: list[Row] = [
        {"chosen": entries(messages), "rejected": entries([*before, bad])},  # trl, implicit prompt
        {  # UltraFeedback
            "prompt": before[-1].content,
            "chosen": entries(messages),
            "rejected": entries([*before, bad]),
            "messages": entries(messages),
            "score_chosen": 8.5,
        },
        {"prompt": entries(before), "chosen": entries([last]), "rejected": entries([bad])},
        {"prompt": entries(before), "chosen": last.content, "rejected": rejected},
        {  # LLaMA-Factory
            "conversations": entries(before, ("from", "value")),
            "chosen": {"from": "gpt", "value": last.content},
            "rejected": {"from": "gpt", "value": rejected},
        },
    ]
    if len(before) == 1:
        rows.append({"prompt": before[0].content, "chosen": last.content, "rejected": rejected})
    row = data.draw(st.sampled_from(rows))
    assert read(row).messages == [*as_context(before), last]


@settings(max_examples=40, deadline=None)
@given(st.data(), dialogues(min_turns=2))
def test_flags_of_messages(data: st.DataObject, messages: list[Message]) -> None:
    flagged: list[Message] = []
    entries: list[Row] = []
    for message in messages:
        entry: Row = {"role": message.role, "content": message.content}
        if message.role == "assistant":
            flag, trained, weight = data.draw(
                st.sampled_from(
                    [
                        ({}, True, 1.0),
                        ({"train": True}, True, 1.0),
                        ({"train": False}, False, 1.0),
                        ({"weight": 0}, False, 1.0),
                        ({"weight": 1}, True, 1.0),
                        ({"weight": 0.25}, True, 0.25),
                        ({"loss": False}, False, 1.0),
                        ({"loss": True}, True, 1.0),
                        ({"loss": 2.5}, True, 2.5),
                        ({"train": True, "weight": 3}, True, 3.0),
                        ({"train": False, "weight": 0, "loss": False}, False, 1.0),
                    ]
                )
            )
            entry |= flag
            message = replace(message, trained=trained, weight=weight)
        flagged.append(message)
        entries.append(entry)
    assert read({"messages": entries}).messages == flagged


@settings(max_examples=30, deadline=None)
@given(dialogues(), st.permutations(["frage", "text", "prompt", "output"]))
def test_columns_under_any_name(messages: list[Message], names: list[str]) -> None:
    columns = dict(zip(("prompt", "completion", "system", "history"), names, strict=True))
    row = history_row(messages, "P", "C")
    renamed = {"P": "prompt", "C": "completion"}
    row = {columns[renamed.get(key, key)]: value for key, value in row.items()}
    assert read(row, columns).messages == messages
    dialog = [{"wer": m.role, "was": m.content} for m in messages]
    inner = {"messages": "dialog", "role": "wer", "content": "was"}
    assert read({"dialog": dialog, "text": "x"}, inner).messages == messages


@pytest.mark.parametrize("text", ["a", " a\n\nb ", "甄嬛" * 40])
def test_plain_text(text: str) -> None:
    found = read({"text": text, "source": "web"})
    assert (found.text, found.messages) == (text, [])
