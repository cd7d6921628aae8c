"""Conversations: the one shape that every data format is read into and every template renders.

Owns messages and where they came from. Knows nothing of files (`files.py`), of how a row is mapped
(`formats.py`) or of tokens (`encode.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands, as a person finds it: file, line and number of the row, from 1.

    `line` is 0 in files that have no lines (Parquet, Arrow).
    """

    file: Path
    line: int
    row: int

    def __str__(self) -> str:
        """`train.jsonl line 418`, `train.parquet row 418`."""
        where = f"line {self.line}" if self.line else f"row {self.row}"
        return f"{self.file.name} {where}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning` is the thinking before an assistant's content, if the data has it."""

    role: Role
    content: str
    reasoning: str | None = None
    trained: bool = True
    """Only read for assistants: whether this answer gets labels."""

    def as_template_input(self) -> dict[str, Any]:
        """The dictionary that chat templates expect (`role`, `content`, `reasoning_content`)."""
        entry: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            entry["reasoning_content"] = self.reasoning
        return entry


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the tools offered to the assistant, and where the row stands."""

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[dict[str, Any], ...] | None = None
