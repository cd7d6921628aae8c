"""Tools: what is trained is what transformers' published function makes of the same messages.

The templates are written for these tests, after what Hermes's, Qwen's and Llama 3.1's do.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_families import CHATML, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Conversation, Message, Place
from myna.data.encode import Encoder, RowRefused
from myna.data.files import Record
from myna.data.formats import convert, recognise
from myna.data.templates import choose_template

HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- 'Tools:' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' '
    "+ (call.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'user' %}"
    "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# One call a message, results as JSON, tools in front of the first question.
LLAMA31 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}{{- system + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{%- if loop.first and tools and message.role == 'user' %}"
    "{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n\\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- elif message.tool_calls is defined %}"
    "{%- if message.tool_calls | length != 1 %}"
    "{{- raise_exception('one call at once') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    '{{- \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{- call.arguments | tojson }}{{- '}' + '<|eot_id|>' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{- message.content | tojson }}{{- '<|eot_id|>' }}"
    "{%- else %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
FAMILIES: dict[str, Any] = {
    "hermes": make_tokenizer(
        "byte", HERMES, added=["<tool_call>", "</tool_call>"], eos_token="<|im_end|>"
    ),
    "llama31": make_tokenizer(
        "byte", LLAMA31, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    ),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "天气 of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    return Encoder(
        tokenizer,
        choose_template(tokenizer, None),
        stop_ids=[tokenizer.eos_token_id],
        **options,
    )


def read(row: dict[str, Any]) -> Conversation:
    place = Place(Path("rows.jsonl"), 1, 1)
    parsed = convert(row, recognise([Record(row, place)]))
    return Conversation(tuple(parsed.messages), place, parsed.tools)


def call(name: str, arguments: dict[str, Any], number: int = 1) -> dict[str, Any]:
    return {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def result(content: str, number: int = 1) -> dict[str, Any]:
    return {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": f"call_{number}",
        "content": content,
    }


def as_written(message: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's interface has it in files: arguments as text, null beside a call."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in message["tool_calls"]
    ]
    return {**message, "content": message["content"] or None, "tool_calls": calls}


def check(family: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    """Every answer's ids against `apply_chat_template` on the same messages."""
    tokenizer = FAMILIES[family]
    row: dict[str, Any] = {"messages": [as_written(message) for message in messages]}
    examples = encoder(tokenizer).encode(read(row | ({"tools": tools} if tools else {})))
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(examples) == len(answers)
    for example, at in zip(examples, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:at], tools=tools, add_generation_prompt=True
        )["input_ids"]
        whole = tokenizer.apply_chat_template(messages[: at + 1], tools=tools)["input_ids"]
        assert list(example.prompt_ids) == prompt
        if whole[: len(prompt)] == prompt:
            end = whole.index(tokenizer.eos_token_id, len(prompt)) + 1
            assert list(example.completion_ids) == whole[len(prompt) : end]
        else:  # a token spans the border, which a model that answers cannot write
            text = tokenizer.decode(prompt + list(example.completion_ids))
            assert tokenizer.decode(whole).startswith(text)


WEATHER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining in 巴黎?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("get_weather", {"city": "巴黎", "days": 2, "exact": None})],
    },
    result('{"rain": true}'),
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And tomorrow?"},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_and_results_through_the_template(family: str) -> None:
    check(family, WEATHER, TOOLS)
    made = encoder(FAMILIES[family])
    examples = made.encode(read({"messages": WEATHER, "tools": TOOLS}))
    name = "arguments" if family == "hermes" else "parameters"
    written = f'{{"name": "get_weather", "{name}": {{"city": "巴黎", "days": 2, "exact": null}}}}'
    lead, end = ("<tool_call>\n", "\n</tool_call>") if family == "hermes" else ("", "")
    stop = FAMILIES[family].eos_token
    assert [example.completion_text for example in examples] == [
        f"{lead}{written}{end}{stop}",
        f"It is.{stop}",
        f"No.{stop}",
    ]


def test_several_calls_at_once_and_their_results() -> None:
    asked = [call("get_weather", {"city": "a"}, 1), call("get_weather", {"city": "b"}, 2)]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "I look.", "tool_calls": asked},
        result("sun", 1),
        result("rain", 2),
        {"role": "assistant", "content": "Sun and rain."},
    ]
    check("hermes", messages, TOOLS)
    with pytest.raises(RowRefused) as refused:
        encoder(FAMILIES["llama31"]).encode(read({"messages": messages, "tools": TOOLS}))
    assert "the chat template does not accept the messages: one call at once" in str(refused.value)


TEXT = st.text("ab 天\n\"'{}\\", min_size=1, max_size=8).filter(str.strip)
ARGUMENTS = st.dictionaries(TEXT, st.none() | st.integers(0, 9) | TEXT, max_size=2)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.tuples(TEXT, st.lists(st.tuples(ARGUMENTS, TEXT), max_size=2), TEXT), min_size=1,
             max_size=2),
    st.booleans(),
)  # fmt: skip
def test_random_dialogues_with_tools(
    family: str,
    turns: list[tuple[str, list[tuple[dict[str, Any], str]], str]],
    offered: bool,
) -> None:
    messages: list[dict[str, Any]] = []
    for question, lookups, answer in turns:
        messages.append({"role": "user", "content": question})
        for arguments, found in lookups:
            asked = {"role": "assistant", "content": "", "tool_calls": [call("f", arguments)]}
            messages += [asked, result(found)]
        messages.append({"role": "assistant", "content": answer})
    check(family, messages, TOOLS if offered else None)


def refusal(row: dict[str, Any], template: str, **options: Any) -> RowRefused:
    tokenizer = make_tokenizer("byte", template, eos_token="<|im_end|>", added=["<tool_call>"])
    with pytest.raises(RowRefused) as refused:
        encoder(tokenizer, **options).encode(read(row))
    return refused.value


def test_a_template_that_knows_no_calls_is_refused() -> None:
    error = refusal({"messages": WEATHER}, CHATML)
    assert error.reason == "call_dropped"
    assert str(error) == (
        "rows.jsonl line 1: the chat template leaves out the tool call get_weather.\n"
        "  It knows no tool calls: set `template: FILE` to one that writes them. It makes of it "
        '"<|im_end|>\\n"'
    )
    assert refusal({"messages": WEATHER, "tools": TOOLS}, CHATML).reason == "tools_dropped"
    context = [*WEATHER[:2], {**WEATHER[2], "train": False}, *WEATHER[3:]]
    assert refusal({"messages": context}, CHATML).reason == "call_dropped"


def test_a_template_that_drops_results_is_refused() -> None:
    source = HERMES.replace("message.content + '\\n</tool_response>'", "'</tool_response>'")
    assert source != HERMES
    error = refusal({"messages": WEATHER, "tools": TOOLS}, source)
    assert error.reason == "text_dropped"
    assert "the chat template leaves out or changes the tool text." in str(error)


def test_control_and_stop_tokens_in_arguments_are_refused() -> None:
    asked = {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": "x<|im_end|>"})]}
    row = {"messages": [{"role": "user", "content": "q"}, asked]}
    error = refusal(row, HERMES)
    assert error.reason == "control_token"
    assert 'the tool call of turn 1 contains "<|im_end|>"' in str(error)
    error = refusal(row, HERMES, control_tokens="allow")
    assert str(error) == (
        'rows.jsonl line 1: the tool call contains the stop token "<|im_end|>", where it would be '
        "cut.\n  Remove it from the text."
    )
    marked = [{"role": "user", "content": "say <tool_call>"}, {"role": "assistant", "content": "a"}]
    assert refusal({"messages": marked}, HERMES).reason == "control_token"


def test_a_greeting_is_context_where_the_template_accepts_it() -> None:
    talk = [
        {"from": "gpt", "value": "Hello, I am Bo."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Bo."},
    ]
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    (example,) = encoder(tokenizer).encode(read({"conversations": talk}))
    served = [
        {"role": role, "content": turn["value"]}
        for role, turn in zip(("assistant", "user"), talk, strict=False)
    ]
    wanted = tokenizer.apply_chat_template(served, add_generation_prompt=True)["input_ids"]
    assert list(example.prompt_ids) == wanted
    assert (example.completion_text, example.turn) == ("Bo.<|im_end|>", 2)
    first = "messages[0].role == 'assistant'"
    strict = f"{{% if {first} %}}{{{{ raise_exception('user first') }}}}{{% endif %}}"
    error = refusal({"conversations": talk}, strict + CHATML)
    assert str(error).endswith("the chat template does not accept the messages: user first")


def test_a_greeting_that_a_flag_trains_needs_something_before_it() -> None:
    greeting = {"role": "assistant", "content": "Hello.", "train": True}
    rest = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    error = refusal({"messages": [greeting, *rest]}, CHATML)
    assert str(error) == (
        "rows.jsonl line 1: the first message is an answer that is to be trained, and nothing "
        "stands before it.\n  Put a system or user message before it, or take its flag away."
    )
    system = {"role": "system", "content": "You are Bo."}
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    first, second = encoder(tokenizer).encode(read({"messages": [system, greeting, *rest]}))
    assert first.prompt_text == (
        "<|im_start|>system\nYou are Bo.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (first.completion_text, second.completion_text) == ("Hello.<|im_end|>", "a<|im_end|>")


def test_messages_give_templates_only_the_keys_they_have() -> None:
    assert Message("tool", "x", name="f", tool_call_id="c", weight=2.0).as_template_input() == {
        "role": "tool",
        "content": "x",
        "name": "f",
        "tool_call_id": "c",
    }
    assert Message("user", "x", trained=False).as_template_input() == {
        "role": "user",
        "content": "x",
    }
