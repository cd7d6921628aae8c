"""Fields: the values of a row under the names that its format gives to its columns.

Owns what a value must be (a text, a JSON value, nothing), the words where it is something else,
and what a row leaves to be said about it. Which fields make a conversation is for the modules of
the single formats (`pairs.py`, `dialogues.py`, `preferences.py`).
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from myna.data.conversation import Message
from myna.data.files import describe
from myna.data.json_text import NotJson, parse_json_text

_FILL_IN = "Fill it in or delete the row."
EMPTY_ANSWER = "Fill it in or delete the row: an empty answer would train the model to say nothing."


class Unfit(Exception):
    """A row that does not make a conversation."""

    def __init__(self, kind: str, finding: str, mend: str = "") -> None:
        super().__init__(finding)
        self.kind, self.finding, self.mend = kind, finding, mend


@dataclass(frozen=True, slots=True)
class Parsed:
    """A row's messages, or its plain text, and remarks that are counted over the file."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] | None = None
    remarks: tuple[str, ...] = ()
    text: str | None = None


class Fields:
    """One row, asked by roles (`prompt`, `completion`, `system` …) instead of column names.

    Args:
        row: the row as it was read.
        columns: role -> the columns that may hold it; a role that is not there has no column.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> None:
        self.row = row
        self._columns = columns
        self.remarks: list[str] = []
        """What is to be said of this row, without its place: equal ones are counted."""

    def names(self, role: str) -> Sequence[str]:
        """The columns, or keys of an entry, that may hold `role`."""
        return self._columns.get(role, ())

    def name(self, role: str) -> str:
        """The column that holds `role` in this row, or the first that might."""
        names = self._columns.get(role, (role,))
        if len(names) == 1:
            return names[0]
        found = [name for name in names if not is_blank(self.row.get(name))]
        if len(found) > 1:
            raise Unfit(
                f"twice:{found[0]}:{found[1]}",
                f'the row has both "{found[0]}" and "{found[1]}", which mean the same; '
                "expected one of them.",
                f"Delete one, or say which to read: `columns: {{{role}: {found[0]}}}`.",
            )
        if found:
            return found[0]
        return next((name for name in names if name in self.row), names[0])

    def value(self, role: str) -> Any:
        """The value of `role`; None where the row has none."""
        return self.row.get(self.name(role)) if role in self._columns else None

    def text(self, role: str, *, required: bool, mend: str = _FILL_IN) -> str:
        """The text of `role`; "" where there is none and none is required."""
        value, name = self.value(role), self.name(role)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            raise Unfit(
                f"type:{name}:{type(value).__name__}",
                f"{name} is {describe(value)}; expected a text.",
                "Write it in double quotes." if isinstance(value, (int, float)) else "",
            )
        if required and not value.strip():
            raise Unfit(f"empty:{name}", f"{name} is empty; expected a text.", mend)
        return value

    def json(self, role: str) -> Any:
        """The value of `role`, a text (a cell of a CSV) being read as JSON; a blank one is None."""
        value, name = self.value(role), self.name(role)
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        self.remarks.append(f"the JSON text in {name} was read as what it says")
        return self.parse(value, name)

    def parse(self, text: str, name: str) -> Any:
        """The JSON value of a text; Unfit where it is none."""
        try:
            return parse_json_text(text)
        except NotJson as error:
            raise Unfit(
                f"json:{name}:{str(error).split(' at character')[0]}",
                f"{name} is a text that is not JSON: {error}.",
            ) from None


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty or white text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, dict)) and not value)


def list_keys(keys: Sequence[str] | Mapping[str, Any]) -> str:
    """`"a", "b"`: names as an error lists them, a dozen at most."""
    names = ", ".join(f'"{key}"' for key in list(keys)[:12])
    return names or "no fields"


@lru_cache(maxsize=4096)
def nearest(key: str, names: tuple[str, ...], cutoff: float = 0.8) -> str | None:
    """The one of `names` that `key` is probably a slip of; rows have few different keys."""
    if cutoff >= 0.8:
        names = tuple(name for name in names if abs(len(name) - len(key)) <= 2)
    near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=cutoff)
    return near[0] if near else None
