"""Segments: ids by pieces are the tokenizer's own; where that is not sure, texts stay whole."""

from collections.abc import Sequence
from typing import Any

import pytest
from chat_families import CHATML, CORPUS, STATES, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from myna.data import segments
from myna.data.segments import CHECKED_FIRST, Segments, SegmentsDiffer

MARKS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "[INST]"]
WORDS = ["hello", " hello", "  ", "\n", "\n\n", "▁", "好", "，答：", "<", "<s", "s>", "|>", "é"]
WORDS += ["I'll", "It's THE", "don'T", " x1 y22 ", "a.b c", "\tq", "\u00a0b", "A B", "café au lait"]
WORDS += ["e\u0301", "😀", "capital of France?", "<|im", "\u200b", " a", "0", "ﬁ", "THE"]
TEXTS = st.lists(
    st.lists(st.sampled_from(MARKS + WORDS) | st.text(max_size=4), max_size=8).map("".join),
    max_size=6,
)


def metaspace(scheme: str) -> Any:
    """Spaces are ▁, one put in front of every piece, of the first alone, or of none."""
    state = Tokenizer.from_str(STATES["piece"])
    state.normalizer = normalizers.Sequence([])  # type: ignore[assignment]
    state.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    state.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=state, eos_token="</s>")


def lowering() -> Any:
    """A normalizer, and an added token that is looked for in the text that it made."""
    state = Tokenizer.from_str(STATES["byte"])
    state.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    state.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    state.add_tokens([AddedToken("the", normalized=True), AddedToken("answer", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=state, eos_token="</s>")


def overlapping() -> Any:
    """Control tokens that begin and end like one another."""
    tokenizer = make_tokenizer("byte", CHATML, eos_token="</s>")
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<s>h", "s>", "<|im", "<s><bos>", "好")]
    )
    return tokenizer


def of_words(at: int, normalizer: Any = None) -> Any:
    """A byte-level tokenizer that finds its words as Llama 3, Qwen or gpt-oss do."""
    state = Tokenizer.from_str(STATES["byte"])
    state.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(segments._EXPRESSIONS[at]), "isolated")
    state.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=state, eos_token="</s>")


TOKENIZERS = {
    "words of Llama 3": lambda: of_words(0),
    "words of Qwen": lambda: of_words(1, normalizers.NFC()),
    "words of gpt-oss": lambda: of_words(2),
    "byte-level": lambda: make_tokenizer("byte", CHATML, eos_token="</s>"),
    "sentencepiece-like": lambda: make_tokenizer("piece", CHATML, eos_token="</s>"),
    "prefix everywhere": lambda: metaspace("always"),
    "prefix at the start": lambda: metaspace("first"),
    "no prefix": lambda: metaspace("never"),
    "normalized words": lowering,
    "overlapping": overlapping,
}
MADE = {name: make() for name, make in TOKENIZERS.items()}


def whole(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def check_ids(name: str, calls: list[list[str]]) -> None:
    made = Segments(MADE[name])
    assert made.cuts
    made._num_texts = 1 + CHECKED_FIRST  # its own check is not what finds a difference here
    for texts in calls:
        assert made.ids(texts) == whole(MADE[name], texts)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(calls=st.lists(TEXTS, max_size=3))
def test_ids_by_pieces_are_those_of_the_whole_text(name: str, calls: list[list[str]]) -> None:
    check_ids(name, calls)


@pytest.mark.full
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=1000, deadline=None)
@given(calls=st.lists(TEXTS, max_size=3))
def test_ids_by_pieces_of_many_texts(name: str, calls: list[list[str]]) -> None:
    check_ids(name, calls)


def counted(made: Segments) -> list[int]:
    """How many pieces each call of the engine encodes."""
    sizes: list[int] = []
    backend = made._backend

    class Counting:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            sizes.append(len(texts))
            return backend.encode_batch_fast(texts, **options)

    made._backend = Counting()
    return sizes


def test_what_texts_share_is_encoded_once() -> None:
    made = Segments(MADE["sentencepiece-like"])
    sizes = counted(made)
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    texts = [f"{head}{question}<|im_end|>\n<|im_start|>assistant\n" for question in CORPUS]
    made.ids([*texts, *(text + "yes<|im_end|>" for text in texts)])
    # system, what is between two marks, one question each, and the header without and with answer
    assert sizes == [1 + 1 + len(CORPUS) + 1 + 1]
    made.ids([f"{head}another<|im_end|>\n<|im_start|>assistant\n"])
    assert sizes[1:] == [1], "system text and headers are remembered, questions are not"


def test_words_that_were_met_are_not_encoded_again() -> None:
    made = Segments(MADE["byte-level"])
    sizes = counted(made)
    made.ids(["<s>a bird, and another bird and\n a third."])
    # a, bird, the comma, and, another, and\n a, third, the full stop
    assert sizes == [8]
    made.ids(["another bird and a third,", "<s> bird"])
    assert sizes[1:] == [2], "another without, and a with a space in front"


def test_words_that_come_again_are_kept_and_all_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("myna.data.segments._REMEMBERED", 200)
    made = Segments(MADE["byte-level"])
    sizes = counted(made)
    for number in range(100):
        made.ids([f"bird number{number}x and"])
        assert sum(map(len, [*made._words, *made._older])) <= 2 * (200 + len("bird number99x and"))
    assert sizes[0] == 3 and sizes[-1] == 1, "bird and and are never encoded again"


def test_words_are_cut_where_that_is_known_to_be_right() -> None:
    cut = {name for name, tokenizer in MADE.items() if Segments(tokenizer)._cuts_at_words}
    words = {"words of Llama 3", "words of Qwen", "words of gpt-oss"}
    assert cut == {"byte-level", "overlapping", *words}


def changed(**parts: Any) -> Any:
    state = Tokenizer.from_str(STATES["byte"])
    for name, part in parts.items():
        setattr(state, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=state, eos_token="</s>")


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.NFKC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{L}+ \p{L}+"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        },
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ],
)
def test_words_are_not_cut_by_rules_that_are_not_known(parts: dict[str, Any]) -> None:
    tokenizer = changed(**parts)
    made = Segments(tokenizer)
    assert made.cuts and not made._cuts_at_words
    texts = ["<s>what is the capital of France", "a b"]
    assert made.ids(texts) == whole(tokenizer, texts)


def test_an_added_token_of_several_words_is_found() -> None:
    tokenizer = changed(normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("capital of", normalized=True)])
    assert not Segments(tokenizer)._cuts_at_words
    plain = changed()
    plain.add_tokens([AddedToken("capital of", normalized=True)])
    texts = ["the capital of France", "capital  of"]
    for made in (tokenizer, plain):
        assert Segments(made).ids(texts) == whole(made, texts)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myna.data.segments._REMEMBERED", 100)
    made = Segments(MADE["byte-level"])
    for number in range(50):
        made.ids([f"<s>text number {number}"] * 4)
        assert sum(len(piece) for _, piece in made._known) <= 100
    assert made._known


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_a_token_that_looks_beside_itself_ends_it(options: dict[str, bool]) -> None:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<eats>", normalized=False, **options)])
    made = Segments(tokenizer)
    assert not made.cuts
    texts = ["a <eats> b<s> <eats>c", "<s>"]
    assert made.ids(texts) == whole(tokenizer, texts)


def test_whole_texts_where_nothing_is_known_of_the_tokenizer() -> None:
    class Slow:
        is_fast = False

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            assert options["add_special_tokens"] is False
            return {"input_ids": [[ord(character) for character in text] for text in texts]}

    assert Segments(Slow()).ids(["ab", ""]) == [[97, 98], []]
    assert Segments(MADE["byte-level"], by_pieces=False).ids(["<s>a"]) == whole(
        MADE["byte-level"], ["<s>a"]
    )
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    assert not Segments(without).cuts and Segments(without).ids([]) == []


def test_a_tokenizer_that_tells_special_tokens_not_apart_is_not_cut() -> None:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="</s>")
    tokenizer.split_special_tokens = True
    assert not Segments(tokenizer).cuts


@pytest.mark.parametrize("at", [0, CHECKED_FIRST - 1, 64 * 10])
def test_a_difference_is_noticed(at: int) -> None:
    """A tokenizer whose class does something that its engine does not know."""

    class Odd(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, texts: list[str], **options: Any) -> Any:
            return super().__call__([text.replace("odd", "even") for text in texts], **options)

    tokenizer = Odd(tokenizer_object=Tokenizer.from_str(STATES["byte"]), eos_token="</s>")
    made = Segments(tokenizer)
    texts = ["<s>plain"] * at
    assert made.ids(texts) == whole(MADE["byte-level"], texts)
    with pytest.raises(SegmentsDiffer, match="odd"):
        made.ids(["<s>odd"])
