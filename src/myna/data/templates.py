"""Chat templates: messages to the text a model reads, with the tokenizer's own Jinja.

Owns which template is used and why, how a system text reaches a model that has no system role, the
thinking switch, and which variables a template may be given. How it is rendered, and what becomes
of one that runs away, is `rendering.py`'s; token ids are left to `encode.py`.
"""

import contextlib
import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from myna.data.conversation import Message
from myna.data.rendering import (
    STOPPED_MEND,
    Renderer,
    TemplateError,
    TemplateStopped,
    renderer_for,
)
from myna.data.template_sandbox import ANSWER, PROMPT, WHOLE
from myna.errors import ConfigError

BUILT_IN_FOLDER = Path(__file__).parent / "builtin_templates"


@dataclass(frozen=True)
class BuiltIn:
    """When a template of the package belongs to a model that ships none."""

    model_types: tuple[str, ...] = ()
    """In small letters. None: it is taken only by name."""
    tokens: tuple[str, ...] = ()
    """What the tokenizer has to know as one token each for the template to be this model's."""
    any_model: bool = False
    """No model's own: where a tokenizer begins plain texts with its BOS, so does the template."""


BUILT_IN: Mapping[str, BuiltIn] = {
    "alpaca": BuiltIn(any_model=True),
    # Atom's model type is Llama's.
    "atom": BuiltIn(),
    # Baichuan's first generation has the same type, and other tokens at the same places.
    "baichuan2": BuiltIn(("baichuan",), ("<reserved_106>", "<reserved_107>")),
    "bluelm": BuiltIn(("bluelm",)),
    # So have its predecessors, without role tokens, and GLM-4, which ships a template.
    "chatglm3": BuiltIn(("chatglm",), ("[gMASK]", "sop", "<|user|>", "<|assistant|>")),
    "chatml": BuiltIn(any_model=True),
    "internlm2": BuiltIn(("internlm2",), ("<|im_start|>", "<|im_end|>")),
    "qwen": BuiltIn(("qwen",), ("<|im_start|>", "<|im_end|>")),
    "vicuna": BuiltIn(any_model=True),
    "yuan2": BuiltIn(("yuan",), ("<sep>", "<eod>")),
}
"""Name to what is known of it; its text is `builtin_templates/NAME.jinja`."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates of thinking models are told to leave the thinking out."""
OPTIONS: Mapping[str, type] = {"enable_thinking": bool, "thinking": bool, "date_string": str}
"""Variables that a template may be given besides messages, tools and the special tokens."""
_OPTION_CHARACTERS = 40

_PROBE_SYSTEM, _PROBE_USER = "myna probe of the system text", "myna probe of the user text"
_DATE_DEFAULT = re.compile(r"""set\s+date_string\s*=\s*(["'])([\w ,.:/-]{1,40})\1""")
_MARKER = re.compile(
    r"(?<!<)<(?:[|｜][^<>|｜\n]{1,40}[|｜]|[^<>|\s]{1,40})>|\[\|[^\[\]|\n]{1,40}\|\]:?"
)
"""What is meant as one token, if a template writes it: `<|user|>`, `<s>`, `[|AI|]:`."""

Tools = Sequence[Mapping[str, Any]] | None


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
    switch: str | None = None
    """Which of `THINKING_SWITCHES` means something to this template."""
    notes: tuple[str, ...] = ()
    """What a person should know about it, one line each."""
    renderer: Renderer = field(default_factory=Renderer, compare=False, repr=False)
    """Shared by all that is made from this template."""

    def render(
        self, messages: Sequence[Message], tools: Tools = None, *, add_generation_prompt: bool
    ) -> str:
        """The text of `messages`; with `add_generation_prompt` up to where an answer begins.

        Raises:
            TemplateError: the template does not accept these messages.
            TemplateStopped: it ran away.
        """
        kind = PROMPT if add_generation_prompt else WHOLE
        (texts,) = self._render_all([(messages, tools)], kind)
        if isinstance(texts, TemplateError):
            raise texts
        return texts[0]

    def render_answers(
        self, turns: Sequence[tuple[Sequence[Message], Tools]]
    ) -> list[tuple[str, str] | TemplateError]:
        """Per turn, whose last message is the answer: the prompt before it, and all with it.

        Many at a time, which costs less than one by one. Raises TemplateStopped.
        """
        return [
            texts if isinstance(texts, TemplateError) else (texts[0], texts[1])
            for texts in self._render_all(turns, ANSWER)
        ]

    def _render_all(
        self, turns: Sequence[tuple[Sequence[Message], Tools]], kind: str
    ) -> list[list[str] | TemplateError]:
        variables = {**self.special_tokens, **self.options}
        requests = [
            (
                [
                    message.as_template_input()
                    for message in (_fold_system(messages) if self.folds_system else messages)
                ],
                [dict(tool) for tool in tools] if tools else None,
                kind,
            )
            for messages, tools in turns
        ]
        if self.tool_source is None:
            return self.renderer.render(self.source, variables, requests)
        texts: list[list[str] | TemplateError] = []
        for request in requests:
            source = self.tool_source if request[1] else self.source
            texts += self.renderer.render(source, variables, [request])
        return texts

    @property
    def has_thinking_switch(self) -> bool:
        """Whether thinking can be switched off."""
        return self.switch is not None

    def with_thinking(self, thinking: bool) -> "ChatTemplate":
        """The same template with thinking on or off; itself where it has no such switch."""
        if self.switch is None or self.options.get(self.switch) is thinking:
            return self
        return replace(self, options={**self.options, self.switch: thinking})

    @property
    def saved_source(self) -> str:
        """The source to write beside an adapter: servers that pass no options get ours."""
        head = "".join(
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_jinja_literal(value)} %}}"
            "{%- endif %}"
            for name, value in sorted(self.options.items())
        )
        return self.source if self.source.startswith(head) else head + self.source

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `saved_source`: equal where messages get the same text."""
        return hashlib.sha256(self.saved_source.encode()).hexdigest()


def choose_template(
    tokenizer: Any,
    model_type: str | None,
    *,
    override: Path | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The template of a model: `override`, the tokenizer's own, or a built-in.

    Args:
        tokenizer: a transformers tokenizer.
        model_type: `model_type` of the model's config; decides which built-in fits.
        override: the name of a built-in or a Jinja file, in place of the tokenizer's template. What
            has neither a path separator nor `.jinja` is a name first.
        options: those an adapter was saved with. Not given: thinking is off, where it can be.

    Raises:
        ConfigError: there is no template, the file is missing, it cannot render a question, or it
            runs away when it tries.
    """
    source, tool_source, origin, notes = _find_source(tokenizer, model_type, override)
    template = ChatTemplate(
        source,
        origin,
        _special_tokens(tokenizer),
        _checked_options(options or {}),
        tool_source,
        renderer=renderer_for(source),
        notes=(f"chat template: {origin}", *notes),
    )
    try:
        template = _with_defaults(template, fresh=options is None)
        return _probed(template, tokenizer)
    except TemplateStopped as stop:
        raise ConfigError(
            f"The chat template ({origin}) was stopped: {stop.why}.\n{STOPPED_MEND}"
        ) from stop


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's named tokens as plain strings."""
    return {
        name: [str(token) for token in value] if isinstance(value, list | tuple) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if they are among those that templates may be given."""
    for name, value in options.items():
        expected = OPTIONS.get(name)
        if type(value) is not expected or len(str(value)) > _OPTION_CHARACTERS:
            known = ", ".join(f"{known} ({kind.__name__})" for known, kind in OPTIONS.items())
            raise ConfigError(
                f"The option {name!r} of the chat template is {value!r}; templates may be given "
                f"{known}.\n  Take it out of the adapter's saved options."
            )
    return dict(options)


def _with_defaults(template: ChatTemplate, *, fresh: bool) -> ChatTemplate:
    """The template with its thinking switch found; a fresh one with thinking off, and its date."""
    try:
        variables = template.renderer.variables(template.source)
    except TemplateError as error:
        raise _cannot_ask(template, error) from error
    switch = next((name for name in THINKING_SWITCHES if name in variables), None)
    template = replace(template, switch=switch)
    if "strftime_now" in template.source:
        # A date that changes overnight would train other ids in a run that is resumed, and serve
        # others than were trained. Where the template has a variable for it, and a date of its own
        # for engines without a clock, that one is taken for good, and saved with the adapter.
        default = _DATE_DEFAULT.search(template.source) if "date_string" in variables else None
        if default is not None and fresh:
            template = replace(template, options={**template.options, "date_string": default[2]})
        date = template.options.get("date_string")
        note = (
            "the chat template writes today's date into every prompt; prompts of another day differ"
            if date is None
            else f'the chat template writes a date into every prompt: "{date}" in training, and in '
            "serving with the saved template"
        )
        template = replace(template, notes=(*template.notes, note))
    return template.with_thinking(False) if fresh else template


def _find_source(
    tokenizer: Any, model_type: str | None, override: Path | str | None
) -> tuple[str, str | None, str, list[str]]:
    """Source, source for tools, origin and notes."""
    if override is not None:
        return _find_override(tokenizer, override)
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" in own:
            return own["default"], own.get("tool_use"), "the tokenizer's own, named default", []
        raise ConfigError(
            f"The tokenizer has several chat templates ({', '.join(sorted(own))}) and none is "
            "named default.\n  Write the one to use into a file and set `template: FILE`."
        )
    if own:
        return own, None, "the tokenizer's own", []
    for name, built_in in BUILT_IN.items():
        if (model_type or "").lower() in built_in.model_types and not _unknown_tokens(
            tokenizer, built_in.tokens
        ):
            source = _read_built_in(name, tokenizer)
            return source, None, f"built-in {name}.jinja (the tokenizer has none)", []
    raise ConfigError(
        f"The tokenizer has no chat template, and none of the built-in ones is certain to be that "
        f"of model type {model_type!r}: {', '.join(BUILT_IN)}.\n"
        "  Name the one the model was trained with, as `template: NAME`, or set `template: FILE` "
        "to a Jinja file. A base model has seen none: any will do, or take the chat model."
    )


def _find_override(tokenizer: Any, override: Path | str) -> tuple[str, str | None, str, list[str]]:
    path, text = Path(override), str(override)
    notes = (
        ["it is used in place of the tokenizer's own template"] if tokenizer.chat_template else []
    )
    is_name = isinstance(override, str) and path.name == text and not text.endswith(".jinja")
    if is_name and text in BUILT_IN:
        if path.is_file():
            notes.append(f"template: {text} is the built-in; the file of that name is ./{text}")
        missing = _unknown_tokens(tokenizer, BUILT_IN[text].tokens)
        if missing:
            notes.append(_split_note(missing))
        return _read_built_in(text, tokenizer), None, f"built-in {text}.jinja", notes
    if is_name and not path.exists():
        near = difflib.get_close_matches(text, BUILT_IN, n=1, cutoff=0.5)
        raise ConfigError(
            f'template: "{text}" is no built-in template and no file here'
            + (f'; did you mean "{near[0]}"?\n' if near else ".\n")
            + f"  Built-in: {', '.join(BUILT_IN)}. A file is written with a path separator or "
            ".jinja."
            + (
                " Leave `template` out to use the tokenizer's own."
                if tokenizer.chat_template
                else ""
            )
        )
    try:
        return path.read_text(encoding="utf-8"), None, f"file {path.name}", notes
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"template: {path} could not be read: {reason}; expected a Jinja file.\n"
            "  Mend the path, or leave `template` out to use the tokenizer's own."
        ) from error


def _read_built_in(name: str, tokenizer: Any) -> str:
    text = (BUILT_IN_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    bos = tokenizer.bos_token_id
    begins_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return with_bos(text) if BUILT_IN[name].any_model and begins_with_bos else text


def with_bos(source: str) -> str:
    """A template that writes the tokenizer's BOS before all else."""
    return "{{- bos_token -}}\n" + source


def _unknown_tokens(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Those of `texts` that the tokenizer does not read as one token."""
    added = tokenizer.get_added_vocab()
    return [text for text in texts if text not in added and text not in _tokens(tokenizer, text)]


def _tokens(tokenizer: Any, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return tokens


def _split_note(markers: Sequence[str]) -> str:
    listed = ", ".join(f'"{marker}"' for marker in markers)
    is_are = "is not one token" if len(markers) == 1 else "are not one token each"
    return (
        f"the chat template writes {listed}, which {is_are} of this tokenizer but plain text: "
        "another model's template?"
    )


def _cannot_ask(template: ChatTemplate, error: TemplateError) -> ConfigError:
    return ConfigError(
        f"The chat template ({template.origin}) cannot render a single user message: {error}\n"
        "  Mend the template, or set `template: FILE` to another."
    )


def _probed(template: ChatTemplate, tokenizer: Any) -> ChatTemplate:
    """Render a question without and with a system text, to learn what the template does with it."""
    question = Message("user", _PROBE_USER)
    try:
        plain = template.render([question], add_generation_prompt=True)
    except TemplateError as error:
        raise _cannot_ask(template, error) from error
    if _PROBE_USER not in plain:
        raise ConfigError(
            f"The chat template ({template.origin}) leaves out the text of a user message; it "
            f"renders {plain[:200]!r}.\n  Mend the template, or set `template: FILE` to another."
        )
    notes = list(template.notes)
    whole = ""
    with contextlib.suppress(TemplateError):  # `encode.py` refuses such a template
        answer = Message("assistant", _PROBE_USER)
        whole = template.render([question, answer], add_generation_prompt=False)
    markers = dict.fromkeys(_MARKER.findall(plain + whole))
    if split := _unknown_tokens(tokenizer, markers):
        notes.append(_split_note(split))
    how: Literal["refuses", "drops"] | None = None
    try:
        with_system = template.render(
            [Message("system", _PROBE_SYSTEM), question], add_generation_prompt=True
        )
    except TemplateError:
        how = "refuses"
    else:
        if _PROBE_SYSTEM not in with_system:
            how = "drops"
    if how is not None:
        notes.insert(
            1,
            f"the chat template {how} the system role; a system text is put before the first "
            "user's text, with a blank line between",
        )
    return replace(template, folds_system=how is not None, notes=tuple(dict.fromkeys(notes)))


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
