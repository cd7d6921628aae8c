"""Conversations: the one shape that every data format is read into and every template renders.

Owns messages, tool calls, plain texts and where they came from. Knows nothing of files
(`files.py`), of how a row is mapped (`formats.py`) or of tokens (`encode.py`).
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
class ToolCall:
    """A function that the assistant asks for, its arguments by name, and the id of the call."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        """The call as chat templates expect it: as OpenAI's, but with arguments as an object."""
        entry: dict[str, Any] = {"type": "function"}
        if self.id is not None:
            entry["id"] = self.id
        entry["function"] = {"name": self.name, "arguments": self.arguments}
        return entry


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning` is the thinking before an assistant's content, if the data has it."""

    role: Role
    content: str
    reasoning: str | None = None
    trained: bool = True
    """Only read for assistants: whether this answer gets labels."""
    weight: float = 1.0
    """What each trained token of this answer counts in the loss, where others count 1."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant asks for; its content is then often empty."""
    name: str | None = None
    """Of a tool whose result this is, or of a participant."""
    tool_call_id: str | None = None
    """Of the call whose result this is."""

    def as_template_input(self) -> dict[str, Any]:
        """The dictionary that chat templates expect, with only the keys that this message has.

        `role` and `content` (a text, empty where a call stands alone), `reasoning_content`,
        `tool_calls`, `name`, `tool_call_id`.
        """
        entry: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            entry["reasoning_content"] = self.reasoning
        if self.tool_calls:
            entry["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        if self.name is not None:
            entry["name"] = self.name
        if self.tool_call_id is not None:
            entry["tool_call_id"] = self.tool_call_id
        return entry


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the tools offered to the assistant, and where the row stands."""

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    """A plain text, trained whole; then there are no messages."""
