"""Requests: what a client may send, and how it is told what it may not.

Owns every field of `/v1/chat/completions` and `/v1/completions`, its type and its bounds. A field
that is not here is an error that names it, and so is a value that this server would have to ignore:
what was asked for is done or refused. Whether a prompt can be rendered and how long it is, is seen
later, by `app.py`.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from myna.data.conversation import Message, ToolCall
from myna.data.json_text import NotJson, parse_json_text
from myna.inference.chat import as_message
from myna.inference.server.api_error import ApiError

MAX_CHOICES = 8
MAX_MESSAGES = 1024
MAX_PROMPTS = 16
MAX_TOOLS = 128
MAX_CALLS = 128
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 64
MAX_LOGPROBS = 20
MAX_TOKENS = 2**20
"""More than any context; how many there is room for is the model's business."""
MAX_SEED = 2**63 - 1
MAX_DEPTH = 64
"""Lists and objects inside one another, in a body."""

_NAME = r"^[^\x00-\x1f\x7f]{1,128}$"


def _text(value: Any) -> Any:
    """Content as a text: it may come as a list of parts, which are joined by line breaks."""
    if not isinstance(value, list):
        return value
    texts = []
    for at, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "part",
                "part {at} is {kind}; this server reads text parts only and fetches nothing",
                {"at": at, "kind": json.dumps(kind) if isinstance(kind, str) else "no text part"},
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "part", "part {at} has other fields than a type and a text", {"at": at}
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text)]
Switches = dict[
    Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")], bool | Annotated[str, Field(max_length=64)]
]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    BeforeValidator(_one_or_more),
    Field(max_length=MAX_STOPS),
]
Schema = Annotated[dict[str, Any], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )


class _Spoken(_Strict):
    """What clients write back from an answer, empty here always."""

    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class SystemMessage(_Strict):
    """A persona or an instruction; `developer` is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: Text
    name: Annotated[str, Field(pattern=_NAME)] | None = None

    def read(self) -> Message:
        """The message as templates get it."""
        return Message("system", self.content, name=self.name)


class UserMessage(_Strict):
    """A question."""

    role: Literal["user"]
    content: Text
    name: Annotated[str, Field(pattern=_NAME)] | None = None

    def read(self) -> Message:
        """The message as templates get it."""
        return Message("user", self.content, name=self.name)


class Function(_Strict):
    """What is called, its arguments as the JSON text of an object."""

    name: Annotated[str, Field(pattern=_NAME)]
    arguments: str


class Call(_Strict):
    """A call that an assistant asked for."""

    id: Annotated[str, Field(pattern=_NAME)]
    type: Literal["function"]
    function: Function

    def read(self) -> ToolCall:
        """The call, its arguments parsed. Raises NotJson."""
        arguments = parse_json_text(self.function.arguments or "{}")
        if not isinstance(arguments, dict):
            raise NotJson("the arguments are no JSON object")
        return ToolCall(self.function.name, arguments, self.id)


class AssistantMessage(_Spoken):
    """An earlier answer; thinking before it may be apart, or in `<think>` inside the content."""

    role: Literal["assistant"]
    content: Text | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MAX_CALLS)] | None = None
    name: Annotated[str, Field(pattern=_NAME)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("empty", "an assistant message has content or tool_calls")
        for at, call in enumerate(self.tool_calls or ()):
            try:
                call.read()
            except NotJson as error:
                raise PydanticCustomError(
                    "arguments", "tool_calls[{at}]: {why}", {"at": at, "why": str(error)}
                ) from None
        return self

    def read(self) -> Message:
        """The message as templates get it, and as `myna chat` keeps it."""
        said = as_message(self.content or "")
        if self.reasoning_content is not None:
            said = Message("assistant", self.content or "", reasoning=self.reasoning_content)
        calls = tuple(call.read() for call in self.tool_calls or ())
        return Message(
            "assistant", said.content, reasoning=said.reasoning, tool_calls=calls, name=self.name
        )


class ToolMessage(_Strict):
    """What a call returned."""

    role: Literal["tool"]
    content: Text
    tool_call_id: Annotated[str, Field(pattern=_NAME)]
    name: Annotated[str, Field(pattern=_NAME)] | None = None

    def read(self) -> Message:
        """The message as templates get it."""
        return Message("tool", self.content, name=self.name, tool_call_id=self.tool_call_id)


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class StreamOptions(_Strict):
    """What a stream has besides its text."""

    include_usage: bool = False
    """A last chunk with the numbers of tokens."""


class ResponseFormat(_Strict):
    """The form of an answer: text, whatever the model writes."""

    type: Literal["text"]


class Tool(_Strict):
    """A function that is offered to the model."""

    type: Literal["function"]
    function: Schema

    @model_validator(mode="after")
    def _has_a_name(self) -> "Tool":
        name = self.function.get("name")
        if not isinstance(name, str) or not re.fullmatch(_NAME, name):
            raise PydanticCustomError("tool_name", "function.name is missing or no short text")
        return self


class _Sampled(_Strict):
    """What both kinds of request have."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A run that is served, or `base`."""
    stream: bool | None = None
    """Send the answer piece by piece."""
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Longest answer, in tokens; prompt and answer together have to fit the model's context."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy. Default: the model's own."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling. Default: the model's own."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers to each prompt."""
    stop: Stops | None = None
    """Texts that end an answer and are not part of it."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Makes sampling repeatable; such a request is computed by itself."""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "_Sampled":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options belong to a stream; set stream to true"
            )
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


class ChatRequest(_Sampled):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Tell the log-probability of each token; such a request is computed by itself."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """And of so many likeliest ones."""
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    """Shown to the model by its chat template; calls come back in the text it writes."""
    tool_choice: Literal["auto"] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Annotated[Switches, Field(max_length=8)] | None = None
    """Switches that the model's chat template names, such as `enable_thinking`."""

    @model_validator(mode="after")
    def _belong_together(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "max_completion_tokens",
                "max_completion_tokens and max_tokens are one limit; send one",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "top_logprobs", "top_logprobs belong to logprobs; set logprobs to true"
            )
        if self.tool_choice is not None and self.tools is None:
            raise PydanticCustomError("tool_choice", "tool_choice without tools")
        return self

    @property
    def limit(self) -> int | None:
        """Most new tokens, as asked for."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest ids with each token; None: none and no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampled):
    """The body of `/v1/completions`: plain text that the model goes on from."""

    prompt: Annotated[
        list[str], BeforeValidator(_one_or_more), Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    """A text or several; token ids are not read."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Tell log-probabilities, of so many likeliest tokens; computed by itself."""
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def limit(self) -> int | None:
        """Most new tokens, as asked for."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest ids with each token; None: none and no log-probabilities."""
        return self.logprobs


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def read_request(kind: type[Request], body: bytes) -> Request:
    """The request in `body`.

    Raises ApiError (400) that names the first field at fault.
    """
    value = _parse(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(kind, error.errors(include_url=False, include_input=False)) from None


def _parse(body: bytes) -> Any:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _unreadable(f"byte {error.start + 1} is not UTF-8") from None
    try:
        value = parse_json_text(text)
    except NotJson as error:
        raise _unreadable(str(error)) from None
    if not isinstance(value, dict):
        raise _unreadable("it is no object")
    if _depth(value) > MAX_DEPTH:
        raise _unreadable(f"lists and objects are nested more than {MAX_DEPTH} deep")
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _unreadable("a text holds half of a surrogate pair") from None
    return value


def _depth(value: Any) -> int:
    """How many lists and objects stand in one another at most."""
    depth, level = 0, [value]
    while level := [
        inner
        for entry in level
        if isinstance(entry, dict | list)
        for inner in (entry.values() if isinstance(entry, dict) else entry)
    ]:
        depth += 1
    return depth


def _unreadable(why: str) -> ApiError:
    return ApiError(
        400, f"The body is not JSON that can be read: {why[:300]}.", code="invalid_json"
    )


def _refusal(kind: type[BaseModel], faults: Sequence[ErrorDetails]) -> ApiError:
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    field = _path(fault["loc"])
    if (field or "").startswith("response_format"):
        return ApiError(
            400,
            "response_format: this server gives plain text only; JSON cannot be guaranteed.",
            param="response_format",
            code="unsupported_parameter",
        )
    if fault["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{field} is not a parameter of this server; it is refused rather than ignored.",
            param=field,
            code="unsupported_parameter",
        )
    if fault["type"] in kind.model_fields:  # raised by a check of several fields
        field = fault["type"]
    code = "missing_required_parameter" if fault["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{field or 'The body'}: {fault['msg'][:500]}.", param=field, code=code)


def _path(location: tuple[int | str, ...]) -> str | None:
    """`messages[2].content`, without the names that pydantic gives to branches of unions."""
    path = ""
    for at, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif (at == 2 and location[0] == "messages" and part in _ROLES) or (
            at == 2 and location[0] == "chat_template_kwargs"
        ):
            continue
        else:
            path += ("." if path else "") + part[:64]
    return path or None


_ROLES = ("system", "developer", "user", "assistant", "tool")
