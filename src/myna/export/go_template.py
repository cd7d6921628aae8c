"""Go templates: a chat template in the language that Ollama renders prompts with.

Owns the translation. Jinja is a programming language and is not translated word by word: the
template is asked for conversations of marked texts, what it writes between them is cut out, and the
Go template writes the same pieces. A template whose pieces depend on more than the roles before and
after them is refused with the reason. Ollama's other settings are `ollama.py`'s.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from myna.data.conversation import Message, Role
from myna.data.rendering import TemplateError
from myna.data.templates import ChatTemplate
from myna.errors import ConfigError

START = ""
"""Stands for the role before the first message."""

_CONVERSATIONS: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant", "user"),
)
_ORDINARY = (
    "two\nlines",
    '"quoted", {braces} and {{ more }}',
    "<b>signs</b> & 100 % of them",
    "皇上万福金安！",
    "x",
)
"""Texts as people write them, which have to come through as they are."""
_CHANGED = {
    "  spaces around  ": "spaces around a text",
    "<think>\nreasons\n</think>\n\nan answer": "thinking in earlier answers",
}
"""Texts that some templates change and Ollama does not; a difference is noted."""


@dataclass(frozen=True)
class Pieces:
    """All that a template writes beside the texts of the messages."""

    between: Mapping[tuple[str, str], str]
    """(role before, role after) -> text; `START` before the first."""
    before_answer: str
    """Behind the last user's text, up to where the answer begins."""
    notes: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for `messages`, the last of which is the user's."""
        text, before = "", START
        for message in messages:
            text += self.between[before, message.role] + message.content
            before = message.role
        return text + self.before_answer

    def without_beginning(self, beginning: str) -> "Pieces":
        """The same but for `beginning` (a BOS that somebody else adds) at the start of prompts."""
        between = {
            key: text.removeprefix(beginning) if key[0] == START else text
            for key, text in self.between.items()
        }
        return Pieces(between, self.before_answer, self.notes)


def cut_out(template: ChatTemplate) -> Pieces:
    """What `template` writes between the texts of a conversation.

    Raises ConfigError with the reason for a template that these pieces do not describe.
    """
    if "strftime_now" in template.source and "date_string" not in template.options:
        raise _refusal("it writes today's date into every prompt")
    between: dict[tuple[str, str], str] = {}
    before_answer = None
    for roles in _CONVERSATIONS:
        messages = [Message(role, f"markedtext{number}end") for number, role in enumerate(roles)]
        *gaps, last = _gaps(_render(template, messages), messages)
        for before, after, gap in zip((START, *roles), roles, gaps, strict=False):
            known = between.setdefault((before, after), gap)
            if known != gap:
                raise _refusal(
                    f"what it writes before a text of {after} is {known!r} in one place and "
                    f"{gap!r} in another"
                )
        if before_answer is None:
            before_answer = last
        elif before_answer != last:
            raise _refusal(f"it begins an answer with {before_answer!r} or with {last!r}")
    assert before_answer is not None, "there are conversations"
    pieces = Pieces(between, before_answer)
    _check(pieces, template)
    notes = tuple(
        f"the chat template changes {what}, and Ollama sends them as they are"
        for text, what in _CHANGED.items()
        if any(
            _render(template, messages) != pieces.render(messages) for messages in _with_text(text)
        )
    )
    return Pieces(between, before_answer, notes)


def to_go(pieces: Pieces) -> str:
    """The Go template that writes `pieces` around Ollama's `.Messages`.

    Each message writes what stands between its role and the one before it, then its text; after a
    user's text at the end stands the beginning of an answer. Nothing is trimmed, so that the text
    in the template is the text in the prompt.
    """
    cases = []
    for number, role in enumerate(("system", "user", "assistant")):
        opening = {
            before: text for (before, after), text in pieces.between.items() if after == role
        }
        cases.append(
            f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{_by_role_before(opening)}'
        )
    return (
        '{{ $before := "" }}{{ range .Messages }}'
        + "".join(cases)
        + "{{ end }}{{ .Content }}{{ $before = .Role }}{{ end }}"
        + '{{ if eq $before "user" }}'
        + _literal(pieces.before_answer)
        + "{{ end }}"
    )


def _by_role_before(opening: Mapping[str, str]) -> str:
    """The text for each role that may stand before."""
    if len(set(opening.values())) == 1:
        return _literal(next(iter(opening.values())))
    text = ""
    for number, (before, gap) in enumerate(sorted(opening.items())):
        text += f'{{{{ {"else " if number else ""}if eq $before "{before}" }}}}{_literal(gap)}'
    return text + "{{ end }}"


def _literal(text: str) -> str:
    """`text` in a Go template; a brace would run into those of an action behind it."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if "{" in text else text


def _gaps(text: str, messages: Sequence[Message]) -> list[str]:
    """What stands before, between and after the marked texts."""
    gaps = []
    for message in messages:
        if text.count(message.content) != 1:
            raise _refusal(
                f"it leaves out, repeats or moves the text of a message from {message.role}"
            )
        gap, _, text = text.partition(message.content)
        gaps.append(gap)
    return [*gaps, text]


def _check(pieces: Pieces, template: ChatTemplate) -> None:
    for text in _ORDINARY:
        for messages in _with_text(text):
            wanted, found = _render(template, messages), pieces.render(messages)
            if wanted != found:
                raise _refusal(f"it writes {wanted!r} where its pieces make {found!r}")


def _with_text(text: str) -> Iterable[list[Message]]:
    """Conversations in which one message is `text`."""
    for roles in (_CONVERSATIONS[0], _CONVERSATIONS[4]):
        for place, _ in enumerate(roles):
            yield [
                Message(role, text if number == place else f"text {number}")
                for number, role in enumerate(roles)
            ]


def _render(template: ChatTemplate, messages: Sequence[Message]) -> str:
    try:
        return template.render(messages, add_generation_prompt=True)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise _refusal(f"it does not accept a conversation of {roles}: {error}") from error


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"The chat template cannot be translated for Ollama: {reason}.\n"
        "  `--to gguf` keeps it as it is, for llama.cpp's own server."
    )
