"""Pieces of a stream, joined, are the decoded text of all ids; nothing is taken back."""

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from myna.inference.text_stream import TextStream, decode
from myna.models.bluelm_tokenizer import convert_bluelm_tokenizer

from .conftest import byte_level_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def bluelm() -> PreTrainedTokenizerBase:
    return convert_bluelm_tokenizer(GOLDEN / "tokenizer")


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def test_pieces_of_all_golden_strings_join_to_the_golden_text(
    bluelm: PreTrainedTokenizerBase,
) -> None:
    golden = json.loads((GOLDEN / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
    for case in golden["strings"]:
        pieces = pieces_of(bluelm, case["ids_no_special"])
        assert "".join(pieces) == case["decoded_skip_special"], case["name"]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_ids_join_to_their_text(bluelm: PreTrainedTokenizerBase, seed: int) -> None:
    generator = random.Random(seed)
    for tokenizer in (bluelm, byte_level_tokenizer()):
        rows = len(tokenizer)
        for length in [30] * 100 + [300] * 20:  # within one window, and over several
            # Every second id from the low ones: byte pieces and control tokens.
            ids = [generator.randrange(generator.choice((rows, 260))) for _ in range(length)]
            text = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert "".join(pieces_of(tokenizer, ids)) == text == decode(tokenizer, ids)


def test_a_character_of_several_ids_comes_whole() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("é你", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert pieces_of(tokenizer, ids) == ["", "é", "", "", "你", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("a你", add_special_tokens=False)["input_ids"][:-1]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_a_run_of_byte_pieces_waits_for_its_end(bluelm: PreTrainedTokenizerBase) -> None:
    # 你 in byte pieces, then one byte of another character: sentencepiece's decoder turns the
    # whole run into U+FFFD, so 你 must not have been shown.
    run = [bluelm.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe5"]
    (word,) = bluelm.convert_tokens_to_ids(["皇上"])
    assert pieces_of(bluelm, [*run, word]) == ["", "", "", "", "\ufffd" * 4 + "皇上", ""]


def test_text_is_as_the_model_wrote_it_whatever_the_tokenizer_would_clean_up() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("I do n't , see .", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, ids) == "I do n't , see ."
    assert "".join(pieces_of(tokenizer, ids)) == "I do n't , see ."
