"""Questions: rows of a data file up to the answer that is to be generated.

Owns where a row is cut and what becomes of an answer it already has. The files and shapes are the
same as for training, and read by `data.files` and `data.formats`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.conversation import Message, Place
from myna.data.faults import SCREENFUL, Fault
from myna.data.files import BadRow, Record, read_records

# A row that makes no conversation; `convert` leaves listing them to whoever reads the file.
from myna.data.formats import Unfit as Unfit
from myna.data.formats import convert, recognise
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

    Rows are `instruction`/`input`, `inputs` or `messages`, as for training; `messages` are taken
    up to the last of the user. Raises DataError listing all rows that do not fit.
    """
    try:
        rows = list(read_records([path]))
        faults = [row.fault for row in rows if isinstance(row, BadRow)]
        cut = [_without_answer(row) for row in rows if isinstance(row, Record)]
        if not rows:
            raise DataError(f"{path.name} holds no rows; expected at least one.")
        questions = _convert(cut, faults) if cut else []
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


def _convert(cut: list[tuple[Record, str | None]], faults: list[Fault]) -> list[Question]:
    form = recognise([record for record, _ in cut])
    questions = []
    for record, reference in cut:
        try:
            parsed = convert(record.value, form)
        except Unfit as error:
            faults.append(Fault(error.kind, record.place, error.finding, error.mend))
            continue
        messages = tuple(parsed.messages[:-1])
        questions.append(Question(messages, parsed.tools, reference, record.place))
    return questions


def _without_answer(record: Record) -> tuple[Record, str | None]:
    """The row with a placeholder for its last answer, and that answer."""
    row = dict(record.value)
    reference: Any = None
    if isinstance(messages := row.get("messages"), list):
        roles = [entry.get("role") if isinstance(entry, dict) else None for entry in messages]
        if "user" in roles:
            last = len(roles) - 1 - roles[::-1].index("user")
            following = messages[last + 1] if last + 1 < len(messages) else {}
            if isinstance(following, dict) and following.get("role") == "assistant":
                reference = following.get("content")
            row["messages"] = [
                *messages[: last + 1],
                {"role": "assistant", "content": _PLACEHOLDER},
            ]
    else:
        field = "targets" if "inputs" in row else "output"
        if field == "targets" or "instruction" in row or "input" in row:
            reference = row.get(field)
            row[field] = _PLACEHOLDER
    answered = isinstance(reference, str) and reference.strip()
    return Record(row, record.place), reference if answered else None


def _about_generating(text: str) -> str:
    return text.replace("Training has not started.", _NOT_STARTED)
