"""The faults that people met in other tools, by name: trained right, or said before step 1.

Every one of them has a loss that looks healthy and a model that never stops, or learnt nothing.
"""

from typing import Any

import pytest
from chat_families import CHATML, GEMMA, LLAMA3, make_tokenizer, talk
from template_families import FAMILIES, family_tokenizer
from tokenizers import processors

from myna.data.conversation import Conversation, Message
from myna.data.dataset import encode_dataset
from myna.data.encode import Encoder, RowRefused
from myna.data.formats import Rows
from myna.data.loader import padded_batches
from myna.data.packing import pack_step
from myna.data.templates import choose_template
from myna.errors import ConfigError, DataError

IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
HELLO = talk(("user", "hello"), ("assistant", "Paris."))


def made(tokenizer: Any) -> Encoder:
    template = choose_template(tokenizer, None)
    return Encoder(tokenizer, template, stop_ids=[tokenizer.eos_token_id])


def rows(*conversations: Conversation) -> Rows:
    return Rows(conversations, (), "hash")


def test_an_end_of_turn_that_differs_from_eos_is_trained_and_stops() -> None:
    """Gemma: eos is <eos>, and a turn ends in <end_of_turn>."""
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = make_tokenizer("piece", GEMMA, **special)
    eos, end = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    encoder = Encoder(tokenizer, choose_template(tokenizer, None), stop_ids=[eos])
    (example,) = encoder.encode(HELLO)
    assert example.completion_ids[-1] == end
    assert encoder.stop_ids == (eos, end), "what is saved with the adapter, and generation stops on"
    assert encoder.notes[-1] == (
        f'the model does not name "<end_of_turn>" ({end}), which ends an answer in the chat '
        "template, among its stop tokens; it is added, in chat and in the saved adapter"
    )


def test_a_template_without_stop_token_gets_the_tokenizers_aloud() -> None:
    tokenizer = family_tokenizer("minicpm")
    assert "eos_token" not in (FAMILIES["minicpm"].template or "")
    encoder = made(tokenizer)
    dataset = encode_dataset(encoder, rows(HELLO))
    assert dataset.examples[0].completion_text == "Paris.</s>"
    assert dataset.examples[0].completion_ids[-1] == tokenizer.eos_token_id
    assert (
        'the chat template ends an answer with no stop token; "</s>" was appended (1 answers)'
        in dataset.notes
    )


def test_neither_template_nor_tokenizer_has_a_stop_token() -> None:
    tokenizer = make_tokenizer("byte", "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    with pytest.raises(ConfigError) as error:
        Encoder(tokenizer, choose_template(tokenizer, None), stop_ids=[])
    assert str(error.value) == (
        "Neither the chat template (the tokenizer's own) nor the tokenizer has a token that ends "
        "an answer: a model trained so would never stop.\n"
        "  Set `template: FILE` to one that writes a stop token, or use a tokenizer with an eos "
        "token."
    )


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>"])
def test_pad_equal_to_eos_hides_no_stop_token(pad: str) -> None:
    """The label of the stop token is there in packs and in padded batches, whatever pads."""
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>", pad_token=pad)
    encoder = made(tokenizer)
    longer = talk(("user", "a"), ("assistant", "b " * 30))
    examples = [*encoder.encode(HELLO), *encoder.encode(longer)]
    (pack,) = pack_step(examples, [0, 1], token_budget=None)
    (batch,) = padded_batches(examples, [0, 1], micro_batch_size=2, pad_id=tokenizer.pad_token_id)
    for targets in (pack.targets.tolist(), batch.targets.tolist()):
        assert targets.count(tokenizer.eos_token_id) == 2
        assert len(targets) == sum(len(example.completion_ids) for example in examples)


def test_a_max_length_that_would_cut_answers_stops_everything() -> None:
    tokenizer = make_tokenizer("byte", CHATML, **IM)
    template = choose_template(tokenizer, None)
    long = talk(("user", "hello"), ("assistant", "fine, thank you. " * 40), line=7)
    encoder = Encoder(
        tokenizer, template, stop_ids=[tokenizer.eos_token_id], max_length=40, over_length="error"
    )
    with pytest.raises(DataError) as error:
        encode_dataset(encoder, rows(HELLO, long))
    assert str(error.value).startswith("rows.jsonl line 7: ")
    assert "max_length is 40" in str(error.value)
    assert str(error.value).endswith("Training has not started.")


def test_an_answer_is_never_cut_whatever_the_policy() -> None:
    tokenizer = make_tokenizer("byte", CHATML, **IM)
    template = choose_template(tokenizer, None)
    asked = talk(("user", "hello there, how are you? " * 30), ("assistant", "fine, thank you."))
    long = talk(("user", "hello"), ("assistant", "fine, thank you. " * 40))
    encoder = Encoder(
        tokenizer,
        template,
        stop_ids=[tokenizer.eos_token_id],
        max_length=80,
        over_length="truncate_prompt",
    )
    dataset = encode_dataset(encoder, rows(asked, long))
    (example,) = dataset.examples
    assert example.completion_text == "fine, thank you.<|im_end|>"
    assert example.completion_ids[-1] == tokenizer.eos_token_id
    assert dataset.accounting.refused == {"over_length": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_marker_that_cannot_be_found_is_not_looked_for(name: str) -> None:
    """Stock templates without `{% generation %}` give other tools a mask of nothing but zeros."""
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    assert "generation %}" not in (family.template or "")
    encoder = Encoder(
        tokenizer,
        choose_template(tokenizer, family.model_type),
        stop_ids=[tokenizer.eos_token_id],
    )
    (example,) = encoder.encode(HELLO)
    trained = tokenizer.decode(list(example.completion_ids))
    assert "Paris." in trained and "hello" not in trained
    assert example.completion_ids[-1] in encoder.stop_ids


def test_a_template_that_alters_the_answer_is_said_with_both_texts() -> None:
    """The tool that searches for the answer finds it nowhere, and trains nothing, or everything."""
    source = CHATML.replace("message['content']", "(message['content'] | replace('.', '!'))")
    tokenizer = make_tokenizer("byte", source, **IM)
    encoder = made(tokenizer)
    with pytest.raises(RowRefused) as error:
        encoder.encode(HELLO)
    assert error.value.reason == "answer_dropped"
    assert str(error.value) == (
        "rows.jsonl line 1: the chat template leaves out or changes the answer.\n"
        '  It is "Paris."; the template makes of it "Paris!<|im_end|>\\n"'
    )


def test_a_template_that_drops_answers_is_refused_before_any_row() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = make_tokenizer("byte", source, **IM)
    with pytest.raises(ConfigError) as error:
        Encoder(tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id])
    assert str(error.value) == (
        "The chat template (the tokenizer's own) leaves out the text of an answer; it renders "
        '"myna probe of the question<|im_end|>"\n'
        "  Mend the template, or set `template: FILE` to another."
    )


def test_reasoning_that_is_dropped_is_not_taken_for_part_of_the_answer() -> None:
    """The reasoning's words occur in the answer: that does not make it trained."""
    tokenizer = make_tokenizer("byte", CHATML, **IM)
    encoder = made(tokenizer)
    with pytest.raises(RowRefused) as error:
        encoder.encode(talk(("user", "hello"), Message("assistant", "yes, so it is", "so it is")))
    assert error.value.reason == "reasoning_dropped"


@pytest.mark.parametrize(
    ("template_writes", "tokenizer_adds", "expected"),
    [(True, True, 1), (True, False, 1), (False, True, 0), (False, False, 0)],
)
def test_bos_stands_once_or_not_at_all_as_a_server_has_it(
    template_writes: bool, tokenizer_adds: bool, expected: int
) -> None:
    bos = "<|begin_of_text|>"
    source = LLAMA3 if template_writes else LLAMA3.replace("{{ bos_token }}", "")
    tokenizer = make_tokenizer("byte", source, bos_token=bos, eos_token="<|eot_id|>")
    if tokenizer_adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    encoder = made(tokenizer)
    (example,) = encoder.encode(HELLO)
    ids = list(example.prompt_ids + example.completion_ids)
    assert ids.count(tokenizer.bos_token_id) == expected
    assert (
        ids[: len(example.prompt_ids)]
        == tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True
        )["input_ids"]
    )
    said = [note for note in encoder.notes if "writes no" in note]
    assert bool(said) == (tokenizer_adds and not template_writes)
