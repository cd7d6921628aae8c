"""What is trained is what is served: the ids of `apply_chat_template`, over random talks."""

from functools import cache
from typing import Any

import pytest
from chat_families import make_tokenizer, talk
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, LLAMA3, Family, family_tokenizer

from myna.data.conversation import Conversation, Message
from myna.data.dataset import encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows
from myna.data.templates import choose_template

WORDS = ["hello", "there", "天气", "你好！", "😀", "é", "：", "think", "a", "1"]
MARKS = ["  ", "\n", "\n\n", "<b>", "</b>", "{{ x }}", "'", '"', "\\n", "|", "%}"]
TEXTS = st.lists(
    st.sampled_from([*WORDS, *MARKS]),
    min_size=1,
    max_size=6,
).map("".join)
WORDED = TEXTS.map(lambda text: text if text.strip() else f"word{text}")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'How it is "outside" <now>, 天气',
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


@st.composite
def conversations(draw: st.DrawFn, family: Family) -> Conversation:
    """A conversation that the family can hold: some turns, perhaps with system, tools, thoughts."""
    messages = []
    if family.system and draw(st.booleans()):
        messages.append(Message("system", draw(WORDED)))
    answers = WORDED
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(WORDED)))
        if family.results and draw(st.integers(0, 3)) == 0:
            messages.append(Message("assistant", draw(answers), trained=False))
            messages += [Message("tool", draw(WORDED)) for _ in range(draw(st.integers(1, 2)))]
        thought = draw(st.none() | WORDED) if family.reasons else None
        trained = draw(st.integers(0, 4)) > 0
        messages.append(Message("assistant", draw(answers), thought, trained))
    last = messages[-1]
    messages[-1] = Message("assistant", last.content, last.reasoning)
    tools = (TOOL,) if family.tools and draw(st.booleans()) else None
    return talk(*messages, tools=tools)


@cache
def encoder(name: str) -> Encoder:
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    stops = family.stop_ids or (tokenizer.eos_token,)
    return Encoder(
        tokenizer,
        choose_template(tokenizer, family.model_type),
        stop_ids=[tokenizer.convert_tokens_to_ids(token) for token in stops],
    )


def served(tokenizer: Any, conversation: Conversation, index: int, **options: Any) -> list[int]:
    """The ids that a server makes of the messages before number `index`, by transformers alone."""
    ids: list[int] = tokenizer.apply_chat_template(
        [message.as_template_input() for message in conversation.messages[:index]],
        tools=[dict(tool) for tool in conversation.tools] if conversation.tools else None,
        add_generation_prompt=True,
        tokenize=True,
        **options,
    )["input_ids"]
    return ids


def check_parity(name: str, conversation: Conversation) -> None:
    family, tokenizer, made = FAMILIES[name], family_tokenizer(name), encoder(name)
    trained = [
        (index, message)
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.trained
    ]
    examples = made.encode(conversation)
    assert len(examples) == len(trained)
    for example, (index, answer) in zip(examples, trained, strict=True):
        options = {"chat_template": made.template.source, **made.template.options}
        if family.switch:
            options[family.switch] = answer.reasoning is not None
        assert list(example.prompt_ids) == served(tokenizer, conversation, index, **options)

        whole = tokenizer(example.prompt_text + example.completion_text, add_special_tokens=False)
        joined = list(example.prompt_ids + example.completion_ids)
        assert tokenizer.decode(joined) == tokenizer.decode(whole["input_ids"])
        if family.kind == "byte":
            assert tokenizer.decode(joined) == example.prompt_text + example.completion_text

        stop = tokenizer.convert_tokens_to_ids(family.stop)
        assert example.completion_ids[-1] == stop and stop in made.stop_ids
        assert example.completion_ids.count(stop) == 1
        body = example.completion_text.removesuffix(family.stop)
        assert body != example.completion_text
        front, answered, behind = body.rpartition(answer.content.strip())
        assert answered and not behind.strip()
        assert (answer.reasoning or "").strip() in front
        if family.reasons and answer.reasoning is None:
            # What a thinking model writes before an answer that it did not think about is empty.
            assert set(front) <= set("<think>/ \n") or "final" in front

        if (bos := tokenizer.bos_token_id) is not None and bos in example.prompt_ids:
            assert example.prompt_ids[0] == bos and example.prompt_ids[1] != bos
            assert bos not in example.completion_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_what_a_server_sends(name: str) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(conversations(FAMILIES[name]))
    def holds(conversation: Conversation) -> None:
        check_parity(name, conversation)

    holds()


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_what_a_server_sends_in_a_thousand_conversations(name: str) -> None:
    @settings(max_examples=1000, deadline=None, derandomize=True)
    @given(conversations(FAMILIES[name]))
    def holds(conversation: Conversation) -> None:
        check_parity(name, conversation)

    holds()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("thinks", [False, True])
def test_the_saved_template_serves_what_was_trained(name: str, thinks: bool) -> None:
    """An engine that knows the adapter's folder only, and passes no options."""
    family = FAMILIES[name]
    if thinks and not family.reasons:
        pytest.skip("the family's answers have no reasoning")
    answers = [Message("assistant", text, "because" if thinks else None) for text in ("yes", "no")]
    conversation = talk(("user", "hello"), answers[0], ("user", "there"), answers[1])
    dataset = encode_dataset(encoder(name), Rows((conversation,), (), "hash"))
    tokenizer = family_tokenizer(name)
    for example, index in zip(dataset.examples, (1, 3), strict=True):
        ids = served(tokenizer, conversation, index, chat_template=dataset.template.saved_source)
        assert list(example.prompt_ids) == ids


def test_the_texts_of_a_conversation_with_a_thinking_model() -> None:
    """By hand: reasoning in the answer that is trained, and gone from the turns before it."""
    conversation = talk(
        ("system", "Be kind."),
        ("user", "one"),
        Message("assistant", "1", "first"),
        ("user", "two"),
        Message("assistant", "2"),
        ("user", "three"),
        Message("assistant", "3", "third"),
    )
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
    head += "<|im_start|>assistant\n"
    second = head + "1<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    third = second + "2<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    texts = [
        (example.prompt_text, example.completion_text)
        for example in encoder("qwen3").encode(conversation)
    ]
    assert texts == [
        (head, "<think>\nfirst\n</think>\n\n1<|im_end|>"),
        (second + "<think>\n\n</think>\n\n", "2<|im_end|>"),
        (third, "<think>\nthird\n</think>\n\n3<|im_end|>"),
    ]


@pytest.mark.parametrize(
    ("name", "reasoning", "prompt", "completion"),
    [
        ("qwen3-thinking", "so", "assistant\n<think>\n", "so\n</think>\n\nyes<|im_end|>"),
        ("qwen3-thinking", None, "assistant\n<think>\n", "\n</think>\n\nyes<|im_end|>"),
        ("qwq", "so", "assistant\n<think>\n", "so\n</think>\n\nyes<|im_end|>"),
        ("qwq", None, "assistant\n<think>\n", "\n</think>\n\nyes<|im_end|>"),
        (
            "deepseek-r1",
            "so",
            "<｜Assistant｜><think>\n",
            "so\n</think>\n\nyes<｜end▁of▁sentence｜>",
        ),
        ("deepseek-v3.1", "so", "<｜Assistant｜><think>", "so</think>yes<｜end▁of▁sentence｜>"),
        ("deepseek-v3.1", None, "<｜Assistant｜></think>", "yes<｜end▁of▁sentence｜>"),
        ("glm-4.5", "so", "<|assistant|>", "\n<think>so</think>\nyes<|endoftext|>"),
        (
            "glm-4.5",
            None,
            "hello/nothink<|assistant|>\n<think></think>",
            "\nyes<|endoftext|>",
        ),
        (
            "gpt-oss",
            "so",
            "<|start|>assistant",
            "<|channel|>analysis<|message|>so<|end|>"
            "<|start|>assistant<|channel|>final<|message|>yes<|return|>",
        ),
        ("gpt-oss", None, "<|start|>assistant", "<|channel|>final<|message|>yes<|return|>"),
    ],
)
def test_where_thinking_begins_and_ends(
    name: str, reasoning: str | None, prompt: str, completion: str
) -> None:
    answer = Message("assistant", "yes", reasoning)
    (example,) = encoder(name).encode(talk(("user", "hello"), answer))
    assert example.prompt_text.endswith(prompt)
    assert example.completion_text == completion


def test_reasoning_that_history_drops_is_no_reasoning_found_in_the_answer() -> None:
    """QwQ's template writes an empty block into no turn: the reasoning must be put in."""
    (example,) = encoder("qwq").encode(
        talk(("user", "hello"), Message("assistant", "so it is", "so"))
    )
    assert example.completion_text == "so\n</think>\n\nso it is<|im_end|>"


def test_a_date_with_a_variable_is_that_of_the_template_for_good() -> None:
    tokenizer = make_tokenizer(
        "byte", LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    template = choose_template(tokenizer, None)
    assert template.options == {"date_string": "26 Jul 2024"}
    assert template.notes[-1] == (
        'the chat template writes a date into every prompt: "26 Jul 2024" in training, and in '
        "serving with the saved template"
    )
    text = template.render([Message("user", "hello")], add_generation_prompt=True)
    assert "Today Date: 26 Jul 2024\n" in text
    assert text == tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        chat_template=template.saved_source,
        tokenize=False,
        add_generation_prompt=True,
    )
    # An adapter from before has no such option, and keeps the day's date.
    assert choose_template(tokenizer, None, options={}).options == {}
