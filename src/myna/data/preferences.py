"""Preferences: rows with a chosen and a rejected answer, trained on the chosen one alone.

Owns where such a row's prompt is (a column, a list of messages, or the beginning of the chosen
conversation) and where its chosen answer begins. The rejected answer is not used: it only tells,
where both are whole conversations, how much of them is the question.
"""

from collections.abc import Sequence
from itertools import takewhile

from myna.data.dialogues import part, read_turns
from myna.data.fields import EMPTY_ANSWER, Fields, Parsed, Unfit, is_blank
from myna.data.pairs import asked
from myna.data.turns import Turn, answered, as_context


def from_preference(fields: Fields) -> Parsed:
    """A row of a prompt, a chosen and a rejected answer: the conversation with the chosen one.

    Raises:
        Unfit: there is no prompt, or it is another one than the chosen conversation's.
    """
    chosen = part("chosen", "assistant", fields, mend=EMPTY_ANSWER)
    if chosen[0].message.role in ("system", "user"):
        border = _border(chosen, fields)
        _check_prompt(chosen[:border], fields)
        return answered(as_context(chosen[:border]), chosen[border:], fields)
    return answered(_prompt(fields), chosen, fields)


def _prompt(fields: Fields) -> list[Turn]:
    has_messages = not is_blank(fields.value("messages"))
    has_prompt = not all(is_blank(fields.value(role)) for role in ("prompt", "input"))
    if has_messages and has_prompt:
        names = fields.name("prompt"), fields.name("messages")
        raise Unfit(
            "two_prompts",
            f'the row has "{names[0]}" and "{names[1]}", and both may be what "chosen" answers.',
            f"Say which: `columns: {{prompt: {names[0]}}}` or `columns: {{messages: {names[1]}}}`.",
        )
    if has_messages:
        entries = fields.json("messages")
        return as_context(read_turns(entries, fields.name("messages"), fields))
    if has_prompt:
        return as_context(asked(fields))
    raise Unfit(
        "no_prompt",
        f"{fields.name('chosen')} is an answer and the row has no prompt; expected a prompt, or a "
        "chosen conversation with its question.",
    )


def _border(chosen: Sequence[Turn], fields: Fields) -> int:
    """How many of the chosen conversation's turns are the question."""
    last = max(
        (at for at, turn in enumerate(chosen) if turn.message.role == "assistant"),
        default=len(chosen) - 1,
    )
    entries, others = fields.value("chosen"), fields.value("rejected")
    if not isinstance(others, list) or not others:
        return last
    # As they are written: what is wrong with a rejected answer does not matter.
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(entries, others, strict=False))
    same = {f"{fields.name('chosen')}[{at}]" for at, _ in enumerate(equal)}
    return min(sum(turn.name in same for turn in chosen), last)


def _check_prompt(question: Sequence[Turn], fields: Fields) -> None:
    """Refuse a row whose prompt column asks something else than its chosen conversation."""
    prompt, name = fields.value("prompt"), fields.name("prompt")
    if is_blank(prompt):
        return
    said = [(turn.message.role, turn.message.content.strip()) for turn in question]
    if isinstance(prompt, list):
        turns = read_turns(prompt, name, fields)
        agrees = said[: len(turns)] == [(t.message.role, t.message.content.strip()) for t in turns]
    else:
        agrees = isinstance(prompt, str) and ("user", prompt.strip()) in said
    if not agrees:
        raise Unfit(
            "other_prompt",
            f"{name} is no question of the conversation in {fields.name('chosen')}; expected the "
            "same in both.",
            f"Delete {name}, or write only the answer into {fields.name('chosen')}.",
        )
