import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_families import (
    CHATML,
    DEEPSEEK,
    GEMMA,
    LLAMA3,
    MISTRAL,
    PLAIN,
    QWEN3,
    make_tokenizer,
    talk,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from myna.data.conversation import Conversation, Message
from myna.data.dataset import Accounting, Dataset, encode_dataset
from myna.data.encode import Encoder, RowRefused
from myna.data.formats import Rows, read_conversations
from myna.data.templates import choose_template
from myna.errors import ConfigError, DataError
from myna.models.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
HUANHUAN = Path(__file__).parents[2].parent / "shared" / "data" / "huanhuan.json"
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"

CHATML_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chatml": ("byte", CHATML, CHATML_TOKENS),
    "llama3": ("byte", LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "gemma": ("piece", GEMMA, {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}),
    "mistral": ("piece", MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "qwen3": ("byte", QWEN3, {**CHATML_TOKENS, "added": ["<think>", "</think>"]}),
    "deepseek": ("byte", DEEPSEEK, {"bos_token": "<s>", "eos_token": "</s>"}),
}
TURNS = (
    ("user", "What is the capital?"),
    ("assistant", "Paris, 巴黎。"),
    ("user", "  你是谁？\n"),
    ("assistant", "我是一只会说话的鸟。😀"),
    ("user", "and then"),
    ("assistant", "answers"),
)


def family(name: str) -> Any:
    kind, template, special = FAMILIES[name]
    return make_tokenizer(kind, template, **special)


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    options.setdefault("stop_ids", [tokenizer.eos_token_id])
    return Encoder(tokenizer, choose_template(tokenizer, None), **options)


def words(vocabulary: dict[str, int]) -> Any:
    """A tokenizer of whole words: <unk> is 0, </s> is 1."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **vocabulary}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def rows(*conversations: Conversation) -> Rows:
    return Rows(conversations, (), "hash")


def refusal(encoder: Encoder, conversation: Conversation) -> RowRefused:
    with pytest.raises(RowRefused) as error:
        encoder.encode(conversation)
    return error.value


def dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.as_template_input() for message in messages]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_what_a_server_sends(name: str, system: bool) -> None:
    """The ids of transformers' published function, before each answer of a conversation."""
    tokenizer = family(name)
    if name == "gemma" and system:
        pytest.skip("the template refuses the system role: tested below")
    head = (("system", "Be brief."),) if system else ()
    conversation = talk(*head, *TURNS)
    thinking = {"enable_thinking": False} if name == "qwen3" else {}
    examples = encoder(tokenizer).encode(conversation)
    assert [example.turn for example in examples] == [1, 2, 3]
    for number, example in enumerate(examples):
        before = conversation.messages[: len(head) + 2 * number + 1]
        published = tokenizer.apply_chat_template(
            dicts(before), add_generation_prompt=True, tokenize=True, **thinking
        )
        assert list(example.prompt_ids) == published["input_ids"]
        assert encoder(tokenizer).prompt(before).ids == example.prompt_ids
        assert encoder(tokenizer).prompt(before).text == example.prompt_text


@pytest.mark.parametrize("name", FAMILIES)
def test_completions_are_the_answer_and_one_stop_token(name: str) -> None:
    tokenizer = family(name)
    lead = {"mistral": " ", "deepseek": "\n</think>\n\n"}.get(name, "")
    for example, (_, answer) in zip(
        encoder(tokenizer).encode(talk(*TURNS)), TURNS[1::2], strict=True
    ):
        assert example.completion_text == f"{lead}{answer}{tokenizer.eos_token}"
        assert example.completion_ids.count(tokenizer.eos_token_id) == 1
        assert example.completion_ids[-1] == tokenizer.eos_token_id
        whole = tokenizer(example.prompt_text + example.completion_text, add_special_tokens=False)
        joined = list(example.prompt_ids + example.completion_ids)
        assert tokenizer.decode(joined) == tokenizer.decode(whole["input_ids"])
        if tuple(whole["input_ids"][: len(example.prompt_ids)]) == example.prompt_ids:
            assert joined == whole["input_ids"]


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "deepseek"])
def test_one_bos_at_the_start(name: str) -> None:
    tokenizer = family(name)
    for example in encoder(tokenizer, system="Be brief.").encode(talk(*TURNS)):
        ids = example.prompt_ids + example.completion_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_bos_that_only_plain_text_gets_is_not_added_and_said() -> None:
    tokenizer = make_tokenizer("byte", CHATML, bos_token="<s>", **CHATML_TOKENS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    made = encoder(tokenizer)
    assert tokenizer.bos_token_id not in made.prompt([Message("user", "a")]).ids
    assert made.notes[-1] == (
        'the chat template writes no "<s>"; servers add none to a rendered chat, so training and '
        "chat go without"
    )


def test_a_template_with_two_bos_is_refused() -> None:
    tokenizer = make_tokenizer(
        "byte", "{{ bos_token }}" + LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    with pytest.raises(ConfigError) as error:
        encoder(tokenizer)
    assert str(error.value).startswith(
        'The chat template (the tokenizer\'s own) writes "<|begin_of_text|>" twice at the start: '
    )


def test_system_text_of_the_settings_and_of_the_row() -> None:
    made = encoder(family("chatml"), system="Be brief.")
    (example,) = made.encode(talk(*TURNS[:2]))
    assert example.prompt_text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    (own,) = made.encode(talk(("system", "Be long."), *TURNS[:2]))
    assert own.prompt_text.startswith("<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user")
    assert made.prompt([Message("user", TURNS[0][1])]).ids == example.prompt_ids
    dataset = encode_dataset(made, rows(talk(("system", "s"), *TURNS[:2]), talk(*TURNS[:2])))
    assert (
        "1 rows have a system message of their own and keep it in place of `system`"
        in dataset.notes
    )


def test_system_text_of_a_model_without_system_role() -> None:
    """The prompt equals what a server gets when the client puts the text into the question."""
    tokenizer = family("gemma")
    (example,) = encoder(tokenizer, system="Be brief.").encode(talk(*TURNS[:2]))
    published = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"Be brief.\n\n{TURNS[0][1]}"}], add_generation_prompt=True
    )
    assert list(example.prompt_ids) == published["input_ids"]


def test_untrained_answers_are_context() -> None:
    first = Message("assistant", "Paris.", trained=False)
    examples = encoder(family("chatml")).encode(talk(TURNS[0], first, *TURNS[2:4]))
    assert [example.turn for example in examples] == [2]
    assert "Paris." in examples[0].prompt_text
    error = refusal(encoder(family("chatml")), talk(TURNS[0], first))
    assert str(error) == (
        "rows.jsonl line 1: the row has no answer that is trained.\n"
        "  Add an answer or delete the row."
    )


def test_only_the_last_answer_is_trained_where_that_is_set() -> None:
    made = encoder(family("chatml"), train_on="last")
    (example,) = made.encode(talk(*TURNS))
    assert (example.turn, example.completion_text) == (3, "answers<|im_end|>")
    (whole, *_) = reversed(encoder(family("chatml")).encode(talk(*TURNS)))
    assert example == whole
    assert "train_on is last: earlier answers of a conversation are context" in made.notes
    last = Message("assistant", "no", trained=False)
    assert refusal(made, talk(*TURNS[:2], TURNS[2], last)).reason == "nothing_trained"


def test_the_weight_of_an_answer_is_its_examples() -> None:
    heavy = Message("assistant", "Paris.", weight=2.5)
    first, second = encoder(family("chatml")).encode(talk(TURNS[0], heavy, *TURNS[2:4]))
    assert (first.weight, second.weight) == (2.5, 1.0)
    assert first.completion_text == "Paris.<|im_end|>"


# Stop tokens


def test_pad_equal_to_eos_hides_no_stop_token() -> None:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    (example,) = encoder(tokenizer).encode(talk(*TURNS[:2]))
    assert example.completion_ids[-1] == tokenizer.pad_token_id


def test_the_templates_stop_token_joins_the_models() -> None:
    """Qwen's base models name <|endoftext|>, and their template ends a turn with <|im_end|>."""
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|endoftext|>")
    end, stop = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    made = encoder(tokenizer, stop_ids=[end])
    assert made.stop_ids == (end, stop)
    assert made.notes[-1] == (
        f'the model does not name "<|im_end|>" ({stop}), which ends an answer in the chat '
        f"template, "
        "among its stop tokens; it is added, in chat and in the saved adapter"
    )
    (example,) = made.encode(talk(*TURNS[:2]))
    assert example.completion_text == "Paris, 巴黎。<|im_end|>"


def test_a_template_without_stop_token_gets_the_tokenizers_aloud() -> None:
    tokenizer = make_tokenizer("byte", PLAIN, eos_token="<|endoftext|>")
    made = encoder(tokenizer)
    (example,) = made.encode(talk(("user", "你是谁？"), ("assistant", "鸟")))
    assert (example.prompt_text, example.completion_text) == ("问：你是谁？答：", "鸟<|endoftext|>")
    dataset = encode_dataset(made, rows(talk(("user", "你是谁？"), ("assistant", "鸟"))))
    assert (
        'the chat template ends an answer with no stop token; "<|endoftext|>" was appended '
        "(1 answers)" in dataset.notes
    )


def test_nothing_that_stops_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        encoder(make_tokenizer("byte", PLAIN), stop_ids=[])
    assert str(error.value).startswith(
        "Neither the chat template (the tokenizer's own) nor the tokenizer has a token that ends "
        "an "
        "answer: a model trained so would never stop.\n"
    )


def test_text_behind_the_stop_token_is_not_trained() -> None:
    (example,) = encoder(family("chatml")).encode(talk(*TURNS[:2]))
    assert example.completion_text.endswith("<|im_end|>")  # the template writes a newline after it


def test_an_answer_with_a_stop_token_is_refused_even_where_control_tokens_are_allowed() -> None:
    made = encoder(family("chatml"), control_tokens="allow")
    error = refusal(made, talk(("user", "q"), ("assistant", "one<|im_end|>two")))
    assert error.reason == "stop_in_answer"
    assert str(error) == (
        'rows.jsonl line 1: the answer contains the stop token "<|im_end|>", where it would be cut.'
        "\n  Remove it from the text."
    )


# Prompts that are no prefix, and thinking


def test_reasoning_is_trained_with_thinking_on_and_other_rows_with_it_off() -> None:
    tokenizer = family("qwen3")
    made = encoder(tokenizer)
    thinker = talk(("user", "q"), Message("assistant", "a", reasoning="because"))
    (example,) = made.encode(thinker)
    assert example.prompt_text.endswith("<|im_start|>assistant\n")
    assert example.completion_text == "<think>\nbecause\n</think>\n\na<|im_end|>"
    (plain,) = made.encode(talk(("user", "q"), ("assistant", "a")))
    assert plain.prompt_text.endswith("<think>\n\n</think>\n\n")
    assert plain.completion_text == "a<|im_end|>"
    off = encode_dataset(made, rows(talk(("user", "q"), ("assistant", "a"))))
    assert off.template.options == {"enable_thinking": False}
    assert "no row has reasoning: trained with thinking off, and served so" in off.notes
    mixed = encode_dataset(made, rows(thinker, talk(("user", "q"), ("assistant", "a"))))
    assert mixed.template.options == {"enable_thinking": True}


def test_reasoning_joins_where_the_generation_prompt_opens_think() -> None:
    made = encoder(family("deepseek"))
    (example,) = made.encode(talk(("user", "q"), Message("assistant", "a", reasoning="because")))
    assert example.prompt_text == "<s><|User|>q<|Assistant|><think>\n"
    assert example.completion_text == "because\n</think>\n\na</s>"
    dataset = encode_dataset(made, rows(talk(("user", "q"), ("assistant", " a\n"))))
    assert dataset.examples[0].completion_text == "\n</think>\n\n a\n</s>"
    assert (
        "the generation prompt opens <think>; answers without reasoning close it at once "
        "(1 answers)" in dataset.notes
    )


def test_reasoning_that_the_template_drops_is_refused() -> None:
    error = refusal(
        encoder(family("chatml")), talk(("user", "q"), Message("assistant", "a", reasoning="why"))
    )
    assert str(error) == (
        "rows.jsonl line 1: the chat template leaves out or changes the reasoning.\n"
        '  It is "why"; the template makes of it "a<|im_end|>\\n"'
    )


def test_a_closed_think_block_that_history_lacks_is_taken_from_the_prompt() -> None:
    source = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n</think>' }}{% endif")
    made = encoder(make_tokenizer("byte", source, **CHATML_TOKENS))
    (example,) = made.encode(talk(("user", "q"), ("assistant", "a")))
    assert example.prompt_text.endswith("assistant\n</think>")
    assert example.completion_text == "a<|im_end|>"
    error = refusal(made, talk(("user", "q"), Message("assistant", "a", reasoning="why")))
    assert error.reason == "reasoning_dropped"


def test_a_prompt_that_is_no_prefix_is_refused_with_both_texts() -> None:
    source = CHATML.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ 'Go: ' }}"
    )
    error = refusal(
        encoder(make_tokenizer("byte", source, **CHATML_TOKENS)),
        talk(("user", "q"), ("assistant", "a")),
    )
    assert str(error) == (
        "rows.jsonl line 1: the chat template writes the conversation so far differently once the "
        "answer is there, so prompt and answer cannot be told apart.\n"
        '  Prompt: "<|im_start|>user\\nq<|im_end|>\\nGo: <|im_start|>assistant\\n"\n'
        '  Whole: "<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\na<|im_end|>\\n"'
    )


def test_a_template_that_refuses_a_row_is_quoted() -> None:
    source = CHATML.replace(
        "{{ '<|im_start|>' +",
        "{% if message['content'] == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
        "{{ '<|im_start|>' +",
        1,
    )
    error = refusal(
        encoder(make_tokenizer("byte", source, **CHATML_TOKENS)),
        talk(("user", "bad"), ("assistant", "a")),
    )
    assert str(error) == (
        "rows.jsonl line 1: the chat template does not accept the messages: no bad"
    )


def test_a_system_text_that_moves_with_the_last_question() -> None:
    """Mistral's template writes it into the last question only: gone once the answer is there."""
    tokenizer = family("mistral")
    examples = encoder(tokenizer, system="Be brief.").encode(talk(*TURNS[:2], *TURNS[4:]))
    assert [(example.prompt_text, example.completion_text) for example in examples] == [
        ("<s>[INST] Be brief.\n\nWhat is the capital?[/INST]", " Paris, 巴黎。</s>"),
        (
            "<s>[INST] What is the capital?[/INST] Paris, 巴黎。</s>"
            "[INST] Be brief.\n\nand then[/INST]",
            " answers</s>",
        ),
    ]


def test_texts_and_tools_that_the_template_drops_are_refused() -> None:
    made = encoder(family("chatml"))
    error = refusal(made, talk(*TURNS[:2], tools=({"name": "search"},)))
    assert str(error) == (
        "rows.jsonl line 1: the row has tools and the chat template knows none.\n"
        "  Remove the tools, or set `template: FILE` to one that writes them."
    )
    source = CHATML.replace("+ message['content']", "+ message['content'][:40]")
    question = "hello there, how are you? " * 2
    error = refusal(
        encoder(make_tokenizer("byte", source, **CHATML_TOKENS)),
        talk(("user", question), ("assistant", "a")),
    )
    assert str(error) == (
        "rows.jsonl line 1: the chat template leaves out or changes the user text.\n"
        f'  It is "{question}"; the prompt is "<|im_start|>user\\n{question[:40]}<|im_end|>\\n'
        '<|im_start|>assistant\\n"'
    )


def test_templates_that_cannot_answer() -> None:
    head = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}"
    tail = "{% endif %}{% endfor %}"
    for body, expected in (
        ("{{ raise_exception('mute') }}", "cannot render an answer: mute"),
        ("<|im_end|>", "leaves out the text of an answer; it renders "),
    ):
        with pytest.raises(ConfigError) as error:
            encoder(make_tokenizer("byte", head + body + tail, **CHATML_TOKENS))
        assert str(error.value).startswith(f"The chat template (the tokenizer's own) {expected}")
        assert str(error.value).endswith("Mend the template, or set `template: FILE` to another.")


# Tokens across the border of prompt and completion


def test_a_token_across_the_border_is_cut_at_the_prompt() -> None:
    """Byte-level: the prompt ends in a newline, the answer begins with two, a pair is one id."""
    tokenizer = family("chatml")
    made = encoder(tokenizer)
    (example,) = made.encode(talk(("user", "q"), ("assistant", "\n\nfine")))
    whole = tokenizer(example.prompt_text + example.completion_text, add_special_tokens=False)
    size = len(example.prompt_ids)
    assert tuple(whole["input_ids"][:size]) != example.prompt_ids
    assert example.prompt_ids == made.prompt([Message("user", "q")]).ids
    alone = tokenizer("\n\nfine<|im_end|>", add_special_tokens=False)["input_ids"]
    assert list(example.completion_ids) == alone


def test_a_completion_encoded_alone_gets_no_dummy_prefix_space() -> None:
    """Sentencepiece: 答：好 has the piece ：好, and 好 alone would be encoded as ▁好."""
    tokenizer = make_tokenizer("piece", PLAIN, eos_token="</s>", unk_token="<unk>")
    made = encoder(tokenizer)
    (example,) = made.encode(talk(("user", "什么"), ("assistant", "好的。")))
    whole = tokenizer("问：什么答：好的。</s>", add_special_tokens=False)["input_ids"]
    size = len(example.prompt_ids)
    assert tuple(whole[:size]) != example.prompt_ids, "the test needs a token across the border"
    pieces = tokenizer.convert_ids_to_tokens(list(example.completion_ids))
    assert "".join(pieces) == "好的。</s>"
    joined = list(example.prompt_ids + example.completion_ids)
    assert tokenizer.decode(joined) == tokenizer.decode(whole) == "问：什么答：好的。</s>"


def test_a_border_that_cannot_be_kept_is_refused() -> None:
    """Whole words only: x and y apart are other text than xy."""
    tokenizer = words({"x": 2, "y": 3, "xy": 4})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' ' if m['role'] == 'user' else 'x' }}{{ m['content'] }}"
        "{{ '</s>' if m['role'] == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}x{% endif %}"
    )
    error = refusal(encoder(tokenizer), talk(("user", "y "), ("assistant", "y")))
    assert str(error) == (
        "rows.jsonl line 1: prompt and answer cannot be tokenized apart without changing the text."
        '\n  The prompt ends in " y x", the answer is "y</s>"'
    )


def test_a_stop_token_that_the_tokenizer_does_not_read_is_refused() -> None:
    tokenizer = words({"x": 2})
    tokenizer.add_tokens([AddedToken("END", single_word=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ ' ' + m['content'] + 'END' }}{% endfor %}"
    stop = tokenizer.convert_tokens_to_ids("END")
    error = refusal(encoder(tokenizer, stop_ids=[stop, 1]), talk(("user", "q"), ("assistant", "x")))
    assert error.reason == "no_stop"
    assert str(error) == (
        "rows.jsonl line 1: the answer ends in ['<unk>'] (ids [0]), which is none of the stop ids "
        f"[1, {stop}].\n  The model would not learn to stop; the tokenizer and its template do not "
        "fit."
    )


# Control tokens


@pytest.mark.parametrize(
    ("conversation", "where"),
    [
        (talk(("user", "a<|im_end|>b"), ("assistant", "c")), "the user text of turn 1"),
        (talk(*TURNS[:3], ("assistant", "a<|im_end|>b")), "the assistant text of turn 2"),
        (
            talk(("system", "a<|im_end|>b"), ("user", "q"), ("assistant", "c")),
            "the system text",
        ),
    ],
)
def test_control_tokens_in_texts_are_refused_with_their_place(
    conversation: Conversation, where: str
) -> None:
    error = refusal(encoder(family("chatml")), conversation)
    assert error.reason == "control_token"
    assert str(error) == (
        f'rows.jsonl line 1: {where} contains "<|im_end|>" at character 2, which the tokenizer '
        f"reads "
        "as a control token; expected plain text.\n"
        "  Remove or rewrite it, or set control_tokens: allow to have it read so."
    )


def test_control_tokens_in_tools_reasoning_and_prompts() -> None:
    made = encoder(family("qwen3"))
    tools = ({"name": "x", "description": "<|im_start|>"},)
    error = refusal(made, talk(("user", "q"), ("assistant", "a"), tools=tools))
    assert str(error).startswith('rows.jsonl line 1: the tools contains "<|im_start|>"')
    # Not marked special by the tokenizer, but written by the template.
    error = refusal(made, talk(("user", "q"), Message("assistant", "a", reasoning="x</think>")))
    assert str(error).startswith('rows.jsonl line 1: the reasoning of turn 1 contains "</think>"')
    with pytest.raises(DataError) as chat:
        made.prompt([Message("user", "<|im_end|>")])
    assert str(chat.value).startswith(
        'The user text of turn 1 contains "<|im_end|>" at character 1'
    )


def test_control_tokens_in_the_persona() -> None:
    with pytest.raises(ConfigError) as error:
        encoder(family("chatml"), system="x<|im_start|>")
    assert str(error.value) == (
        'system contains "<|im_start|>", which the tokenizer reads as a control token; expected '
        "plain text.\n  Remove it: the chat template writes control tokens itself."
    )


def test_allowed_control_tokens_are_read_as_a_server_reads_them() -> None:
    tokenizer = family("chatml")
    question = [Message("user", "a<|im_start|>b")]
    prompt = encoder(tokenizer, control_tokens="allow").prompt(question)
    published = tokenizer.apply_chat_template(dicts(question), add_generation_prompt=True)
    assert list(prompt.ids) == published["input_ids"]


def test_plain_added_tokens_that_the_template_does_not_write_are_words() -> None:
    tokenizer = make_tokenizer("byte", CHATML, added=["<table>", "\n"], **CHATML_TOKENS)
    assert encoder(tokenizer).encode(talk(("user", "a <table>\n"), ("assistant", "b")))


# Length


def long_talk() -> Conversation:
    return talk(*[turn for _ in range(4) for turn in TURNS[:2]], line=7)


def lengths(dataset: Dataset) -> list[int]:
    return [len(example.prompt_ids) + len(example.completion_ids) for example in dataset.examples]


def test_over_length_rows_stop_everything_by_default() -> None:
    short, long = talk(*TURNS[:2], line=3), long_talk()
    all_lengths = lengths(encode_dataset(encoder(family("chatml")), rows(short, long)))
    limit = max(all_lengths[:1])
    with pytest.raises(DataError) as error:
        encode_dataset(encoder(family("chatml"), max_length=limit), rows(short, long, long))
    message = str(error.value)
    assert message.startswith("rows.jsonl line 7: ")
    assert f", and max_length is {limit}.\n  The longest has " in message
    assert "2 rows have this fault: lines 7, 7. Training has not started." in message
    # At the limit is not over it.
    encode_dataset(encoder(family("chatml"), max_length=max(all_lengths)), rows(short, long))


def test_dropped_rows_are_counted() -> None:
    short = talk(*TURNS[:2])
    limit = lengths(encode_dataset(encoder(family("chatml")), rows(short)))[0]
    made = encoder(family("chatml"), max_length=limit, over_length="drop")
    dataset = encode_dataset(made, rows(short, long_talk(), short))
    accounting = dataset.accounting
    assert (accounting.rows_in, accounting.trained) == (3, 2)
    assert accounting.refused == {"over_length": 1} and accounting.truncated == {}
    assert accounting.tokens == 2 * limit
    with pytest.raises(DataError, match=r"No row is left to train on: all 1 are longer than max_"):
        encode_dataset(made, rows(long_talk()))


def test_truncating_drops_the_oldest_turns_first() -> None:
    """Whole turns go, the system text and the last question stay, and the template is applied."""
    conversation = talk(("system", "Be brief."), *long_talk().messages)
    tokenizer = family("chatml")
    two_turns = talk(("system", "Be brief."), *long_talk().messages[-4:])
    expected = encoder(tokenizer).encode(two_turns)[-1]
    limit = len(expected.prompt_ids) + len(expected.completion_ids)
    examples = encoder(tokenizer, max_length=limit, over_length="truncate_prompt").encode(
        conversation
    )
    assert [example.truncated for example in examples] == [None, None] + ["turns_dropped"] * 2
    assert examples[-1].prompt_ids == expected.prompt_ids
    assert examples[-1].completion_ids == expected.completion_ids
    dataset = encode_dataset(
        encoder(tokenizer, max_length=limit, over_length="truncate_prompt"),
        rows(conversation, talk(*TURNS[:2])),
    )
    assert dataset.accounting.truncated == {"turns_dropped": 1}
    assert dataset.accounting.trained == 1


def test_truncating_then_shortens_the_question_in_its_middle() -> None:
    question = "begin " + "hello there " * 60 + "end"
    tokenizer = family("chatml")
    whole = encoder(tokenizer).encode(talk(("user", question), ("assistant", "fine")))[0]
    limit = len(whole.prompt_ids) // 2
    made = encoder(tokenizer, max_length=limit, over_length="truncate_prompt")
    (example,) = made.encode(talk(*TURNS[:2], ("user", question), ("assistant", "fine")))[1:]
    length = len(example.prompt_ids) + len(example.completion_ids)
    assert limit - 8 <= length <= limit, "as much is kept as fits"
    text = example.prompt_text.removeprefix("<|im_start|>user\n")
    assert text.startswith("begin hello") and " … " in text
    assert text.endswith("end<|im_end|>\n<|im_start|>assistant\n")
    assert example.truncated == "text_shortened"
    assert example.completion_ids == whole.completion_ids


def test_an_answer_that_does_not_fit_is_never_cut() -> None:
    made = encoder(family("chatml"), max_length=60, over_length="truncate_prompt")
    long_answer = talk(("user", "hello there " * 20), ("assistant", "fine, thank you. " * 40))
    assert refusal(made, long_answer).reason == "over_length"
    dataset = encode_dataset(made, rows(long_answer, talk(*TURNS[:2])))
    assert dataset.accounting.refused == {"over_length": 1}


# Data sets


def test_accounting_adds_up_and_counts_by_hand() -> None:
    tokenizer = family("chatml")
    dataset = encode_dataset(encoder(tokenizer), rows(talk(*TURNS), talk(*TURNS[:2])))
    accounting = dataset.accounting
    assert (accounting.rows_in, accounting.trained) == (2, 2)
    assert len(dataset.examples) == 4
    assert accounting.trained_tokens == sum(
        len(tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"])
        for text in ("Paris, 巴黎。", "我是一只会说话的鸟。😀", "answers", "Paris, 巴黎。")
    )
    assert "1 of 4 examples repeat another exactly, and are kept" in dataset.notes
    with pytest.raises(AssertionError, match="3 rows came in and 2 are accounted for"):
        Accounting(3, 1, {"over_length": 1}, {}, 10, 5)


def test_all_refused_rows_are_listed_at_once() -> None:
    bad = [talk(("user", "<|im_end|>"), ("assistant", "a"), line=line) for line in (2, 5)]
    worse = talk(("user", "q"), Message("assistant", "a", reasoning="why"), line=9)
    with pytest.raises(DataError) as error:
        encode_dataset(encoder(family("chatml")), rows(*bad, talk(*TURNS[:2]), worse))
    message = str(error.value)
    assert "2 rows have this fault: lines 2, 5." in message
    assert "rows.jsonl line 9: the chat template leaves out or changes the reasoning." in message
    assert message.endswith("Training has not started.")


def test_a_refused_row_does_not_shift_its_neighbours() -> None:
    """Texts of a batch are tokenized together: a refusal in the middle must not move the others."""
    made = encoder(family("chatml"), max_length=40, over_length="drop")
    long = talk(("user", "hello there " * 60), ("assistant", "a"), *TURNS[2:4])
    dataset = encode_dataset(made, rows(talk(*TURNS[:2]), long, talk(*TURNS[2:4])))
    alone = [made.encode(talk(*turns))[0] for turns in (TURNS[:2], TURNS[2:4])]
    assert [example.prompt_ids for example in dataset.examples] == [
        example.prompt_ids for example in alone
    ]
    assert [example.completion_ids for example in dataset.examples] == [
        example.completion_ids for example in alone
    ]


def test_characters_without_a_token_are_said() -> None:
    tokenizer = words({"yes": 2})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    dataset = encode_dataset(
        encoder(tokenizer), rows(talk(("user", "yes"), ("assistant", "yes 嬛")))
    )
    assert '1 answers have characters the tokenizer lacks; "<unk>" is trained' in dataset.notes


# BlueLM


@pytest.fixture(scope="module")
def bluelm() -> Any:
    return load_tokenizer(str(GOLDEN)).tokenizer


def test_bluelm_ids_equal_the_golden_strings(bluelm: Any) -> None:
    """Every golden string that is a prompt gets the ids of the original class."""
    strings = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["strings"]
    template = choose_template(bluelm, "BlueLM")
    made = Encoder(bluelm, template, stop_ids=[bluelm.eos_token_id])
    single = [
        string
        for string in strings
        if string["text"].startswith("[|Human|]:")
        and string["text"].endswith("[|AI|]:")
        and string["text"].count("|]:") == 2
        and "</s>" not in string["text"]
        and "<s>" not in string["text"]
    ]
    assert single
    for string in single:
        question = string["text"].removeprefix("[|Human|]:").removesuffix("[|AI|]:")
        assert list(made.prompt([Message("user", question)]).ids) == string["ids"]
    for string in strings:
        ids = made._ids([string["text"]])[0]
        assert ids == string["ids_no_special"], string["name"]


def test_bluelm_rows_equal_the_tutorials(bluelm: Any) -> None:
    """The tutorial's own twelve records: ids, and labels but for the unmasked BOS (defect 1)."""
    examples = json.loads((GOLDEN / "tutorial_sft.json").read_text(encoding="utf-8"))["examples"]
    made = Encoder(
        bluelm, choose_template(bluelm, "BlueLM"), stop_ids=[bluelm.eos_token_id], system=PERSONA
    )
    assert len(examples) == 12
    for golden in examples:
        question = (
            golden["prompt"].removeprefix(f"[|Human|]:{PERSONA}\n\n ").removesuffix("[|AI|]:")
        )
        (example,) = made.encode(talk(("user", question), ("assistant", golden["answer"])))
        assert list(example.prompt_ids + example.completion_ids) == golden["input_ids"]
        labels = [-100] * len(example.prompt_ids) + list(example.completion_ids)
        assert labels[1:] == golden["labels"][1:] and golden["labels"][0] == bluelm.bos_token_id


def test_bluelm_role_markers_in_a_question_are_refused(bluelm: Any) -> None:
    made = Encoder(bluelm, choose_template(bluelm, "BlueLM"), stop_ids=[bluelm.eos_token_id])
    with pytest.raises(DataError) as error:
        made.prompt([Message("user", "你好[|AI|]:好")])
    assert str(error.value).startswith(
        'The user text of turn 1 contains "[|AI|]:" at character 3, which the tokenizer reads as a '
        "control token; expected plain text."
    )


def test_the_reference_job_encodes_to_the_counts_of_the_original(bluelm: Any) -> None:
    if not HUANHUAN.exists():
        pytest.skip("huanhuan.json is not beside the repository")
    golden = json.loads((GOLDEN / "tutorial_sft.json").read_text(encoding="utf-8"))
    made = Encoder(
        bluelm,
        choose_template(bluelm, "BlueLM"),
        stop_ids=[bluelm.eos_token_id],
        system=PERSONA,
        max_length=384,
    )
    dataset = encode_dataset(made, read_conversations([HUANHUAN]))
    assert dataset.accounting.rows_in == dataset.accounting.trained == 3729
    assert dataset.accounting.tokens == golden["total_tokens_this_tokenizer"]
    assert max(lengths(dataset)) == golden["longest_this_tokenizer"]


def test_refused_rows_are_skipped_and_accounted_for_where_that_is_asked_for() -> None:
    bad = [talk(("user", "<|im_end|>"), ("assistant", "a"), line=line) for line in (2, 5)]
    long = talk(("user", "hello there " * 60), ("assistant", "a"), line=7)
    read = replace(rows(*bad, talk(*TURNS[:2]), long), refused={"json": 3, "control_token": 1})
    for over_length, reason in (("drop", "over_length"), ("error", "over_length")):
        made = encoder(family("chatml"), max_length=60, over_length=over_length)
        accounting = encode_dataset(made, read, "skip").accounting
        assert (accounting.rows_in, accounting.trained) == (8, 1)
        assert accounting.refused == {"json": 3, "control_token": 3, reason: 1}
    notes = encode_dataset(encoder(family("chatml")), read, "skip").notes
    assert any(
        note.startswith(
            "2 bad rows skipped (control_token), the first: rows.jsonl line 2: the user"
        )
        for note in notes
    )
    with pytest.raises(DataError) as error:
        encode_dataset(encoder(family("chatml")), rows(*bad), "skip")
    assert str(error.value) == (
        "No row is left to train on: all were refused (control_token 2).\n"
        "  With on_bad_row: stop they are listed. Training has not started."
    )
