"""Against the published tokenizer class: tests/golden/tokenizer, and sentencepiece itself."""

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from myna.errors import ConfigError
from myna.models.bluelm_tokenizer import convert_bluelm_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = ["tokenizer", "tokenizer_hub_layout"]
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "tokenizer/expected.json").read_text("utf-8"))
TUTORIAL = json.loads((GOLDEN / "tokenizer/tutorial_sft.json").read_text("utf-8"))["examples"]


@cache
def converted(layout: str) -> PreTrainedTokenizerBase:
    return convert_bluelm_tokenizer(GOLDEN / layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", EXPECTED["strings"], ids=lambda case: case["name"])
def test_golden_string(layout: str, case: dict[str, Any]) -> None:
    tokenizer = converted(layout)
    assert tokenizer(case["text"]).input_ids == case["ids"]
    plain = tokenizer(case["text"], add_special_tokens=False).input_ids
    assert plain == case["ids_no_special"]
    assert tokenizer.convert_ids_to_tokens(case["ids"]) == case["tokens"]
    # Text with specials kept differs between transformers versions; it is no contract.
    decoded = tokenizer.decode(case["ids"], skip_special_tokens=True)
    assert decoded == case["decoded_skip_special"]


def test_all_65_strings_are_there() -> None:
    assert len(EXPECTED["strings"]) == 65


@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_ids_and_sizes(layout: str) -> None:
    tokenizer = converted(layout)
    assert tokenizer.vocab_size == EXPECTED["vocab_size"]
    assert len(tokenizer) == EXPECTED["len"]
    for name, index in EXPECTED["special_ids"].items():
        assert tokenizer.convert_tokens_to_ids(name) == index
    assert sorted(tokenizer.all_special_ids) == sorted(EXPECTED["all_special_ids"])
    assert tokenizer.padding_side == "right"


@pytest.mark.parametrize("case", EXPECTED["decode_edge_cases"], ids=lambda case: str(case["ids"]))
def test_decoding_of_odd_ids(case: dict[str, Any]) -> None:
    decoded = converted("tokenizer").decode(case["ids"], skip_special_tokens=True)
    assert decoded == case["decoded_skip_special"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    case = EXPECTED["padding"][side]
    batch = converted("tokenizer")(case["texts"], padding=True, padding_side=side)
    assert batch["input_ids"] == case["input_ids"]
    assert batch["attention_mask"] == case["attention_mask"]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_truncation_pairs_and_answer_prefix() -> None:
    tokenizer = converted("tokenizer")
    case = EXPECTED["truncation_max_length_12"]
    assert tokenizer(case["text"], truncation=True, max_length=12).input_ids == case["ids"]

    case = EXPECTED["pair"]
    pair = tokenizer(case["text"], case["text_pair"], return_special_tokens_mask=True)
    assert pair.input_ids == case["ids"]
    assert pair["special_tokens_mask"] == case["special_tokens_mask"]

    case = EXPECTED["answer_prefix"]
    answer = tokenizer(case["answer"], add_special_tokens=False).input_ids
    assert tokenizer(case["prompt"]).input_ids == case["prompt_ids"]
    assert answer == case["answer_ids"]
    assert tokenizer(case["prompt"] + case["answer"]).input_ids == case["ids_of_one_string"]
    assert tokenizer.decode(answer) == case["decode_answer_alone_skip_special"]
    both = tokenizer.decode(case["prompt_ids"] + answer, skip_special_tokens=True)
    assert both == case["decode_prompt_plus_answer_skip_special"]


@pytest.mark.parametrize("switch", ["add_eos_token_true", "add_bos_token_false"])
def test_begin_and_end_tokens_follow_the_settings(switch: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "tokenizer_hub_layout", tmp_path / "t")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    name, value = switch.rsplit("_", 1)
    path.write_text(json.dumps({**settings, name: value == "true"}), "utf-8")
    case = EXPECTED[switch]
    assert convert_bluelm_tokenizer(folder)(case["text"]).input_ids == case["ids"]


@pytest.mark.parametrize("record", TUTORIAL, ids=lambda record: str(record["index"]))
def test_tutorial_record(record: dict[str, Any]) -> None:
    tokenizer = converted("tokenizer_hub_layout")
    prompt = tokenizer(record["prompt"], add_special_tokens=False).input_ids
    answer = tokenizer(record["answer"], add_special_tokens=False).input_ids
    assert [1, *prompt, *answer, 2] == record["input_ids"]


def test_text_with_specials_disabled_holds_no_control_token() -> None:
    """What a user types must not become a role token."""
    text = "[|AI|]:好</s>[SEH]"
    tokenizer = converted("tokenizer")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    reference = sentencepiece.SentencePieceProcessor(str(GOLDEN / "tokenizer/tokenizer.model"))
    assert ids == reference.encode(text)


def test_saved_copy_needs_no_code_of_ours(tmp_path: Path) -> None:
    converted("tokenizer_hub_layout").save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text("utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for case in EXPECTED["strings"]:
        assert again(case["text"]).input_ids == case["ids"]
    assert sorted(again.all_special_ids) == sorted(EXPECTED["all_special_ids"])


def train(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A small sentencepiece model of our own in `folder`, with BlueLM's ids."""
    lines = [case["text"] for case in EXPECTED["strings"] if case["text"].strip()] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 700,
            "byte_fallback": True,
            "character_coverage": 0.98,
            "hard_vocab_limit": False,
            "pad_id": 3,
            "minloglevel": 2,
            **options,
        },
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
        {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<|tool|>", "▁▁", "…"],
        },
    ],
    ids=["nmt_nfkc", "no_prefix", "nfkc", "user_defined"],
)
def test_other_sentencepiece_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    """The real tokenizer.model was not at hand; whatever its settings, the ids must agree."""
    reference = train(tmp_path, **options)
    tokenizer = convert_bluelm_tokenizer(tmp_path)
    texts = [case["text"] for case in EXPECTED["strings"]] + ["a<|tool|>b  c …… d"]
    specials = ("<s>", "</s>", "<pad>", "<unk>")
    for text in texts:
        if not any(special in text for special in specials):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == reference.encode(text), text


def test_unigram_is_refused(tmp_path: Path) -> None:
    train(tmp_path, model_type="unigram")
    with pytest.raises(ConfigError) as caught:
        convert_bluelm_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'tokenizer.model'}: a sentencepiece model, but not a BPE as BlueLM's is."
    )


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0e\x00version https://git-lfs")
    with pytest.raises(ConfigError, match=r"tokenizer\.model: not a sentencepiece model"):
        convert_bluelm_tokenizer(tmp_path)


def test_gap_in_the_extra_ids_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "tokenizer_hub_layout", tmp_path / "t")
    (folder / "added_tokens.json").write_text('{"[|AI|]:": 4009, "[|Human|]:": 4000}', "utf-8")
    with pytest.raises(ConfigError) as caught:
        convert_bluelm_tokenizer(folder)
    assert str(caught.value) == (
        f"{folder}: token [|AI|]: has id 4009, but the ids after the 4000 pieces are "
        "{'[|Human|]:': 4000, '[|AI|]:': 4009, '[SEH]': 4010, '[SEA]': 4011}; expected them "
        "without gaps."
    )
