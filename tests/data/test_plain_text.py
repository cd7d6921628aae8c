"""Plain text rows: the whole text is trained, as `tokenizer(text)` reads it, up to a stop token."""

from pathlib import Path
from typing import Any

import pytest
from chat_families import CHATML, GEMMA, LLAMA3, make_tokenizer, talk
from tokenizers import processors

from myna.data.conversation import Conversation, Place
from myna.data.dataset import encode_dataset
from myna.data.encode import Encoder, RowRefused
from myna.data.formats import Rows
from myna.data.loader import num_targets
from myna.data.templates import choose_template
from myna.errors import DataError

TEXTS = ["The capital of France is Paris.", "你好，今天天气怎么样？\n\nfine", " a", "😀"]


def text(content: str, line: int = 1) -> Conversation:
    return Conversation((), Place(Path("rows.jsonl"), line, line), text=content)


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    options.setdefault("stop_ids", [tokenizer.eos_token_id])
    return Encoder(tokenizer, choose_template(tokenizer, None), **options)


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts its start token before plain text, as Llama's and Gemma's do."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("kind", ["byte", "piece"])
def test_ids_are_the_tokenizers_own_and_the_end(kind: str, content: str) -> None:
    template = LLAMA3 if kind == "byte" else GEMMA
    tokenizer = with_bos(make_tokenizer(kind, template, bos_token="<bos>", eos_token="<eos>"))
    (example,) = encoder(tokenizer).encode(text(content))
    ids = list(example.prompt_ids + example.completion_ids)
    assert ids == [*tokenizer(content)["input_ids"], tokenizer.eos_token_id]
    assert example.prompt_ids == (tokenizer.bos_token_id,)
    assert (example.prompt_text, example.completion_text) == ("<bos>", content + "<eos>")
    assert num_targets(example) == len(ids) - 1
    assert (example.turn, example.weight) == (0, 1.0)


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("kind", ["byte", "piece"])
def test_a_text_to_go_on_from_has_the_ids_that_are_trained(kind: str, content: str) -> None:
    template = LLAMA3 if kind == "byte" else GEMMA
    made = encoder(make_tokenizer(kind, template, bos_token="<bos>", eos_token="<eos>"))
    (example,) = made.encode(text(content))
    prompt = made.text_prompt(content)
    assert prompt.ids == (example.prompt_ids + example.completion_ids)[:-1]
    assert prompt.text == f"<bos>{content}"
    with pytest.raises(DataError, match='The text contains "<eos>" at character 3'):
        made.text_prompt("ab<eos>")


def test_an_empty_text_to_go_on_from_needs_a_start_token() -> None:
    made = encoder(make_tokenizer("byte", CHATML, eos_token="<|im_end|>"))
    with pytest.raises(DataError, match="The text is empty, and the tokenizer has no start token"):
        made.text_prompt("")


def test_without_start_token_the_first_token_is_not_predicted() -> None:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    made = encoder(tokenizer)
    (example,) = made.encode(text("hello there"))
    assert (example.prompt_ids, example.prompt_text) == ((), "")
    assert list(example.completion_ids) == [
        *tokenizer("hello there")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert num_targets(example) == len(example.completion_ids) - 1
    notes = encode_dataset(made, Rows((text("hello there"),), (), "hash")).notes
    assert (
        'plain texts are trained up to "<|im_end|>"; there is no start token, so nothing predicts '
        "their first token (1 answers)" in notes
    )


def test_an_end_that_generation_does_not_stop_on_is_not_taken() -> None:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|endoftext|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (example,) = encoder(tokenizer, stop_ids=[stop]).encode(text("hello"))
    assert example.completion_text == "hello<|im_end|>"


def test_start_and_end_are_said_and_no_system_text_is_put_before() -> None:
    tokenizer = make_tokenizer("byte", LLAMA3, bos_token="<bos>", eos_token="<|eot_id|>")
    made = encoder(tokenizer, system="Be brief.")
    rows = Rows((text("a"), text("b"), talk(("user", "q"), ("assistant", "a"))), (), "hash")
    dataset = encode_dataset(made, rows)
    said = 'plain texts are trained whole, from "<bos>" to "<|eot_id|>" (2 answers)'
    assert said in dataset.notes
    assert "2 rows are plain text and get no `system`" in dataset.notes
    assert [example.prompt_text for example in dataset.examples][:2] == ["<bos>", "<bos>"]
    assert dataset.accounting.trained == 3


def test_control_tokens_are_refused_or_read() -> None:
    tokenizer = make_tokenizer("byte", CHATML, bos_token="<bos>", eos_token="<eos>")
    rendered = "<bos><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<eos>"
    with pytest.raises(RowRefused) as refused:
        encoder(tokenizer).encode(text(rendered))
    assert str(refused.value) == (
        'rows.jsonl line 1: the text contains "<bos>" at character 1, which the tokenizer reads as '
        "a control token; expected plain text.\n"
        "  Remove or rewrite it, or set control_tokens: allow to have it read so."
    )
    (example,) = encoder(tokenizer, control_tokens="allow").encode(text(rendered))
    assert example.prompt_text + example.completion_text == rendered
    ids = example.prompt_ids + example.completion_ids
    assert list(ids) == tokenizer(rendered)["input_ids"]  # one start token, one end token


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt"])
def test_texts_that_are_too_long_are_dropped_and_counted(policy: str) -> None:
    tokenizer = make_tokenizer("byte", CHATML, bos_token="<bos>", eos_token="<|im_end|>")
    made = encoder(tokenizer, max_length=6, over_length=policy)
    rows = Rows((text("hello there, how are you? " * 4), text("hello", 2)), (), "hash")
    dataset = encode_dataset(made, rows)
    assert [example.place.line for example in dataset.examples] == [2]
    assert dict(dataset.accounting.refused) == {"over_length": 1}


def test_a_text_that_is_too_long_stops_the_run() -> None:
    tokenizer = make_tokenizer("byte", CHATML, bos_token="<bos>", eos_token="<|im_end|>")
    content = "hello there, how are you? " * 4
    length = len(tokenizer(content)["input_ids"]) + 2
    made = encoder(tokenizer, max_length=6)
    with pytest.raises(DataError) as error:
        encode_dataset(made, Rows((text(content),), (), "hash"))
    assert str(error.value).startswith(
        f"rows.jsonl line 1: {length} tokens of plain text, and max_length is 6; a text has no "
        f"prompt that could be shortened.\n  The longest has {length} tokens: set max_length to "
        f"{length}, or over_length to drop or truncate_prompt."
    )
    assert str(error.value).endswith("Training has not started.")
    exact = encoder(tokenizer, max_length=length)
    (example,) = exact.encode(text(content))
    assert len(example.prompt_ids + example.completion_ids) == length
