"""Pairs: rows with a question and its answer in columns of their own, as in Alpaca's data.

Owns how instruction, input, history and system text become turns, and BlueLM's role markers inside
a question. The names of the columns are in the table of `formats.py`; lists of messages in either
column (trl's conversational form) are read by `dialogues.py`.
"""

import re
from dataclasses import replace

from myna.data.conversation import Message
from myna.data.dialogues import part, read_turns
from myna.data.fields import EMPTY_ANSWER, Fields, Parsed, Unfit, is_blank
from myna.data.turns import Turn, answered, as_context

_BLUELM_MARKER = re.compile(r"(\[\|Human\|\]:|\[\|AI\|\]:)")
_HUMAN, _AI = "[|Human|]:", "[|AI|]:"


def from_pair(fields: Fields) -> Parsed:
    """A row of a question and an answer; both may be texts or lists of messages.

    Answers in `history` are trained; those in a list of messages that asks are context.

    Raises:
        Unfit: a column is empty or of another kind, or the row may hold a bad answer.
    """
    _check_label(fields)
    return answered(asked(fields), _answer(fields), fields)


def asked(fields: Fields) -> list[Turn]:
    """The turns before the answer: history, then the prompt with its input."""
    prompt, turns = fields.value("prompt"), _history(fields)
    if isinstance(prompt, list):
        if fields.text("input", required=False).strip():
            raise Unfit(
                "input_and_messages",
                f"{fields.name('prompt')} is a list of messages, and {fields.name('input')} has a "
                "text for which there is no place.",
                "Write it into the last message.",
            )
        return [*turns, *as_context(read_turns(prompt, fields.name("prompt"), fields))]
    return [*turns, Turn(Message("user", _question(fields)), fields.name("prompt"))]


def from_inputs(fields: Fields) -> Parsed:
    """A row of BlueLM's own data: `inputs` may hold whole turns, marked; only `targets` is trained.

    Raises:
        Unfit: as `from_pair`, or the markers are in no order that a dialogue has.
    """
    inputs = fields.value("prompt")
    if not isinstance(inputs, str) or not _BLUELM_MARKER.search(inputs):
        return from_pair(fields)
    name = fields.name("prompt")
    lead, *parts = _BLUELM_MARKER.split(inputs)
    markers, texts = parts[0::2], parts[1::2]
    expected = [_HUMAN, _AI] * (len(markers) // 2)
    if markers != expected or lead.removeprefix("<s>").strip() or texts[-1].strip():
        raise Unfit(
            "markers",
            f"{name} holds BlueLM's role markers in the order {' '.join(markers)}"
            f"{' with text before the first' if lead.strip() else ''}; expected {_HUMAN} and {_AI} "
            f"in turn, beginning with {_HUMAN} and ending with {_AI} with nothing behind it.",
            "Write the plain text without markers, or all turns with them.",
        )
    # vivo's demos strip questions before they are sent, so a newline before [|AI|]: is not content.
    turns = [
        Message("user", text.strip())
        if marker == _HUMAN
        else Message("assistant", text.strip().removesuffix("</s>").strip(), trained=False)
        for marker, text in zip(markers[:-1], texts[:-1], strict=True)
    ]
    fields.remarks.append(
        f"BlueLM's role markers in {name} were read as turns; only {fields.name('completion')} is "
        "trained"
    )
    return answered([Turn(message, name) for message in turns], _answer(fields), fields)


def _question(fields: Fields) -> str:
    extra = fields.text("input", required=False)
    prompt = fields.text("prompt", required=not extra.strip())
    # The tutorial glues both without anything between them: "翻译成英文" + "你好".
    return "\n".join(text for text in (prompt, extra) if text.strip())


def _answer(fields: Fields) -> list[Turn]:
    turns = part("completion", "assistant", fields, mend=EMPTY_ANSWER)
    reasoning = fields.text("reasoning", required=False)
    if not reasoning.strip():
        return turns
    (first, *more) = turns
    if more or first.message.role != "assistant" or first.message.reasoning is not None:
        raise Unfit(
            "reasoning_and_messages",
            f"{fields.name('reasoning')} has a text, and {fields.name('completion')} is not the "
            "one answer that it could belong to.",
            "Write it into the message, as reasoning_content.",
        )
    return [replace(first, message=replace(first.message, reasoning=reasoning))]


def _history(fields: Fields) -> list[Turn]:
    history, name = fields.json("history"), fields.name("history")
    if is_blank(history):
        return []
    if isinstance(history, list) and all(isinstance(entry, dict) for entry in history):
        return read_turns(history, name, fields)
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise Unfit(
            "history",
            f"{name} is of another shape; expected a list of [question, answer] pairs of texts.",
        )
    turns: list[Turn] = []
    for index, (question, answer) in enumerate(history):
        for what, text in (("question", question), ("answer", answer)):
            if not text.strip():
                raise Unfit(
                    f"empty:history:{what}",
                    f"{name}[{index}] has an empty {what}; expected a text.",
                )
        entry = f"{name}[{index}]"
        turns += [Turn(Message("user", question), entry), Turn(Message("assistant", answer), entry)]
    return turns


def _check_label(fields: Fields) -> None:
    """KTO's rows have answers to learn and answers to avoid, told apart by a label."""
    label = fields.row.get("label")
    if isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false")):
        raise Unfit(
            "label",
            'the row has a "label" of true or false, as data of wanted and unwanted answers do; '
            "every answer here would be trained.",
            "Keep the rows whose answer is wanted, and delete the label.",
        )
