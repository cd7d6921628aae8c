"""Questions: rows of a data file up to the answer that is to be generated.

Owns where a row is cut and what becomes of an answer it already has. The files and shapes are the
same as for training, and read by `data.files` and `data.formats`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.conversation import Message, Place
from myna.data.dialogues import ROLE_SPELLINGS
from myna.data.faults import SCREENFUL, Fault
from myna.data.fields import Unfit
from myna.data.files import BadRow, Record, read_records
from myna.data.formats import Format, convert, recognise
from myna.data.json_text import NotJson, parse_json_text
from myna.errors import DataError

_PLACEHOLDER = "."
"""Stands for the answer while a row is read: the formats are those of training rows."""

_NOT_STARTED = "Nothing was generated."


@dataclass(frozen=True)
class Question:
    """Messages that end with the user's, and the answer that the row gives, if any."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None
    reference: str | None
    place: Place


def read_questions(path: Path) -> list[Question]:
    """The questions of a data file, in order.

    Rows are those of training, with or without an answer; lists of messages are taken up to the
    last of the user. Raises DataError listing all rows that do not fit.
    """
    try:
        rows = list(read_records([path]))
        faults = [row.fault for row in rows if isinstance(row, BadRow)]
        records = [row for row in rows if isinstance(row, Record)]
        if not rows:
            raise DataError(f"{path.name} holds no rows; expected at least one.")
        questions = _convert(records, faults) if records else []
    except DataError as error:
        raise DataError(_about_generating(str(error))) from None
    if faults:
        raise DataError(list_refusals([str(fault) for fault in faults]))
    return questions


def list_refusals(refusals: list[str]) -> str:
    """One message for all rows that cannot be asked."""
    lines = refusals[:SCREENFUL]
    if len(refusals) > SCREENFUL:
        lines.append(f"and {len(refusals) - SCREENFUL:,} more rows.")
    return "\n".join([*lines, _NOT_STARTED])


def _convert(records: list[Record], faults: list[Fault]) -> list[Question]:
    form = recognise(records)
    if "text" in form.columns:
        raise DataError(
            f"{records[0].place}: the row is plain text; expected a question (prompt, instruction, "
            f"messages …).\n  Rename the field. {_NOT_STARTED}"
        )
    questions = []
    for record in records:
        row, reference = _without_answer(record.value, form)
        try:
            parsed = convert(row, form)
        except Unfit as error:
            faults.append(Fault(error.kind, record.place, error.finding, error.mend))
            continue
        messages = tuple(parsed.messages[:-1])
        questions.append(Question(messages, parsed.tools, reference, record.place))
    return questions


def _without_answer(row: Mapping[str, Any], form: Format) -> tuple[Mapping[str, Any], str | None]:
    """The row with a placeholder for its last answer, and that answer."""
    for role in ("completion", "chosen"):
        if role in form.columns:
            column = form.columns[role][0]
            return {**row, column: _PLACEHOLDER}, _answer(row.get(column))
    column = form.columns["messages"][0]
    entries: Any = row.get(column)
    if isinstance(entries, str):
        with contextlib.suppress(NotJson):  # `convert` says what is wrong with it
            entries = parse_json_text(entries)
    roles = [_role(entry) for entry in entries] if isinstance(entries, list) else []
    if "user" not in roles:
        return row, None
    last = len(roles) - roles[::-1].index("user")
    reference = None
    if roles[last : last + 1] == ["assistant"]:
        reference = _answer(entries[last].get("content", entries[last].get("value")))
    answer = {"role": "assistant", "content": _PLACEHOLDER}
    return {**row, column: [*entries[:last], answer]}, reference


def _role(entry: Any) -> str | None:
    """The role of an entry, in whatever spelling; None where it has none."""
    if not isinstance(entry, dict):
        return None
    spelling = entry.get("role", entry.get("from"))
    return ROLE_SPELLINGS.get(spelling.lower()) if isinstance(spelling, str) else None


def _answer(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _about_generating(text: str) -> str:
    return text.replace("Training has not started.", _NOT_STARTED)
