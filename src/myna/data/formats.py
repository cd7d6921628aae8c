"""Formats: what the keys of a row mean, and the conversation they make.

Owns the three shapes of rows (instruction/input/output, BlueLM's inputs/targets, messages), how
one is recognised by its keys, and the rules a conversation keeps. Reading is `files.py`; control
tokens, templates and lengths need a tokenizer and are left to `encode.py`.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from myna.data.conversation import ROLES, Conversation, Message, Role
from myna.data.faults import Fault, Faults, OnBadRow
from myna.data.files import BadRow, Record, content_hash, content_sha256, describe, look_at
from myna.data.sources import Source, read_sources
from myna.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Rows:
    """The conversations of all files, and what there is to say about them."""

    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...]
    """One line per file that says how its fields are understood, and what is not used."""
    content_hash: str
    """sha256 of the bytes read."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Rows that were skipped, by reason."""


@dataclass(frozen=True)
class Format:
    """One shape of rows."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    mapping: str
    """How the fields become turns, for the person who reads along."""
    convert: Callable[[dict[str, Any]], "Parsed"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A row's messages, and remarks that are counted over the file."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] | None = None
    remarks: tuple[str, ...] = ()


class Unfit(Exception):
    """A row that does not make a conversation."""

    def __init__(self, kind: str, finding: str, mend: str = "") -> None:
        super().__init__(finding)
        self.kind, self.finding, self.mend = kind, finding, mend


def read_conversations(sources: Sequence[Path | Source], on_bad_row: OnBadRow = "stop") -> Rows:
    """Read all files and map every row to a conversation that has an answer to train on.

    Raises:
        DataError: files that cannot be read, or all rows that do not fit, listed at once; with
            `skip`, such rows are left out and counted.
    """
    conversations: list[Conversation] = []
    notes: list[str] = []
    faults = Faults(on_bad_row)
    named = [
        item if isinstance(item, Source) else Source(item, entry=number)
        for number, item in enumerate(sources)
    ]
    digests = [content_sha256(source.path) for source in named]
    for source, records in zip(named, _read_records(named, faults), strict=True):
        name = source.path.name
        if note := look_at(source.path).note:
            notes.append(f"{name}: {note}")
        if not records:
            continue
        form = recognise(records)
        unused: Counter[str] = Counter()
        remarks: Counter[str] = Counter()
        for record in records:
            try:
                parsed = convert(record.value, form)
            except Unfit as error:
                faults.add(Fault(error.kind, record.place, error.finding, error.mend))
                continue
            conversations.append(Conversation(tuple(parsed.messages), record.place, parsed.tools))
            unused.update(key for key in record.value if key not in form.required + form.optional)
            remarks.update(parsed.remarks)
        notes.append(f"{name}: {len(records):,} rows of {form.name}: {form.mapping}")
        notes.extend(f"{name}: {text} ({n:,} rows)" for text, n in remarks.items())
        if unused:
            listed = ", ".join(f"{key} ({rows:,} rows)" for key, rows in unused.items())
            notes.append(f"{name}: fields that are not used: {listed}")
    faults.raise_listed()
    notes += faults.notes()
    return Rows(tuple(conversations), tuple(notes), content_hash(digests), faults.skipped)


def _read_records(sources: Sequence[Source], faults: Faults) -> list[list[Record]]:
    """The rows of each file that can be used."""
    records: list[list[Record]] = [[] for _ in sources]
    rows = [0] * len(sources)
    for number, chunk in read_sources(sources):
        rows[number] += chunk.num_rows
        for row in chunk.records():
            if isinstance(row, BadRow):
                faults.add(row.fault)
            else:
                records[number].append(row)
    for number, source in enumerate(sources):
        if source.columns:
            raise ConfigError(
                f"{source.path}: columns are not read yet; expected the usual names.\n"
                "  Rename the columns in the file."
            )
        if not rows[number] and source.rows is None:
            raise DataError(
                f"{source.path.name} holds no rows; expected at least one.\n"
                "  Training has not started."
            )
    return records


def recognise(records: Sequence[Record]) -> Format:
    """The format whose required keys one of the first rows has, or failing that shares a key with.

    Raises:
        DataError: no format fits; names the keys found and those expected.
    """
    first = records[:20]
    for wanted in (all, any):
        for record in first:
            for form in FORMATS:
                if wanted(key in record.value for key in form.required):
                    return form
    row, place = first[0].value, first[0].place
    known = [key for form in FORMATS for key in form.required]
    hints = [
        f'"{key}" looks like "{near[0]}". '
        for key in row
        if (near := difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.75))
    ]
    shapes = "; ".join(_expected(form) for form in FORMATS)
    raise DataError(
        f"{place}: the row has {_list_keys(row)}; expected one of: {shapes}.\n"
        f"  {''.join(hints)}Rename the fields. Training has not started."
    )


def convert(row: dict[str, Any], form: Format) -> Parsed:
    """Map one row; raises a private exception that `read_conversations` collects."""
    missing = [key for key in form.required if key not in row]
    if missing:
        meant = [key for key in row if difflib.get_close_matches(key.lower(), missing, 1, 0.75)]
        raise Unfit(
            f"keys:{','.join(sorted(row))[:200]}",
            f"the row has {_list_keys(row)} and no {_list_keys(missing)}; "
            f"expected {_expected(form)}.",
            f'Is "{meant[0]}" meant?' if meant else "",
        )
    for key in row:
        if key not in form.required + form.optional and (near := _misspelt(key, row, form)):
            raise Unfit(
                f"misspelt:{key}",
                f'the row has a field "{key}", which would not be used.',
                f'Did you mean "{near}"?',
            )
    parsed = form.convert(row)
    _check_turns(parsed.messages, form)
    return parsed


def _misspelt(key: str, row: dict[str, Any], form: Format) -> str | None:
    absent = [name for name in form.optional if name not in row and abs(len(name) - len(key)) <= 2]
    near = difflib.get_close_matches(key.lower(), absent, n=1, cutoff=0.8)
    return near[0] if near else None


def _expected(form: Format) -> str:
    optional = f" (and, if wanted, {', '.join(form.optional)})" if form.optional else ""
    return ", ".join(form.required) + optional


def _list_keys(keys: Sequence[str] | dict[str, Any]) -> str:
    names = ", ".join(f'"{key}"' for key in list(keys)[:12])
    return names or "no fields"


def _text(row: dict[str, Any], key: str, *, required: bool) -> str:
    value = row.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise Unfit(
            f"type:{key}:{type(value).__name__}",
            f"{key} is {describe(value)}; expected a text.",
            "Write it in double quotes." if isinstance(value, (int, float)) else "",
        )
    if required and not value.strip():
        raise Unfit(
            f"empty:{key}",
            f"{key} is empty; expected a text.",
            "Fill it in or delete the row: an empty answer would train the model to say nothing."
            if key in ("output", "targets")
            else "Fill it in or delete the row.",
        )
    return value


def _from_instruction(row: dict[str, Any]) -> Parsed:
    messages: list[Message] = []
    if (system := _text(row, "system", required=False)).strip():
        messages.append(Message("system", system))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise Unfit(
            "history",
            "history is of another shape; expected a list of [question, answer] pairs of texts.",
        )
    for index, (question, answer) in enumerate(history):
        if not answer.strip():
            raise Unfit("empty:history", f"history[{index}] has an empty answer; expected a text.")
        messages += [Message("user", question), Message("assistant", answer)]
    extra = _text(row, "input", required=False)
    instruction = _text(row, "instruction", required=not extra.strip())
    # The tutorial glues both without anything between them: "翻译成英文" + "你好".
    question = "\n".join(part for part in (instruction, extra) if part.strip())
    messages.append(Message("user", question))
    messages.append(Message("assistant", _text(row, "output", required=True)))
    return Parsed(messages)


_BLUELM_MARKER = re.compile(r"(\[\|Human\|\]:|\[\|AI\|\]:)")
_HUMAN, _AI = "[|Human|]:", "[|AI|]:"


def _from_inputs(row: dict[str, Any]) -> Parsed:
    inputs = _text(row, "inputs", required=True)
    answer = Message("assistant", _text(row, "targets", required=True))
    if not _BLUELM_MARKER.search(inputs):
        return Parsed([Message("user", inputs), answer])
    lead, *parts = _BLUELM_MARKER.split(inputs)
    markers, texts = parts[0::2], parts[1::2]
    expected = [_HUMAN, _AI] * (len(markers) // 2)
    if markers != expected or lead.removeprefix("<s>").strip() or texts[-1].strip():
        raise Unfit(
            "markers",
            f"inputs holds BlueLM's role markers in the order {' '.join(markers)}"
            f"{' with text before the first' if lead.strip() else ''}; expected {_HUMAN} and {_AI} "
            f"in turn, beginning with {_HUMAN} and ending with {_AI} with nothing behind it.",
            "Write the plain text without markers, or all turns with them.",
        )
    # vivo's demos strip questions before they are sent, so a newline before [|AI|]: is not content.
    messages = [
        Message("user", text.strip())
        if marker == _HUMAN
        else Message("assistant", text.strip().removesuffix("</s>").strip(), trained=False)
        for marker, text in zip(markers[:-1], texts[:-1], strict=True)
    ]
    remark = "BlueLM's role markers in inputs were read as turns; only targets is trained"
    return Parsed([*messages, answer], remarks=(remark,))


def _from_messages(row: dict[str, Any]) -> Parsed:
    entries = row["messages"]
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else describe(entries)
        raise Unfit(
            f"messages:{found}", f"messages is {found}; expected a list of role/content objects."
        )
    messages = [_message(entry, f"messages[{index}]") for index, entry in enumerate(entries)]
    tools = row.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise Unfit("tools", f"tools is {describe(tools)}; expected a list of JSON schemas.")
    remarks = []
    if messages[-1].role == "user":
        remarks.append("the last user turn has no answer and is left out")
        while messages and messages[-1].role == "user":
            messages.pop()
    return Parsed(messages, tuple(tools) if tools else None, tuple(remarks))


_MESSAGE_KEYS = ("role", "content", "reasoning_content")
_FOREIGN_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "developer": "system",
}


def _message(entry: Any, name: str) -> Message:
    if not isinstance(entry, dict):
        raise Unfit(
            f"message:{type(entry).__name__}",
            f'{name} is {describe(entry)}; expected an object with "role" and "content".',
        )
    unknown = [key for key in entry if key not in _MESSAGE_KEYS and entry[key] is not None]
    for key in ("role", "content"):
        if key not in entry:
            raise Unfit(
                f"message_key:{key}:{','.join(sorted(entry))[:200]}",
                f'{name} has {_list_keys(entry)} and no "{key}"; '
                'expected "role" and "content" (and "reasoning_content").',
            )
    if unknown:
        raise Unfit(
            f"message_unknown:{unknown[0]}",
            f'{name} has a field "{unknown[0]}", which would not be trained; expected "role" and '
            '"content" (and "reasoning_content").',
            "Remove it, or write its text into content.",
        )
    role = entry["role"]
    if role not in ROLES:
        shown = f'"{role}"' if isinstance(role, str) else describe(role)
        raise Unfit(
            f"role:{shown}",
            f"{name}.role is {shown}; expected system, user, assistant or tool.",
            _meant_role(role),
        )
    content = _content(entry["content"], f"{name}.content")
    if role != "system" and not content.strip():
        raise Unfit(
            f"empty:{role}",
            f"{name}.content ({role}) is empty; expected a text.",
            "Fill it in or delete the row: an empty answer would train the model to say nothing."
            if role == "assistant"
            else "Fill it in or delete the row.",
        )
    reasoning = entry.get("reasoning_content")
    if reasoning is not None and (not isinstance(reasoning, str) or role != "assistant"):
        raise Unfit(
            "reasoning",
            f"{name}.reasoning_content is {describe(reasoning)} of role {role}; "
            "expected a text of an assistant.",
        )
    return Message(
        cast(Role, role), content, reasoning if reasoning and reasoning.strip() else None
    )


def _meant_role(role: Any) -> str:
    if not isinstance(role, str):
        return ""
    near = difflib.get_close_matches(role.lower(), ROLES, n=1)
    meant = near[0] if near else _FOREIGN_ROLES.get(role.lower())
    return f'Did you mean "{meant}"?' if meant else ""


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    found = "a list with parts that are not text" if isinstance(value, list) else describe(value)
    raise Unfit(f"content:{type(value).__name__}", f"{name} is {found}; expected a text.")


def _check_turns(messages: Sequence[Message], form: Format) -> None:
    """System first, then user and assistant in turn; a tool answers an assistant."""
    if not any(message.role == "assistant" for message in messages):
        raise Unfit(
            "no_answer",
            "the row has no assistant message, so there is nothing to train.",
            "Add the answer or delete the row.",
        )
    allowed: dict[str, tuple[str, ...]] = {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("assistant", "tool"),
    }
    before = ""
    for index, message in enumerate(messages):
        if message.role not in allowed[before]:
            after = f"after {before}" if before else "as the first"
            mend = ""
            if message.role == "system":
                mend = "A system message stands first, once."
            elif message.role == before:
                mend = f"Join the two {before} messages into one."
            elif not before or before == "system":
                mend = "A conversation begins with the user."
            raise Unfit(
                f"order:{before}:{message.role}",
                f"{form.name}[{index}] is of role {message.role} {after}; "
                f"expected {' or '.join(allowed[before])}.",
                mend,
            )
        before = message.role


FORMATS = (
    Format(
        "messages",
        ("messages",),
        ("tools",),
        "every assistant message is trained, everything else is context",
        _from_messages,
    ),
    Format(
        "instruction/input/output",
        ("instruction", "output"),
        ("input", "system", "history"),
        "user = instruction, newline, input (if any); assistant, trained = output",
        _from_instruction,
    ),
    Format(
        "inputs/targets",
        ("inputs", "targets"),
        (),
        "user = inputs; assistant, trained = targets",
        _from_inputs,
    ),
)
"""Tried in this order; the first whose required keys are there is taken."""
