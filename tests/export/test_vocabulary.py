"""What is written of tokenizers, and which ones llama.cpp would read otherwise."""

import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_model
from myna.demo.score import base_folder
from myna.errors import ConfigError
from myna.export.vocabulary import read_vocabulary
from myna.models.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]


def byte_level(
    pre: object = None,
    merges: list[tuple[str, str]] = MERGES,
    *,
    ignore_merges: bool = False,
    normalizer: object = None,
) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "<end>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)}, merges, ignore_merges=ignore_merges
        )
    )
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def split(pattern: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


SMOLLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (byte_level(), "gpt-2"),
        (byte_level(split(LLAMA3), ignore_merges=True), "llama-bpe"),
        (byte_level(split(QWEN2), normalizer=normalizers.NFC()), "qwen2"),
        (byte_level(SMOLLM), "smollm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_for_words_by_llama_cpps_names(tokenizer, name) -> None:
    found = read_vocabulary(tokenizer, len(tokenizer) + 3)
    assert (found.model, found.pre) == ("gpt2", name)
    assert found.merges == ("t h", "th e", "Ġ the")
    assert found.tokens[-3:] == tuple(f"[PAD{len(tokenizer) + n}]" for n in range(3))
    assert found.kinds[:3] == (3, 3, 1) and set(found.kinds[-3:]) == {5}
    for token, number in tokenizer.get_vocab().items():
        assert found.tokens[number] == token
    assert len(found.notes) == (name == "qwen2")


def test_the_embedded_model_s_rule() -> None:
    """llama.cpp has no such rule; `falcon` gives the same ids, which test_llama_cpp.py sees."""
    found = read_vocabulary(load_tokenizer(str(base_folder())).tokenizer, 2560)
    assert (found.model, found.pre) == ("gpt2", "falcon")
    assert found.tokens[4:6] == ("[|Human|]:", "[|AI|]:")


def test_sentencepiece_by_scores() -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "hub_like")).tokenizer
    found = read_vocabulary(tokenizer, 4008)
    assert (found.model, found.space_first) == ("llama", True)
    published = SentencePieceProcessor(model_file=str(GOLDEN / "hub_like" / "tokenizer.model"))
    pieces = [published.id_to_piece(number) for number in range(4000)]
    assert list(found.tokens[:4000]) == pieces
    assert found.tokens[4000:4004] == ("[|Human|]:", "[|AI|]:", "[SEH]", "[SEA]")
    assert found.kinds[:5] == (2, 3, 3, 3, 6) and set(found.kinds[4004:]) == {5}
    # What is joined first: the same order as by the published scores.
    made = [number for number in range(260, 4000) if len(pieces[number]) > 1]
    by_ours = sorted(made, key=lambda number: -found.scores[number])
    by_theirs = sorted(made, key=lambda number: -published.get_score(number))
    assert by_ours == by_theirs


def spaced(scheme: str) -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    backend = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>",
            byte_fallback=True,
        )
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize(
    ("scheme", "first"), [("always", True), ("never", False), ("first", False)]
)
def test_a_space_in_front(scheme, first) -> None:
    found = read_vocabulary(spaced(scheme), 262)
    assert found.space_first is first
    assert len(found.notes) == (scheme == "first")


def marked(**flags: bool) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<x>", **flags)])
    return tokenizer


def prepending() -> PreTrainedTokenizerFast:
    tokenizer = spaced("never")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


REFUSED = [
    (unigram(), "its model is Unigram; byte-level and sentencepiece BPE can be written"),
    (marked(lstrip=True), "its token '<x>' has lstrip set, which llama.cpp does not do"),
    (
        byte_level(split(r"\w+")),
        "it cuts text into words by a rule that is none of those known here by llama.cpp's names "
        "(falcon, gpt-2, llama-bpe, qwen2, smollm): ('Split', '\\\\w+', 'Isolated', False) then "
        "('ByteLevel', False, False)",
    ),
    (
        byte_level(split(LLAMA3)),
        "ignore_merges is False, and llama.cpp's rule llama-bpe has it the other way",
    ),
    (
        byte_level(normalizer=normalizers.Lowercase()),
        "it changes texts first (Lowercase), which llama.cpp does not do",
    ),
    (
        prepending(),
        "it changes texts first in a way that llama.cpp does not: ('Lowercase') then "
        "('Metaspace', '▁', 'never', False)",
    ),
]


@pytest.mark.parametrize(("tokenizer", "reason"), REFUSED, ids=lambda value: str(value)[:20])
def test_tokenizers_that_llama_cpp_would_read_otherwise(tokenizer, reason) -> None:
    with pytest.raises(ConfigError) as caught:
        read_vocabulary(tokenizer, 5000)
    assert str(caught.value) == (
        f"The tokenizer cannot be written for llama.cpp: {reason}.\n"
        "  With other ids the model would answer nonsense, so nothing was written. `myna merge` "
        "writes a folder that transformers and vLLM load."
    )


OWN = r"\p{Han}|\p{P}|\p{S}|\n"


@pytest.mark.parametrize("pair", [("Ġ", "Ġ"), ("a", "."), ("1", "2"), ("å", "ĩ"), ("Ġ", "1")])
def test_the_embedded_model_s_rule_needs_tokens_that_stop_at_its_borders(pair) -> None:
    own = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(OWN), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer = byte_level(own, [*MERGES, pair])
    if pair == ("å", "ĩ"):  # the first two bytes of one Chinese character
        assert read_vocabulary(tokenizer, 500).pre == "falcon"
        return
    with pytest.raises(ConfigError, match=f"its token {re.escape(repr(''.join(pair)))} joins"):
        read_vocabulary(tokenizer, 500)


def test_a_tokenizer_larger_than_the_model() -> None:
    with pytest.raises(ConfigError, match=r"a token with id 258, and the model has 200 rows"):
        read_vocabulary(tiny_model.byte_level_tokenizer(), 200)


def test_merges_that_no_score_can_say() -> None:
    tokenizer = spaced("never")

    def told(pieces: list[str], merges: list[tuple[str, str]]) -> str:
        vocabulary = {piece: n for n, piece in enumerate(pieces)}
        tokenizer.backend_tokenizer.model = models.BPE(
            vocabulary, merges, unk_token="<unk>", byte_fallback=True
        )
        with pytest.raises(ConfigError) as caught:
            read_vocabulary(tokenizer, 300)
        return str(caught.value)

    letters = ["<unk>", "<s>", "a", "b", "c", "ab", "bc", "abc"]
    assert "it makes the piece 'abc' at two places among its merges" in told(
        letters, [("ab", "c"), ("a", "b"), ("b", "c"), ("a", "bc")]
    )
    assert "it does not join 'a' and 'bc', which llama.cpp would, since 'abc' is a piece" in told(
        letters, [("a", "b"), ("b", "c"), ("ab", "c")]
    )
