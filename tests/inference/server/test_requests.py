"""What a body may hold: everything else is refused by the name of the field."""

import json
import time
from typing import Any

import pytest

from myna.data.conversation import Message, ToolCall
from myna.inference.server.api_error import ApiError
from myna.inference.server.requests import ChatRequest, CompletionRequest, read_request

QUESTION = {"role": "user", "content": "Hello?"}


def read(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [QUESTION]} | fields
    return read_request(ChatRequest, json.dumps(body).encode())


def refusal(kind: type = ChatRequest, body: bytes | None = None, **fields: Any) -> ApiError:
    if body is None:
        given = {"model": "m", "messages": [QUESTION]} if kind is ChatRequest else {"model": "m"}
        body = json.dumps(given | fields).encode()
    begun = time.perf_counter()
    with pytest.raises(ApiError) as refused:
        read_request(kind, body)
    assert time.perf_counter() - begun < 5  # the promise is 50 ms, on a machine that is not busy
    assert refused.value.status == 400
    return refused.value


NUMBERS = {
    "max_tokens": (0, -1, 2**20 + 1),
    "max_completion_tokens": (0, -1, 10**30),
    "temperature": (-0.1, 2.1, -1e308),
    "top_p": (0, -1, 1.01),
    "n": (0, -1, 9),
    "seed": (-1, 2**63),
    "top_logprobs": (-1, 21),
    "presence_penalty": (0.1, -0.1),
    "frequency_penalty": (2, -2),
}


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_is_bounded_on_both_sides_and_is_a_number(field: str) -> None:
    for value in (*NUMBERS[field], True, "1", [1], {}, 10**30, -(10**30)):
        error = refusal(logprobs=True, **{field: value})
        assert error.param == field, (field, value, error.message)
    for raw in ("NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 5000):
        body = f'{{"model": "m", "messages": [], "{field}": {raw}}}'.encode()
        assert refusal(body=body).code == "invalid_json"


def test_the_bounds_themselves_and_null_are_taken() -> None:
    assert read(n=8, max_tokens=1, temperature=2, top_p=1.0, seed=2**63 - 1).choices == 8
    assert read(temperature=0, presence_penalty=0, frequency_penalty=0.0).temperature == 0
    nothing = dict.fromkeys(set(ChatRequest.model_fields) - {"model", "messages"})
    assert read(**nothing) == read()
    assert read(logprobs=True, top_logprobs=20).wanted_logprobs == 20
    assert read(logprobs=True).wanted_logprobs == 0
    assert read().wanted_logprobs is None
    assert read(stop="x").stop == ["x"]
    assert read(max_completion_tokens=5).limit == 5


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"logit_bias": {}}, "logit_bias", "is refused rather than ignored"),
        ({"user": "me"}, "user", "is refused rather than ignored"),
        ({"tokenize": False}, "tokenize", "is refused rather than ignored"),
        ({"x" * 5000: 1}, "x" * 64, "is refused rather than ignored"),
        ({"response_format": {"type": "json_object"}}, "response_format", "plain text only"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format",
            "plain text only",
        ),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", "at least 1"),
        (
            {"tools": [{"type": "function", "function": {"name": 1}}]},
            "tools[0]",
            "function.name is missing",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "128"),
        ({"tool_choice": "auto"}, "tool_choice", "without tools"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["a", "b" * 65]}, "stop[1]", "at most 64"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [QUESTION] * 1025}, "messages", "at most 1024"),
        ({"messages": [QUESTION, {"role": "king", "content": ""}]}, "messages[1]", "king"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{**QUESTION, "extra": 1}]}, "messages[0].extra", "refused"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}},
                        ],
                    }
                ]
            },
            "messages[0].content",
            'part 1 is "image_url"; this server reads text parts only and fetches nothing',
        ),
        ({"messages": [{"role": "assistant"}]}, "messages[0]", "content or tool_calls"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id", "required"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, "max_completion_tokens", "one limit"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a", "boolean"),
        ({"chat_template_kwargs": {"A.b": True}}, "chat_template_kwargs.A.b", "pattern"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str, text: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert text in error.message
    assert len(error.message) < 1000


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "Expecting value"),
        (b"[]", "it is no object"),
        (b'{"model": "m", "model": "n"}', 'the key "model" occurs twice'),
        (b'{"model": "\xff"}', "byte 12 is not UTF-8"),
        (b'{"model": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
    ],
)
def test_what_is_no_json_is_told_so(body: bytes, text: str) -> None:
    assert text in refusal(body=body).message


def test_brackets_in_a_text_are_text() -> None:
    assert read(messages=[{"role": "user", "content": "[{" * 200}]).messages[0].content


def test_messages_are_read_as_templates_and_chat_have_them() -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    request = read(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "refusal": None},
            {"role": "assistant", "content": "c", "reasoning_content": "d"},
            {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
        ]
    )
    assert [message.read() for message in request.messages] == [
        Message("system", "Be brief."),
        Message("user", "a\nb"),
        Message("assistant", "yes", reasoning="hm"),
        Message("assistant", "c", reasoning="d"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}, "c1"),)),
        Message("tool", "2", tool_call_id="c1"),
    ]
    call["function"]["arguments"] = "[1]"  # type: ignore[index]
    error = refusal(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert "tool_calls[0]: the arguments are no JSON object" in error.message


def test_plain_completions() -> None:
    body = json.dumps({"model": "m", "prompt": "Once", "logprobs": 2, "echo": False}).encode()
    request = read_request(CompletionRequest, body)
    assert (request.prompt, request.wanted_logprobs, request.limit) == (["Once"], 2, None)
    assert refusal(CompletionRequest, prompt=[1, 2]).param == "prompt[0]"
    assert refusal(CompletionRequest, prompt="a", echo=True).param == "echo"
    assert refusal(CompletionRequest, prompt="a", best_of=2).param == "best_of"
    assert refusal(CompletionRequest, prompt="a", suffix="b").code == "unsupported_parameter"
    assert refusal(CompletionRequest).param == "prompt"
