from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import CHATML, LLAMA3, MISTRAL, PLAIN, QWEN3, make_tokenizer, talk
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.dataset import Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows
from myna.data.oddities import (
    NGRAM,
    Oddity,
    find_oddities,
    repeated_share,
    unknown_ids,
)
from myna.data.templates import choose_template

USUAL = ["longest", "longest_answer", "shortest_answer"]


def dataset(
    *pairs: tuple[str, str], kind: str = "byte", template: str = CHATML, **special: str
) -> Dataset:
    tokenizer = make_tokenizer(kind, template, **(special or {"eos_token": "<|im_end|>"}))
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id]
    )
    conversations = [
        talk(("user", question), ("assistant", answer), line=line)
        for line, (question, answer) in enumerate(pairs, 1)
    ]
    return encode_dataset(encoder, Rows(tuple(conversations), (), "hash"))


def of_kind(data: Dataset, kind: str) -> Oddity:
    (found,) = [oddity for oddity in find_oddities(data) if oddity.kind == kind]
    return found


def test_ordinary_rows_have_nothing_odd() -> None:
    data = dataset(
        ("What is the capital of France?", "Paris"),
        ("who are you", "i am a bird that talks"),
        ("你好吗", "fine, and YOU? :-)"),
    )
    assert [oddity.kind for oddity in find_oddities(data)] == USUAL


def test_longest_and_shortest_with_their_places() -> None:
    data = dataset(("hello " * 30, "yes"), ("hello", "no"), ("what", "answer " * 20))
    longest = of_kind(data, "longest")
    assert [row.index for row in longest.rows] == [0, 2, 1]
    lengths = data.examples.lengths
    assert longest.rows[0].measure == f"{lengths[0]} tokens"
    assert longest.rows[0].place == "rows.jsonl line 1"
    assert longest.rows[0].excerpt.startswith("<|im_start|>user hello hello")
    (answer,) = of_kind(data, "longest_answer").rows
    assert (answer.index, answer.excerpt[:13]) == (2, "answer answer")
    shortest = of_kind(data, "shortest_answer")
    lengths = data.examples.completion_lengths
    assert [row.index for row in shortest.rows] == sorted(range(3), key=lambda at: lengths[at])
    assert shortest.rows[0].measure == f"{min(lengths)} tokens"


def test_equal_lengths_keep_the_order_of_the_rows() -> None:
    data = dataset(*[("hello", "yes")] * 5)
    assert [row.index for row in of_kind(data, "longest").rows] == [0, 1, 2]
    assert of_kind(data, "shortest_answer").count == 5


@pytest.mark.parametrize("kind", ["byte", "piece"])
def test_characters_that_the_vocabulary_lacks(kind: str) -> None:
    known = [("What is the capital of France?", "The capital of France is Paris.")] * 9
    data = dataset(*known, ("hello", "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ"), kind=kind)
    found = of_kind(data, "unknown_characters")
    assert (found.count, found.rows[0].place) == (1, "rows.jsonl line 10")
    assert found.rows[0].measure.endswith("% of the tokens")


def test_a_script_that_is_strange_throughout_makes_no_row_odd() -> None:
    data = dataset(*[("ᚠᛇᚻ᛫", "ᛒᛦᚦ᛫ᚠᚱ")] * 5, kind="piece")
    assert "unknown_characters" not in {oddity.kind for oddity in find_oddities(data)}


def test_which_ids_are_unknown() -> None:
    piece = make_tokenizer("piece", None, unk_token="<unk>")
    mask = unknown_ids(piece)
    vocabulary = piece.get_vocab()
    assert mask[vocabulary["<unk>"]] and mask[vocabulary["<0xE4>"]]
    # Line breaks are written as bytes and are no unknown characters; nor are words or specials.
    assert not mask[vocabulary["<0x0A>"]] and not mask[vocabulary["<|im_end|>"]]
    assert mask.sum() == 1 + 256 - 4
    byte = make_tokenizer("byte", None)
    mask = unknown_ids(byte)
    whole = byte("What is 你好？\n\tcafé", add_special_tokens=False)["input_ids"]
    split = byte("ᚠ", add_special_tokens=False)["input_ids"]
    assert len(split) == 3 and mask[split].all()
    # é is in no text that this tokenizer was made from.
    assert [byte.decode([index]) for index in whole if mask[index]] == ["\ufffd", "\ufffd"]


def test_an_unknown_token_that_ends_texts_is_not_counted() -> None:
    tokenizer = make_tokenizer("byte", None, unk_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert not unknown_ids(tokenizer)[tokenizer.unk_token_id]


def brute_force_share(ids: list[int]) -> float:
    ngrams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return (len(ngrams) - len(set(ngrams))) / max(len(ngrams), 1)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), max_size=8))
def test_repetition_is_that_of_comparing_all_ngrams(runs: list[list[int]]) -> None:
    ids = np.array([index for run in runs for index in run], np.uint16)
    found = repeated_share(ids, np.array([len(run) for run in runs], np.int32))
    assert found.tolist() == pytest.approx([brute_force_share(run) for run in runs])


def test_answers_that_go_in_circles() -> None:
    varied = "The capital of France is Paris. How are you? I am fine, thank you, who are you? " * 1
    data = dataset(("hello", "fine, thank you. " * 30), ("hello", varied), ("who", "no " * 8))
    found = of_kind(data, "repetitive")
    # Line 3 repeats too, and is too short to tell.
    assert (found.count, [row.index for row in found.rows]) == (1, [0])
    assert found.rows[0].measure.endswith("said before")


@pytest.mark.parametrize(
    ("template", "special"),
    [
        (CHATML, {"eos_token": "<|im_end|>"}),
        (LLAMA3, {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}),
        (MISTRAL, {"eos_token": "</s>", "bos_token": "<s>"}),
        (PLAIN, {"eos_token": "</s>"}),
        (QWEN3, {"eos_token": "<|im_end|>"}),
    ],
    ids=["chatml", "llama3", "mistral", "plain", "qwen3"],
)
def test_an_answer_that_is_the_question(template: str, special: dict[str, str]) -> None:
    data = dataset(
        ("hello there", "hello there"),
        ("who are you?", "you?"),  # only the end of the question
        ("fine", "fine."),
        ("你好", " 你好 "),
        template=template,
        **special,
    )
    found = of_kind(data, "echo")
    assert [row.index for row in found.rows] == [0, 3]
    assert found.count == 2


def test_an_echo_in_a_later_turn() -> None:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id]
    )
    turns = [("user", "hello"), ("assistant", "yes"), ("user", "what?"), ("assistant", "what?")]
    data = encode_dataset(encoder, Rows((talk(*turns),), (), "hash"))
    (row,) = of_kind(data, "echo").rows
    assert (row.index, row.place) == (1, "rows.jsonl line 1, answer 2")


def test_one_answer_under_many_prompts() -> None:
    rows = [(f"question {number}", "I do not know.") for number in range(10)]
    others = [(f"hello {number}", f"answer {number}") for number in range(20)]
    found = of_kind(dataset(*others, *rows), "same_answer")
    assert (found.count, found.rows[0].place) == (10, "rows.jsonl line 21")
    assert found.rows[0].measure == "under 10 different prompts"
    # One prompt with one answer ten times is a duplicate, and nine prompts are not many.
    fewer = find_oddities(dataset(*others, *rows[:9], rows[0]))
    assert "same_answer" not in {oddity.kind for oddity in fewer}


def test_folder_names_do_not_stand_in_places() -> None:
    data = dataset(("hello", "yes"))
    assert all(
        str(Path("/")) not in row.place for oddity in find_oddities(data) for row in oddity.rows
    )


def kinds(data: Dataset) -> list[Any]:
    return [oddity.kind for oddity in find_oddities(data)]


def test_each_oddity_can_be_written_as_json() -> None:
    import json
    from dataclasses import asdict

    data = dataset(("hello there", "hello there"), ("a", "fine, thank you. " * 30))
    assert kinds(data) == [*USUAL, "repetitive", "echo"]
    for oddity in find_oddities(data):
        assert json.loads(json.dumps(asdict(oddity)))["kind"] == oddity.kind
