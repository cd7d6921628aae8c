"""Turns: the order that the messages of a dialogue keep, whatever row they were read from.

Owns where a system text stands, what may follow what, which turns are context, and what is done
with a dialogue that begins with an answer or ends with a question. How an entry of a row becomes a
turn is `dialogues.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from myna.data.conversation import Message
from myna.data.fields import Fields, Parsed, Unfit
from myna.data.tool_calls import read_tools

_FOLLOWING: dict[str, tuple[str, ...]] = {
    "": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role, or "" for the beginning -> the roles that may follow it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, the name of its entry (`messages[3]`), and what its row says of it."""

    message: Message
    name: str
    flagged: bool = False
    """The row itself says whether it is trained."""
    is_call: bool = False
    """A turn that is nothing but a call of a tool."""


def as_context(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, no answer among them trained if no flag of its own says so."""
    return [
        turn
        if turn.flagged or turn.message.role != "assistant"
        else replace(turn, message=replace(turn.message, trained=False))
        for turn in turns
    ]


def answered(context: Sequence[Turn], answer: Sequence[Turn], fields: Fields) -> Parsed:
    """The row in which `answer`, an assistant's turns, follows on `context`."""
    if not any(turn.message.role == "assistant" for turn in answer):
        raise Unfit(
            "no_answer",
            f"{'the answer' if context else 'the row'} has no assistant message, so there is "
            "nothing to train.",
            "Add the answer or delete the row.",
        )
    turns = _with_system(_without_open_end([*context, *answer], fields), fields)
    return Parsed(_in_order(turns, fields), read_tools(fields), tuple(fields.remarks))


def _with_system(turns: list[Turn], fields: Fields) -> list[Turn]:
    """The turns with the text of the row's `system` column in front, if it has one."""
    system = fields.text("system", required=False)
    if not system.strip():
        return turns
    name, first = fields.name("system"), turns[0].message
    if first.role == "system":
        if first.content != system:
            raise Unfit(
                "two_systems",
                f"{name} and {turns[0].name} are two different system texts; expected one.",
                "Delete one of them.",
            )
        return turns
    return [Turn(Message("system", system), name), *turns]


def _in_order(turns: Sequence[Turn], fields: Fields) -> list[Message]:
    """The messages, if their order is one that a dialogue has.

    A system message first, then user and assistant in turn; between an assistant and its next
    message the results of tools. An assistant that speaks first is context, if no flag trains it:
    no server is asked for a greeting.
    """
    before = ""
    for turn in turns:
        role = turn.message.role
        if role not in _FOLLOWING[before]:
            raise _out_of_order(turn, before)
        before = role
    messages = [turn.message for turn in turns]
    if not any(message.role == "user" for message in messages):
        raise Unfit(
            "no_question",
            "the row has an answer and no user message before it, so nothing asks for it.",
            "Add the question. A text that answers nothing can stand in a column `text`: it is "
            "trained whole.",
        )
    for at, turn in enumerate(turns):
        if turn.message.role == "user":
            break
        if turn.message.role == "assistant" and not turn.flagged:
            messages[at] = replace(turn.message, trained=False)
            fields.remarks.append(
                "the assistant's greeting before the first question is context, not trained"
            )
    return messages


def _out_of_order(turn: Turn, before: str) -> Unfit:
    role = turn.message.role
    mend = ""
    if role == "system":
        mend = "A system message stands first, once."
    elif role == before:
        mend = f"Join the two {before} messages into one."
    elif role == "tool":
        mend = "The result of a tool stands behind the assistant's call."
    after = f"after {before}" if before else "as the first"
    return Unfit(
        f"order:{before}:{role}",
        f"{turn.name} is of role {role} {after}; expected {' or '.join(_FOLLOWING[before])}.",
        mend,
    )


def _without_open_end(turns: list[Turn], fields: Fields) -> list[Turn]:
    last = len(turns)
    while turns[last - 1].message.role in ("user", "tool"):
        last -= 1
    for role in dict.fromkeys(turn.message.role for turn in turns[last:]):
        what = "user turn" if role == "user" else "result of a tool"
        fields.remarks.append(f"the last {what} has no answer and is left out")
    return turns[:last]
