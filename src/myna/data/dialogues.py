"""Dialogues: rows that hold a list of messages, OpenAI's or ShareGPT's.

Owns how one entry is read: the spellings of its role, its text, tool calls, flags of what is
trained. The order of turns is `turns.py`'s. Rows of a question and an answer are `pairs.py`'s,
chosen and rejected answers `preferences.py`'s; both come here where they hold lists of messages.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from myna.data.conversation import ROLES, Message, Role, ToolCall
from myna.data.fields import (
    EMPTY_ANSWER,
    Fields,
    Parsed,
    Unfit,
    is_blank,
    list_keys,
    nearest,
)
from myna.data.files import describe
from myna.data.tool_calls import read_call, read_call_text, read_calls
from myna.data.turns import Turn, answered

ROLE_SPELLINGS: dict[str, str] = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "tool_call",
    "tool_call": "tool_call",
} | {role: role for role in ROLES}
"""Role as data sets write it, in small letters -> ours; `tool_call` is an assistant's turn whose
text is the JSON of a call."""

TAGS = {
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "tool_call",
}
"""Names in `columns` for a spelling of a role -> the role; as in LLaMA-Factory."""

MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos")

ENTRY_COLUMNS: dict[str, tuple[str, ...]] = {
    "role": ("role", "from"),
    "content": ("content", "value"),
}
"""Keys of an entry that hold its role and its text; the second of each is ShareGPT's."""

_USUAL = frozenset({*ROLES, "human", "gpt"})
"""Spellings that the mapping of the format names, so that no remark does."""

_EXCHANGES = (("input", "output"), ("human", "assistant"), ("user", "assistant"))
"""Keys of an entry that is a question and its answer: xtuner's and Firefly's conversations."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("train", "weight", "loss")
_USED = (*_REASONING, *_FLAGS, "tool_calls", "function_call", "tool_call_id", "name")

_LEAST_WEIGHT, _GREATEST_WEIGHT = 1e-6, 1e6
"""Beyond them sums of losses in float32 lose the other answers."""


def from_messages(fields: Fields) -> Parsed:
    """A row that is one list of messages; every assistant's is trained if no flag says otherwise.

    Raises:
        Unfit: an entry cannot be read, or the turns are in no order that a dialogue has.
    """
    turns = read_turns(fields.json("messages"), fields.name("messages"), fields)
    return answered([], turns, fields)


def part(column: str, role: Role, fields: Fields, *, mend: str) -> list[Turn]:
    """The turns in a column that holds a text that `role` says, a message, or a list of them."""
    value, name = fields.value(column), fields.name(column)
    if isinstance(value, (list, dict)):
        return read_turns([value] if isinstance(value, dict) else value, name, fields)
    return [Turn(Message(role, fields.text(column, required=True, mend=mend)), name)]


def read_turns(entries: Any, name: str, fields: Fields) -> list[Turn]:
    """The entries of a list of messages, which is called `name`."""
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else describe(entries)
        raise Unfit(
            f"{name}:{found}", f"{name} is {found}; expected a list of role/content objects."
        )
    turns: list[Turn] = []
    for at, entry in enumerate(entries):
        for turn in _read_entry(entry, f"{name}[{at}]", fields):
            if turns and (joined := _joined_calls(turns[-1], turn)):
                turns[-1] = joined
            else:
                turns.append(turn)
    return turns


def _joined_calls(before: Turn, turn: Turn) -> Turn | None:
    """One turn for two calls in a row: an assistant that asks for several tools at once."""
    one, two = before.message, turn.message
    if not (before.is_call and turn.is_call):
        return None
    if (one.trained, one.weight) != (two.trained, two.weight):
        return None
    return replace(before, message=replace(one, tool_calls=one.tool_calls + two.tool_calls))


def _read_entry(entry: Any, name: str, fields: Fields) -> list[Turn]:
    if not isinstance(entry, dict):
        raise Unfit(
            f"message:{type(entry).__name__}",
            f'{name} is {describe(entry)}; expected an object with "role" and "content".',
        )
    role_key = _key_of(entry, fields.names("role"), name)
    if role_key is None and (exchange := _exchange_of(entry)):
        return _read_exchange(entry, exchange, name, fields)
    content_key = _key_of(entry, fields.names("content"), name)
    is_called = not is_blank(entry.get("tool_calls")) or not is_blank(entry.get("function_call"))
    if role_key is None or (content_key is None and not is_called):
        raise _key_missing(entry, name, fields, "role" if role_key is None else "content")
    role = _role(entry[role_key], f"{name}.{role_key}", fields)
    _check_unused(entry, (role_key, content_key), name, fields)
    calls = _calls(entry, role, name, fields)
    content_name = f"{name}.{content_key}"
    value = None if content_key is None else entry[content_key]
    content = "" if value is None and calls else _content(value, content_name, fields)
    if is_call := role == "tool_call":
        calls, content, role = read_call_text(content, content_name, fields), "", "assistant"
    if not content.strip() and (role == "user" or (role == "assistant" and not calls)):
        raise Unfit(
            f"empty:{role}",
            f"{content_name} ({role}) is empty; expected a text.",
            EMPTY_ANSWER if role == "assistant" else "Fill it in or delete the row.",
        )
    trained, weight, flagged = _flags(entry, role, name, fields)
    message = Message(
        cast(Role, role),
        content,
        _reasoning(entry, role, name),
        trained,
        weight,
        calls,
        _identifier(entry, "name", name),
        _identifier(entry, "tool_call_id", name),
    )
    return [Turn(message, name, flagged, is_call)]


def _key_of(entry: dict[str, Any], names: Sequence[str], name: str) -> str | None:
    there = [key for key in names if key in entry]
    filled = [key for key in there if entry[key] is not None]
    if len(filled) > 1:
        raise Unfit(
            f"two_keys:{filled[0]}:{filled[1]}",
            f'{name} has both "{filled[0]}" and "{filled[1]}"; expected one of them.',
            "Delete the one that is not meant.",
        )
    return next(iter(filled or there), None)


def _key_missing(entry: dict[str, Any], name: str, fields: Fields, role: str) -> Unfit:
    names = [fields.names(part) for part in ("role", "content")]
    foreign = any(key in entry for part in names for key in part[1:])
    expected = [part[-1] if foreign else part[0] for part in names]
    missing = expected[role == "content"]
    more = "" if foreign else ' (and "reasoning_content")'
    return Unfit(
        f"message_key:{missing}:{','.join(sorted(entry))[:200]}",
        f'{name} has {list_keys(entry)} and no "{missing}"; expected "{expected[0]}" and '
        f'"{expected[1]}"{more}.',
    )


def _exchange_of(entry: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _EXCHANGES if all(key in entry for key in pair)), None)


def _read_exchange(
    entry: dict[str, Any], exchange: tuple[str, str], name: str, fields: Fields
) -> list[Turn]:
    turns: list[Turn] = []
    system = entry.get("system")
    if not is_blank(system):
        turns.append(Turn(Message("system", _content(system, f"{name}.system", fields)), name))
    for key, role in zip(exchange, ("user", "assistant"), strict=True):
        text = _content(entry[key], f"{name}.{key}", fields)
        if not text.strip():
            raise Unfit(
                f"empty:{key}",
                f"{name}.{key} is empty; expected a text.",
                EMPTY_ANSWER if role == "assistant" else "Fill it in or delete the row.",
            )
        turns.append(Turn(Message(cast(Role, role), text), name))
    for key in entry:
        if key not in (*exchange, "system") and not is_blank(entry[key]):
            fields.remarks.append(f'"{key}" of single messages is not used')
    return turns


def _role(value: Any, name: str, fields: Fields) -> str:
    """Our role, or `tool_call`."""
    spelling = value.strip().lower() if isinstance(value, str) else ""
    tagged = (role for tag, role in TAGS.items() if value in fields.names(tag))
    role = next(tagged, None) or ROLE_SPELLINGS.get(spelling)
    if role is None:
        shown = f'"{value}"' if isinstance(value, str) else describe(value)
        near = difflib.get_close_matches(spelling, ROLE_SPELLINGS, n=1)
        raise Unfit(
            f"role:{shown}",
            f"{name} is {shown}; expected system, user, assistant or tool.",
            f'Did you mean "{near[0]}"?' if near else "",
        )
    if spelling not in _USUAL:
        fields.remarks.append(
            f'role "{value}" is read as '
            + ("a call of a tool by the assistant" if role == "tool_call" else role)
        )
    return role


def _check_unused(
    entry: dict[str, Any], used: Sequence[str | None], name: str, fields: Fields
) -> None:
    for key, value in entry.items():
        if key in used or key in _USED or is_blank(value):
            continue
        if key in MEDIA:
            raise Unfit(
                f"media:{key}",
                f'{name} has "{key}"; only text can be trained.',
                "Delete the row, or the field if the text can do without it.",
            )
        absent = tuple(known for known in _USED if known not in entry)
        if near := nearest(key, absent):
            raise Unfit(
                f"message_unknown:{key}",
                f'{name} has a field "{key}", which would not be used.',
                f'Did you mean "{near}"?',
            )
        fields.remarks.append(f'"{key}" of single messages is not used')


def _content(value: Any, name: str, fields: Fields) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unfit(
            f"content:{type(value).__name__}",
            f"{name} is {describe(value)}; expected a text.",
            "Write it as the text of its JSON." if isinstance(value, dict) else "",
        )
    texts: list[str] = []
    for at, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        found = f'of type "{kind}"' if isinstance(kind, str) else describe(part)
        raise Unfit(
            f"part:{found}",
            f"{name}[{at}] is {found}; expected a part of text. Only text can be trained.",
            'A part is written {"type": "text", "text": …}.',
        )
    if len(texts) > 1:
        fields.remarks.append("contents in several parts of text are joined without a gap")
    return "".join(texts)


def _calls(entry: dict[str, Any], role: str, name: str, fields: Fields) -> tuple[ToolCall, ...]:
    calls = read_calls(entry.get("tool_calls"), f"{name}.tool_calls", fields)
    if not is_blank(entry.get("function_call")):
        calls = (*calls, read_call(entry["function_call"], f"{name}.function_call", fields))
    if calls and role != "assistant":
        raise Unfit(
            f"calls_of:{role}",
            f"{name} has tool calls and is of role {role}; only an assistant calls tools.",
        )
    return calls


def _reasoning(entry: dict[str, Any], role: str, name: str) -> str | None:
    given = {key: entry[key] for key in _REASONING if not is_blank(entry.get(key))}
    for key, value in given.items():
        if not isinstance(value, str) or role != "assistant":
            raise Unfit(
                "reasoning",
                f"{name}.{key} is {describe(value)} of role {role}; "
                "expected a text of an assistant.",
            )
    if len(set(given.values())) > 1:
        raise Unfit(
            "two_reasonings",
            f"{name} has different texts in {list_keys(given)}; expected one reasoning.",
        )
    return next(iter(given.values()), None)


def _identifier(entry: dict[str, Any], key: str, name: str) -> str | None:
    value = entry.get(key)
    if is_blank(value):
        return None
    if not isinstance(value, str):
        raise Unfit(key, f"{name}.{key} is {describe(value)}; expected a text.")
    return value


def _flags(entry: dict[str, Any], role: str, name: str, fields: Fields) -> tuple[bool, float, bool]:
    """(trained, weight, whether the row says so), from `train`, `weight` and `loss`."""
    given = {key: entry[key] for key in _FLAGS if entry.get(key) is not None}
    if not given:
        return True, 1.0, False
    for key, value in given.items():
        _check_flag(key, value, name)
    switches = {bool(value) for value in given.values()}
    weights = {float(value) for value in given.values() if not isinstance(value, bool)}
    if len(switches) > 1 or len(weights) > 1:
        raise Unfit(
            "flags",
            f"{name} says different things in {list_keys(given)}; expected one flag, or the same.",
        )
    (trained,) = switches
    if trained and role != "assistant":
        raise Unfit(
            f"flag_of:{role}",
            f"{name} is to be trained ({list_keys(given)}) and is of role {role}; only answers "
            "of the assistant are.",
            "Delete the flag. A text that is trained whole can stand in a column `text`.",
        )
    fields.remarks.append("train, weight and loss of single messages are obeyed")
    if role != "assistant":
        return True, 1.0, True
    return trained, weights.pop() if weights and trained else 1.0, True


def _check_flag(key: str, value: Any, name: str) -> None:
    is_switch = isinstance(value, bool)
    if is_switch and key != "weight":
        return
    is_number = isinstance(value, (int, float)) and not is_switch and key != "train"
    if is_number and (value == 0 or _LEAST_WEIGHT <= value <= _GREATEST_WEIGHT):
        return
    expected = {
        "train": "true or false",
        "weight": "0 or a number from 1e-6 to 1e6",
        "loss": "true, false, 0 or a number from 1e-6 to 1e6",
    }
    raise Unfit(f"flag:{key}", f"{name}.{key} is {describe(value)}; expected {expected[key]}.")
