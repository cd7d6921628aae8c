"""Rows that are judged: what is asked, the row's own answer, and what the loss is computed on.

Owns where they come from: encoded examples with the messages that they were made of, or a file of
questions without answers. What the model makes of them is `evaluate.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from myna.data.conversation import Conversation
from myna.data.encode import Encoder
from myna.data.pipeline import conversations_at
from myna.data.sources import Source
from myna.data.store import Example, Examples
from myna.errors import DataError
from myna.inference.questions import list_refusals, read_questions
from myna.inference.text_stream import decode


@dataclass(frozen=True)
class JudgedRow:
    """One answer that the model is asked for, or a plain text that only has a loss."""

    place: str
    question: str
    """What the user said last; empty for a plain text."""
    reference: str | None
    """The row's own answer, as an answer of the model would read."""
    prompt_ids: tuple[int, ...]
    """What the model is sent; empty for a plain text, about which nothing is asked."""
    example: Example | None
    """The trained tokens; None for a row without an answer."""


def rows_of_examples(
    examples: Examples, sources: Sequence[Source], encoder: Encoder
) -> list[JudgedRow]:
    """The examples in their order; their messages are read again from `sources`."""
    chosen = list(examples)
    conversations = conversations_at(sources, (example.place for example in chosen))
    return [_row(example, conversations[example.place], encoder) for example in chosen]


def rows_of_questions(path: Path, encoder: Encoder) -> list[JudgedRow]:
    """The rows of a file of questions, without an answer to compare with.

    Raises DataError listing all rows that cannot be asked.
    """
    rows, refusals = [], []
    for question in read_questions(path):
        try:
            prompt = encoder.prompt(question.messages, question.tools)
        except DataError as error:
            refusals.append(f"{question.place}: {error}")
            continue
        asked = [message.content for message in question.messages if message.role == "user"]
        rows.append(JudgedRow(str(question.place), asked[-1], None, prompt.ids, None))
    if refusals:
        raise DataError(list_refusals(refusals))
    return rows


def has_answers(path: Path) -> bool:
    """Whether a row of the file has an answer. What cannot be read is left to those who read it."""
    try:
        return any(question.reference is not None for question in read_questions(path))
    except DataError:
        return True


def after_thinking(text: str) -> str:
    """What is said behind the reasoning, where there is any: only that is judged."""
    return text.rpartition("</think>")[2].strip()


def _row(example: Example, conversation: Conversation, encoder: Encoder) -> JudgedRow:
    if conversation.text is not None:
        return JudgedRow(str(example.place), "", None, (), example)
    number, question = 0, ""
    for message in conversation.messages:
        if message.role == "user":
            question = message.content
        number += message.role == "assistant"
        if number == example.turn:
            break
    place = str(example.place) + (f", answer {number}" if number > 1 else "")
    ids = example.completion_ids
    said = decode(encoder.tokenizer, ids[:-1] if ids[-1] in encoder.stop_ids else ids)
    return JudgedRow(place, question, said, example.prompt_ids, example)
