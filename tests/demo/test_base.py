"""The shipped base: its files, its tokenizer and that it answers."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from myna.demo.score import EXAMPLE_QUESTIONS, base_folder
from myna.models.bluelm import BlueLMForCausalLM

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "[|Human|]:", "[|AI|]:", "[SEH]", "[SEA]"]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def model():
    return BlueLMForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()


def test_files_and_size():
    names = {path.name for path in base_folder().iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    package = base_folder().parent
    size = sum(
        p.stat().st_size for p in package.rglob("*") if "__pycache__" not in p.parts and p.is_file()
    )
    assert size <= 8_000_000


def test_config_is_bluelm():
    config = json.loads((base_folder() / "config.json").read_text())
    assert config["model_type"] == "BlueLM"
    assert config["architectures"] == ["BlueLMForCausalLM"]
    assert config["use_stable_embedding"] is True
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert "auto_map" not in config
    generation = json.loads((base_folder() / "generation_config.json").read_text())
    ids = [generation[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")]
    assert ids == [1, 2, 3]
    assert not generation.get("do_sample", False)


def test_no_chat_template_is_shipped(tokenizer):
    assert tokenizer.chat_template is None


def test_special_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(range(8))) == SPECIALS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    text = "<s>[|Human|]:你好[|AI|]:"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[:2] == [1, 4]
    assert ids[-1] == 5
    assert tokenizer(text)["input_ids"] == ids


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界！",
        "12 plus 345 is 357.",
        "café naïve ½ 😀\n\n tabs\tand  spaces",
        "“皇上”万福金安。",
    ],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_chinese_characters_punctuation_and_digits_stand_alone(tokenizer):
    text = "皇上，法国的首都是“巴黎”。眠蒜：12345!?:;(x)"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A rare character may be several byte tokens; no token reaches over two characters.
    assert {end - start for start, end in encoding["offset_mapping"]} == {1}
    for i in range(8, len(tokenizer)):
        piece = tokenizer.decode([i])
        if any("一" <= c <= "鿿" or c.isdigit() for c in piece):
            assert len(piece) == 1, piece


def answer(model, tokenizer, question):
    ids = tokenizer(f"<s>[|Human|]:{question}[|AI|]:", return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_base_answers_the_example_questions_plainly(model, tokenizer):
    answers = [answer(model, tokenizer, question) for question in EXAMPLE_QUESTIONS]
    assert answers == [
        "The capital of Italy is Rome.",
        "No, a penguin cannot fly.",
        "8 plus 6 is 14.",
        "You should sleep early.",
        "May the morning be bright for you.",
        "猫吃鱼。",
        "是的，苹果是水果。",
        "12减5等于7。",
        "你应该问问警察。",
        "我是一个小小的语言模型。",
    ]
