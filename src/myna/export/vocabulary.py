"""Vocabulary: a tokenizer as llama.cpp has to be told of it.

Owns which tokenizers llama.cpp reads as they are meant: byte-level BPE, whose rule for cutting text
into words it knows by a name only, and sentencepiece BPE, which it knows by the scores of pieces.
A tokenizer that it would read otherwise is refused with the reason: a model fed other ids answers
nonsense without an error. The file is `gguf.py`'s.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from myna.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, by llama.cpp's numbers."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_OWN = r"\p{Han}|\p{P}|\p{S}|\n"

_Step = tuple[Any, ...]
_GPT2_WORDS: _Step = ("ByteLevel", False, True)
"""Without a space put before the text, cut by GPT-2's rule."""
_BYTES_ONLY: _Step = ("ByteLevel", False, False)
_DIGITS: _Step = ("Digits", True)


def _split(pattern: str) -> _Step:
    return ("Split", pattern, "Isolated", False)


_NAMES: Mapping[tuple[_Step, ...], str] = {
    (_GPT2_WORDS,): "gpt-2",
    (_split(_LLAMA3), _BYTES_ONLY): "llama-bpe",
    (_split(_QWEN2), _BYTES_ONLY): "qwen2",
    (_DIGITS, _GPT2_WORDS): "smollm",
    # llama.cpp has no rule like it, and one that gives the same ids: see `_never_joins`.
    (_split(_OWN), _DIGITS, _GPT2_WORDS): "falcon",
}
"""How text is cut into words -> llama.cpp's name for it (`tokenizer.ggml.pre`)."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of a tokenizer."""

    model: str
    """`gpt2` for byte-level BPE, `llama` for sentencepiece BPE."""
    pre: str
    """How text is cut into words; `default` where it is not."""
    tokens: tuple[str, ...]
    """One for each row of the embedding."""
    kinds: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    space_first: bool | None = None
    """Whether a piece of text gets a space in front; None where the model does not ask."""
    notes: tuple[str, ...] = ()


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of `tokenizer` for a model with `rows` rows in its embedding.

    Raises ConfigError with the reason where llama.cpp would not give the same ids.
    """
    if not tokenizer.is_fast:
        raise _refusal(
            f"it is Python code ({type(tokenizer).__name__}) and not a tokenizer.json, so that its "
            "rules cannot be read"
        )
    backend: Any = tokenizer
    state: dict[str, Any] = json.loads(backend.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _refusal(
            f"its model is {model['type']}; byte-level and sentencepiece BPE can be written"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(f"its BPE has a {name}, which llama.cpp does not know")
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    for entry in added.values():
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if entry[flag]]:
            raise _refusal(
                f"its token {entry['content']!r} has {' and '.join(flags)} set, which llama.cpp "
                "does not do"
            )
    by_id = {number: text for text, number in model["vocab"].items()}
    largest = max([*by_id, *added])
    if largest >= rows:
        raise _refusal(
            f"it has a token with id {largest}, and the model has {rows:,} rows (ids 0 to "
            f"{rows - 1})"
        )
    steps = _steps(state["pre_tokenizer"])
    if any(step[0] == "ByteLevel" for step in steps):
        return _byte_level(state, steps, by_id, added, rows)
    return _sentencepiece(state, steps, by_id, added, rows)


def _byte_level(
    state: Mapping[str, Any],
    steps: tuple[_Step, ...],
    by_id: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    rows: int,
) -> Vocabulary:
    model = state["model"]
    merges = _pairs(model["merges"])
    notes: tuple[str, ...] = ()
    if (normalizer := state["normalizer"]) is not None:
        if normalizer["type"] != "NFC":
            raise _refusal(
                f"it changes texts first ({normalizer['type']}), which llama.cpp does not do"
            )
        notes = (
            "the tokenizer composes accents written as two characters (NFC) and llama.cpp does "
            "not: such texts get other ids there",
        )
    if model["byte_fallback"]:
        raise _refusal("it is byte-level and falls back to bytes as well")
    pre = _NAMES.get(steps)
    if not merges:
        pre = "gpt-2"  # nothing is joined, so that it does not matter where words end
    if pre is None:
        known = ", ".join(sorted(set(_NAMES.values())))
        raise _refusal(
            "it cuts text into words by a rule that is none of those known here by llama.cpp's "
            f"names ({known}): {_shown(steps)}"
        )
    if pre == "falcon" and (token := _joins(by_id, added)) is not None:
        raise _refusal(
            f"its token {token!r} joins what llama.cpp cuts elsewhere; its rule for words has no "
            "name there"
        )
    if merges and bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise _refusal(
            f"ignore_merges is {model.get('ignore_merges')}, and llama.cpp's rule {pre} has it the "
            "other way"
        )
    tokens, kinds = [], []
    for number in range(rows):
        text, kind = _token(number, by_id, added)
        tokens.append(text)
        kinds.append(kind)
    return Vocabulary(
        "gpt2",
        pre,
        tuple(tokens),
        tuple(kinds),
        # llama.cpp insists on merges; no text is ever in this form.
        merges=tuple(f"{left} {right}" for left, right in merges) or ("ĀĀ ĀĀ",),
        notes=notes,
    )


def _joins(by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> str | None:
    """A token over which a word of the package's own rule may end, and none of `falcon`; or None.

    Both rules cut by GPT-2's within what they isolate first: ours each Chinese character, sign,
    digit and newline, falcon's only runs of signs. Where they cut differently, one side is such a
    character or a space. So ids are the same if no token holds one of these beside anything else,
    but for one space before letters, which both leave there.
    """
    alphabet = _byte_of_character()
    for number, token in by_id.items():
        if number in added:
            continue
        raw = bytes(alphabet[character] for character in token)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            # Bytes of one character, or of the end of one and the beginning of the next.
            if len(raw) > 3 or any(byte < 0x80 for byte in raw) or _continues(raw):
                return token
            continue
        word = text.removeprefix(" ")
        if len(text) > 1 and (not word or any(map(_stands_alone, word))):
            return token
    return None


def _continues(raw: bytes) -> bool:
    """Whether a first byte of a character follows another byte."""
    return any(byte >= 0xC0 for byte in raw[1:])


def _stands_alone(character: str) -> bool:
    category = unicodedata.category(character)
    return (
        category[0] in "PSNZ"
        or character.isspace()
        or unicodedata.name(character, "").startswith(("CJK", "IDEOGRAPHIC", "VERTICAL IDEO"))
    )


def _sentencepiece(
    state: Mapping[str, Any],
    steps: tuple[_Step, ...],
    by_id: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    rows: int,
) -> Vocabulary:
    model = state["model"]
    if not model["byte_fallback"]:
        raise _refusal("it is neither byte-level nor falls back to bytes")
    if model.get("ignore_merges"):
        raise _refusal("ignore_merges is set, which llama.cpp does not do for such a model")
    space_first, notes = _spaces(state["normalizer"], steps)
    merges = _pairs(model["merges"])
    rank = _ranks(merges)
    pieces = {text for number, text in by_id.items() if number not in added}
    _check_all_splits(merges, rank, {text for text in pieces if not _is_byte(text)})
    tokens, kinds, scores = [], [], []
    for number in range(rows):
        text, kind = _token(number, by_id, added)
        if kind == NORMAL and _is_byte(text):
            kind = BYTE
        if text == model["unk_token"]:
            kind = UNKNOWN
        if kind == USER_DEFINED:
            text = text.replace("▁", " ")
        tokens.append(text)
        kinds.append(kind)
        # A whole number below 2^24 is exact in float32.
        scores.append(-float(rank.get(text, len(merges))) if kind == NORMAL else 0.0)
    return Vocabulary(
        "llama",
        "default",
        tuple(tokens),
        tuple(kinds),
        scores=tuple(scores),
        space_first=space_first,
        notes=notes,
    )


def _spaces(normalizer: Any, steps: tuple[_Step, ...]) -> tuple[bool, tuple[str, ...]]:
    """Whether a text, and one behind a control token, gets a space in front; and notes."""
    parts = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else None
    parts = parts if parts is not None else [normalizer] if normalizer is not None else []
    shapes = [_normalizer(part) for part in parts]
    replaces = ("Replace", " ", "▁")
    if not steps and shapes in ([("Prepend", "▁"), replaces], [replaces]):
        return len(shapes) == 2, ()
    if not shapes and len(steps) == 1 and steps[0][:2] == ("Metaspace", "▁") and not steps[0][3]:
        scheme = steps[0][2]
        if scheme == "first":
            return False, (
                "a text that does not begin with a control token gets no space in front in "
                "llama.cpp; prompts of the chat template are the same",
            )
        return scheme == "always", ()
    raise _refusal(
        f"it changes texts first in a way that llama.cpp does not: {_shown((*shapes, *steps))}"
    )


def _normalizer(part: Mapping[str, Any]) -> _Step:
    if part["type"] == "Prepend":
        return ("Prepend", part["prepend"])
    if part["type"] == "Replace":
        return ("Replace", part["pattern"].get("String"), part["content"])
    return (part["type"],)


def _steps(pre_tokenizer: Any) -> tuple[_Step, ...]:
    """What is done to a text in turn, with what decides it."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "Split":
        pattern = pre_tokenizer["pattern"]
        text = pattern.get("Regex", pattern.get("String"))
        return (("Split", text, pre_tokenizer["behavior"], pre_tokenizer["invert"]),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    if kind == "ByteLevel":
        return (("ByteLevel", pre_tokenizer["add_prefix_space"], pre_tokenizer["use_regex"]),)
    if kind == "Metaspace":
        return (
            (
                "Metaspace",
                pre_tokenizer["replacement"],
                pre_tokenizer["prepend_scheme"],
                pre_tokenizer["split"],
            ),
        )
    return ((kind,),)


def _pairs(merges: Iterable[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges as older and newer files write them."""
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def _ranks(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Piece -> the place at which it is made; ConfigError unless a piece has one place only."""
    rank: dict[str, int] = {}
    last = None
    for number, (left, right) in enumerate(merges):
        piece = left + right
        if piece != last and piece in rank:
            raise _refusal(
                f"it makes the piece {piece!r} at two places among its merges, and llama.cpp has "
                "one score for each piece"
            )
        rank.setdefault(piece, number)
        last = piece
    return rank


def _check_all_splits(
    merges: Sequence[tuple[str, str]], rank: Mapping[str, int], pieces: set[str]
) -> None:
    """Refuse a BPE without a merge that llama.cpp would make: any two pieces that make a third."""
    present = set(merges)
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in pieces and pair[1] in pieces and pair not in present:
                raise _refusal(
                    f"it does not join {pair[0]!r} and {pair[1]!r}, which llama.cpp would, since "
                    f"{piece!r} is a piece"
                )


def _token(
    number: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]
) -> tuple[str, int]:
    if (entry := added.get(number)) is not None:
        return str(entry["content"]), CONTROL if entry["special"] else USER_DEFINED
    if number in by_id:
        return by_id[number], NORMAL
    return f"[PAD{number}]", UNUSED


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _byte_of_character() -> dict[str, int]:
    """Of the characters that byte-level vocabularies write bytes as (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


def _shown(steps: Sequence[_Step]) -> str:
    return " then ".join("(" + ", ".join(map(repr, step)) + ")" for step in steps) or "nothing"


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"The tokenizer cannot be written for llama.cpp: {reason}.\n"
        "  With other ids the model would answer nonsense, so nothing was written. `myna merge` "
        "writes a folder that transformers and vLLM load."
    )
