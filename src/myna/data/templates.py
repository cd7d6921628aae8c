"""Chat templates: messages to the text a model reads, with the tokenizer's own Jinja.

Owns which template is used and why, how a system text reaches a model that has no system role, and
the thinking switch. Rendering itself is transformers' (sandboxed), so that training, chat and every
server that uses the same template see the same text. Token ids are left to `encode.py`.

Templates are rendered in this process: one that loops for ever is not stopped here.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from myna.data.conversation import Message
from myna.errors import ConfigError, DataError

BUILT_IN_FOLDER = Path(__file__).parent / "builtin_templates"
BUILT_IN: Mapping[str, str] = {"bluelm": "bluelm.jinja"}
"""Model type, in small letters, to the file of its template, for models that ship none."""

THINKING_SWITCH = "enable_thinking"
"""The variable by which templates of thinking models are told to leave the thinking out."""

_PROBE_SYSTEM, _PROBE_USER = "myna probe of the system text", "myna probe of the user text"

_MARKER = re.compile(
    r"(?<!<)<(?:[|｜][^<>|｜\n]{1,40}[|｜]|[^<>|\s]{1,40})>|\[\|[^\[\]|\n]{1,40}\|\]:?"
)
"""What is meant as one token, if a template writes it: `<|user|>`, `<s>`, `[|AI|]:`."""


class TemplateError(DataError):
    """A template refused messages; the text is the template's own."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with everything that decides its text but the messages."""

    source: str
    """Jinja."""
    origin: str
    """Where the source comes from, as a person reads it."""
    special_tokens: Mapping[str, Any]
    """Variables of the tokenizer (`bos_token`, `eos_token` …)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables that every rendering passes; saved with the adapter. `enable_thinking: False` means
    trained and served without thinking."""
    tool_source: str | None = None
    """Jinja for conversations with tools, where the tokenizer has one apart."""
    folds_system: bool = False
    """The model has no system role: its text goes before the first user's, after a blank line."""
    notes: tuple[str, ...] = ()
    """What a person should know about it, one line each."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The text of `messages`; with `add_generation_prompt` up to where an answer begins.

        Raises:
            TemplateError: the template does not accept these messages.
        """
        from jinja2 import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.folds_system:
            messages = _fold_system(messages)
        try:
            rendered = render_jinja_template(
                conversations=[[message.as_template_input() for message in messages]],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=self.tool_source if tools and self.tool_source else self.source,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **self.options},
            )
        except (JinjaError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(str(error) or type(error).__name__) from error
        return str(rendered[0][0])

    @property
    def has_thinking_switch(self) -> bool:
        """Whether `enable_thinking` means something to this template."""
        return re.search(rf"\b{THINKING_SWITCH}\b", self.source) is not None

    def with_thinking(self, thinking: bool) -> "ChatTemplate":
        """The same template with thinking on or off; itself where it has no such switch."""
        if not self.has_thinking_switch or self.options.get(THINKING_SWITCH) is thinking:
            return self
        return replace(self, options={**self.options, THINKING_SWITCH: thinking})

    @property
    def saved_source(self) -> str:
        """The source to write beside an adapter: servers that pass no options get ours."""
        head = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja_literal(value)} %}}"
            "{%- endif %}"
            for name, value in sorted(self.options.items())
        )
        return self.source if self.source.startswith(head) else head + self.source


def choose_template(
    tokenizer: Any,
    model_type: str | None,
    *,
    override: Path | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The template of a model: `override` (a Jinja file), the tokenizer's own, or a built-in.

    Args:
        tokenizer: a transformers tokenizer.
        model_type: `model_type` of the model's config; decides which built-in fits.
        override: a Jinja file to use in place of the tokenizer's template.
        options: those an adapter was saved with. Not given: thinking is off, where it can be.

    Raises:
        ConfigError: there is no template, the file is missing, or it cannot render a question.
    """
    source, tool_source, origin = _find_source(tokenizer, model_type, override)
    template = ChatTemplate(
        source, origin, dict(tokenizer.special_tokens_map), dict(options or {}), tool_source
    )
    notes = [f"chat template: {origin}"]
    if options is None:
        template = template.with_thinking(False)
    template, system_notes = _probe(template)
    notes += system_notes
    if split := _plain_markers(template, tokenizer):
        listed = ", ".join(f'"{marker}"' for marker in split)
        are = "is not one token" if len(split) == 1 else "are not one token each"
        notes.append(
            f"the chat template writes {listed}, which {are} of this tokenizer but plain text: "
            "another model's template?"
        )
    if "strftime_now" in source:
        notes.append(
            "the chat template writes today's date into every prompt; prompts of another day differ"
        )
    return replace(template, notes=tuple(notes))


def _find_source(
    tokenizer: Any, model_type: str | None, override: Path | str | None
) -> tuple[str, str | None, str]:
    if override is not None:
        path = Path(override)
        try:
            return path.read_text(encoding="utf-8"), None, f"file {path.name}"
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(
                f"template: {path} could not be read: {reason}; expected a Jinja file.\n"
                "  Mend the path, or leave `template` out to use the tokenizer's own."
            ) from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" in own:
            return own["default"], own.get("tool_use"), "the tokenizer's own, named default"
        raise ConfigError(
            f"The tokenizer has several chat templates ({', '.join(sorted(own))}) and none is "
            "named default.\n  Write the one to use into a file and set `template: FILE`."
        )
    if own:
        return own, None, "the tokenizer's own"
    built_in = BUILT_IN.get((model_type or "").lower())
    if built_in:
        text = (BUILT_IN_FOLDER / built_in).read_text(encoding="utf-8")
        return text, None, f"built-in {built_in} (the tokenizer has none)"
    raise ConfigError(
        f"The tokenizer has no chat template and there is no built-in for model type "
        f"{model_type!r} (built-in: {', '.join(sorted(BUILT_IN))}).\n"
        "  It may be a base model: take the chat model, or set `template: FILE` to a Jinja file."
    )


def _probe(template: ChatTemplate) -> tuple[ChatTemplate, list[str]]:
    """Render a question without and with a system text, to learn what the template does with it."""
    question = Message("user", _PROBE_USER)
    try:
        plain = template.render([question], add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(
            f"The chat template ({template.origin}) cannot render a single user message: {error}\n"
            "  Mend the template, or set `template: FILE` to another."
        ) from error
    if _PROBE_USER not in plain:
        raise ConfigError(
            f"The chat template ({template.origin}) leaves out the text of a user message; it "
            f"renders {plain[:200]!r}.\n  Mend the template, or set `template: FILE` to another."
        )
    try:
        with_system = template.render(
            [Message("system", _PROBE_SYSTEM), question], add_generation_prompt=True
        )
    except TemplateError:
        how = "refuses"
    else:
        if _PROBE_SYSTEM in with_system:
            return template, []
        how = "drops"
    return replace(template, folds_system=True), [
        f"the chat template {how} the system role; a system text is put before the first user's "
        "text, with a blank line between"
    ]


def _plain_markers(template: ChatTemplate, tokenizer: Any) -> list[str]:
    """Markers of a question and its answer that the tokenizer reads as letters."""
    question, answer = Message("user", _PROBE_USER), Message("assistant", _PROBE_USER)
    text = template.render([question], add_generation_prompt=True)
    with contextlib.suppress(TemplateError):  # `encode.py` refuses such a template
        text += template.render([question, answer], add_generation_prompt=False)
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    for token in added:  # `[|AI|]:` is one, though `[|AI|]` is none
        text = text.replace(token, "\n")

    def is_token(marker: str) -> bool:
        ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
        return marker in tokenizer.convert_ids_to_tokens(ids)

    return [marker for marker in dict.fromkeys(_MARKER.findall(text)) if not is_token(marker)]


def _fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    if not messages or messages[0].role != "system":
        return messages
    system, *rest = messages
    for index, message in enumerate(rest):
        if message.role == "user":
            rest[index] = replace(message, content=f"{system.content}\n\n{message.content}")
            return rest
    return messages


def _jinja_literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    assert isinstance(value, (int, str)), f"no Jinja literal for {value!r}"
    return repr(value)
