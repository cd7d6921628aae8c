import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from myna.errors import ConfigError
from myna.models.bluelm import BlueLMConfig
from myna.models.tokenizer import (
    SpecialIds,
    fingerprint,
    load_tokenizer,
    save_tokenizer,
    settle_special_ids,
)

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|end|>", "hello", "world"]


def word_tokenizer(**special: Any) -> PreTrainedTokenizerBase:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def settle(
    config: PreTrainedConfig | None, generation: dict[str, Any], **special: Any
) -> SpecialIds:
    return settle_special_ids(word_tokenizer(**special), config, generation)


def test_bluelm_folder(golden: Path) -> None:
    loaded = load_tokenizer(str(golden / "hub_like"))
    assert loaded.model_type == "BlueLM"
    assert loaded.folder == golden / "hub_like"
    assert loaded.special == SpecialIds(1, 2, 3, (2,), ())
    assert loaded.tokenizer("皇上").input_ids == [1, 271]


def test_folder_with_a_tokenizer_alone(golden: Path) -> None:
    loaded = load_tokenizer(str(golden / "tokenizer"))
    assert loaded.model_type is None
    assert loaded.special == SpecialIds(1, 2, 3, (2,), ())


def test_fingerprint_is_that_of_the_ids(golden: Path, tmp_path: Path) -> None:
    first = load_tokenizer(str(golden / "tokenizer"))
    assert first.fingerprint == load_tokenizer(str(golden / "hub_like")).fingerprint
    assert len(first.fingerprint) == 64
    before = fingerprint(first.tokenizer)
    first.tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=3)
    assert fingerprint(first.tokenizer) == before
    save_tokenizer(first.tokenizer, tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == before
    first.tokenizer.add_tokens(["new"])
    assert fingerprint(first.tokenizer) != before


def test_saved_copy_is_plain_and_readable_by_transformers_4(golden: Path, tmp_path: Path) -> None:
    loaded = load_tokenizer(str(golden / "hub_like"))
    loaded.tokenizer.chat_template = "{{ messages[0].content }}"
    BlueLMConfig().save_pretrained(tmp_path)  # beside a BlueLM config, too
    save_tokenizer(loaded.tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["[|Human|]:", "[|AI|]:", "[SEH]", "[SEA]"]
    assert "extra_special_tokens" not in settings
    assert "auto_map" not in settings
    for again in (
        load_tokenizer(str(tmp_path)).tokenizer,
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False),
    ):
        assert again("[|Human|]:你好[|AI|]:").input_ids == [1, 4000, 516, 4001]
        assert sorted(again.all_special_ids) == [0, 1, 2, 3, 4000, 4001, 4002, 4003]
        assert again.chat_template == loaded.tokenizer.chat_template


def test_sentencepiece_of_another_family(golden: Path, tmp_path: Path) -> None:
    """Read by transformers as Llama; sentencepiece is the judge."""
    shutil.copy(golden / "tokenizer/tokenizer.model", tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    LlamaConfig(vocab_size=4000).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in ("皇上万福金安。", "hello world 123", "两  个\n行😀"):
        ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
        assert ids == reference.encode(text)
    assert loaded.special.stop_ids == (2,)


def test_tiktoken_vocabulary(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the extra `tiktoken`")
    ranks = {bytes([index]): index for index in range(256)} | {b"he": 256, b"ll": 257, b"hell": 258}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n", "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    loaded = load_tokenizer(str(tmp_path))
    encoding = tiktoken.Encoding(
        "test", pat_str=r"[^\r\n]+|[\r\n]+", mergeable_ranks=ranks, special_tokens={}
    )
    for text in ("hello", "hell", "好"):
        assert loaded.tokenizer(text, add_special_tokens=False).input_ids == encoding.encode(text)


def test_remote_code_is_not_needed_for_a_tokenizer_json(tmp_path: Path) -> None:
    save_tokenizer(word_tokenizer(eos_token="</s>", unk_token="<unk>"), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    path.write_text(json.dumps(settings), "utf-8")
    (tmp_path / "odd.py").write_text("raise SystemExit('it ran')", "utf-8")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.tokenizer("hello world").input_ids == [5, 6]
    assert loaded.special.eos_id == 2


def test_folder_without_tokenizer(golden: Path) -> None:
    folder = golden / "no_stable"
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value) == (
        f"{folder}: no tokenizer. Looked for tokenizer.json, tokenizer.model, tiktoken.model, "
        "*.tiktoken, tekken.json, vocab.json, vocab.txt, spiece.model, sentencepiece.bpe.model; "
        "the folder holds config.json, expected.safetensors, generation_config.json, "
        "pytorch_model-00001-of-00004.bin, pytorch_model-00002-of-00004.bin, "
        "pytorch_model-00003-of-00004.bin, pytorch_model-00004-of-00004.bin, "
        "pytorch_model.bin.index.json.\n  Copy the tokenizer files of the model into it."
    )


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"', "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(
        f"{tmp_path}: its tokenizer (tokenizer.json) cannot be read.\n  "
    )


def test_stop_ids_are_the_union_of_all_files() -> None:
    special = settle(
        BlueLMConfig(vocab_size=7, eos_token_id=[2, 5]),
        {"eos_token_id": [4, 2]},
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    assert special == SpecialIds(bos_id=1, eos_id=2, pad_id=3, stop_ids=(2, 4, 5), notes=())


def test_end_id_of_the_config_where_the_tokenizer_names_none() -> None:
    special = settle(BlueLMConfig(vocab_size=7, eos_token_id=4), {}, pad_token="<pad>")
    assert (special.bos_id, special.eos_id, special.stop_ids) == (None, 4, (4,))


def test_nothing_names_a_stop_id() -> None:
    special = settle(None, {}, pad_token="<pad>")
    assert special.stop_ids == ()
    assert special.notes == (
        "No file names a token that ends an answer; answers end at the length limit.",
    )


def test_padding_in_the_order_of_preference() -> None:
    config = BlueLMConfig(vocab_size=7, pad_token_id=5)
    assert settle(config, {}, eos_token="</s>", pad_token="<pad>").pad_id == 3
    special = settle(config, {}, eos_token="</s>", unk_token="<unk>")
    assert special.pad_id == 5
    assert special.notes == ("Padding with config.json's pad_token_id, hello (id 5).",)
    config = BlueLMConfig(vocab_size=7)
    special = settle(config, {}, eos_token="</s>", unk_token="<unk>")
    assert special.pad_id == 0
    assert special.notes == ("Padding with the unknown token, <unk> (id 0).",)
    special = settle(config, {}, eos_token="</s>")
    assert special.pad_id == 2
    assert special.notes == ("Padding with the end-of-text token, </s> (id 2).",)
    with pytest.raises(ConfigError) as caught:
        settle(None, {})
    assert str(caught.value) == (
        "tokenizer: it has neither a pad, an unknown nor an end-of-text token with a row in the "
        'model.\n  Name one in tokenizer_config.json, such as "pad_token": "<pad>".'
    )


def test_ids_without_a_row_are_said() -> None:
    special = settle(
        BlueLMConfig(vocab_size=3, eos_token_id=2),
        {"eos_token_id": [2, 4]},
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    assert special.stop_ids == (2,)
    assert special.pad_id == 0
    assert special.notes == (
        "Stop id 4 has no row in the model (3 rows); left out.",
        "Not padding with the tokenizer's pad token: id 3 has no row (3 rows).",
        "Padding with the unknown token, <unk> (id 0).",
        "The tokenizer has 7 tokens, the model 3 rows: text that needs an id from 3 on cannot be "
        "used.",
    )


def test_an_end_token_without_a_row_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        settle(BlueLMConfig(vocab_size=3, eos_token_id=2), {}, eos_token="<|end|>")
    assert str(caught.value) == (
        "tokenizer: the token that ends a text, <|end|>, has id 4, but the model has 3 rows (ids 0 "
        "to 2).\n  Tokenizer and model do not belong together."
    )
