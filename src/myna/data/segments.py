"""Segments: token ids of many texts, each piece between control tokens encoded once.

Owns where a text may be cut without changing its ids, which pieces are remembered, and the check
that the result is the tokenizer's own. A fast tokenizer cuts every text at its added tokens before
it does anything else, so that what stands on one side of such a token does not see the other; what
all rows share in front of it (system text, headers), and a prompt that returns with its answer, is
then known already. Byte-level tokenizers cut what is between at words, too, of which most were met
before. Tokenizers of which neither can be said encode whole texts.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

CHECKED_FIRST = 200
"""Texts, from the first, that are encoded whole too."""

CHECKED_EVERY = 64
"""Of the texts after them, one in so many is."""

_REMEMBERED = 1_000_000
"""Characters of pieces; what is frequent comes back at once after all are forgotten."""

_LONGEST_WORD = 64
"""Characters of a word that is remembered at once."""

_FREQUENT = 3
"""Times that a piece is met in a call, to be remembered, or one of a hundred texts if that is more.
A prompt and the same with its answer are two."""

_WORDS = re.compile(r"(?<=[!-~])(?= [A-Za-z])|(?<=[A-Za-z])(?=[,.;:?!])")
"""Before a space that stands between a visible character and a letter, and between a letter and a
sign that is no apostrophe. None of the expressions below matches across such a place, or looks
back; so a match of theirs ends there, and the next begins."""

_EXPRESSIONS = (
    # cl100k, Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 to 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # o200k, gpt-oss
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""By which byte-level tokenizers find words, beside GPT-2's, which is built in."""


class SegmentsDiffer(Exception):
    """Pieces gave other ids than the whole text; nothing encoded by pieces is to be trusted."""


class Segments:
    """Texts to ids, as `tokenizer(texts, add_special_tokens=False)` gives them.

    Args:
        tokenizer: a transformers tokenizer.
        by_pieces: False encodes whole texts, whatever the tokenizer.
    """

    def __init__(self, tokenizer: Any, *, by_pieces: bool = True) -> None:
        self._tokenizer = tokenizer
        self._borders = _borders(tokenizer) if by_pieces else None
        self._known: dict[tuple[bool, str], list[int]] = {}
        self._known_size = 0
        self._words: dict[str, list[int]] = {}
        self._older: dict[str, list[int]] = {}
        self._words_size = 0
        self._num_texts = 0
        if self._borders is not None:
            self._backend = _backend(tokenizer)
            self._cuts_at_words = _finds_words(self._backend, tokenizer.added_tokens_decoder)
            self._border_ids = {
                token.content: id_
                for id_, token in tokenizer.added_tokens_decoder.items()
                if self._borders.fullmatch(token.content)
            }
            # Stands before pieces that do not begin their text; its id is taken off again. It must
            # not be the beginning of a longer token.
            self._anchor = next(
                token
                for token in self._border_ids
                if not any(other != token and other.startswith(token) for other in self._border_ids)
            )

    @property
    def cuts(self) -> bool:
        """Whether texts are encoded by pieces."""
        return self._borders is not None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without added special tokens.

        Raises:
            SegmentsDiffer: a checked text has other ids when it is encoded whole.
        """
        if self._borders is None:
            return self._whole(texts)
        cut = [self._borders.split(text) for text in texts]
        met = Counter(
            (at == 0, piece) for pieces in cut for at, piece in enumerate(pieces[::2]) if piece
        )
        ids_of = self._pieces(met, max(_FREQUENT, len(texts) // 100))
        found = [self._join(pieces, ids_of) for pieces in cut]
        self._check(texts, found)
        return found

    def _join(self, pieces: Sequence[str], ids_of: dict[tuple[bool, str], list[int]]) -> list[int]:
        """Ids of a text from its pieces (at even places) and control tokens (at odd ones)."""
        joined: list[int] = []
        for at, piece in enumerate(pieces):
            if at % 2:
                joined.append(self._border_ids[piece])
            elif piece:
                joined += ids_of[at == 0, piece]
        return joined

    def _pieces(
        self, met: Counter[tuple[bool, str]], frequent: int
    ) -> dict[tuple[bool, str], list[int]]:
        """Ids of each piece, by whether it begins its text."""
        ids_of = {key: self._known[key] for key in met if key in self._known}
        missing = [key for key in met if key not in ids_of]
        if self._cuts_at_words:
            encoded = self._by_words([piece for _, piece in missing])
        else:
            texts = [piece if first else self._anchor + piece for first, piece in missing]
            encoded = [
                ids if first else ids[1:]
                for (first, _), ids in zip(missing, self._engine(texts), strict=True)
            ]
        for key, ids in zip(missing, encoded, strict=True):
            ids_of[key] = ids
            if met[key] >= frequent:
                self._remember(key, ids)
        return ids_of

    def _by_words(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of pieces whose words do not see one another."""
        cut = [_WORDS.split(piece) for piece in pieces]
        unseen = set(chain.from_iterable(cut)).difference(self._words)
        again = unseen & self._older.keys()
        self._words.update((word, self._older[word]) for word in again)
        self._words_size += sum(map(len, again))
        strange = list(unseen - again)
        long: dict[str, list[int]] = {}
        for word, ids in zip(strange, self._engine(strange), strict=True):
            (self._words if len(word) <= _LONGEST_WORD else long)[word] = ids
            self._words_size += len(word)
        ids_of = (self._words | long).__getitem__ if long else self._words.__getitem__
        found = [list(chain.from_iterable(map(ids_of, words))) for words in cut]
        if self._words_size > _REMEMBERED:
            # Those that come again are taken over from the older ones, the others go with them.
            self._older, self._words, self._words_size = self._words, {}, 0
        return found

    def _engine(self, texts: list[str]) -> list[list[int]]:
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

    def _remember(self, key: tuple[bool, str], ids: list[int]) -> None:
        self._known_size += len(key[1])
        if self._known_size > _REMEMBERED:
            self._known, self._known_size = {}, len(key[1])
        self._known[key] = ids

    def _check(self, texts: Sequence[str], found: Sequence[Sequence[int]]) -> None:
        checked = [
            at
            for at in range(len(texts))
            if self._num_texts + at < CHECKED_FIRST or (self._num_texts + at) % CHECKED_EVERY == 0
        ]
        self._num_texts += len(texts)
        whole = self._whole([texts[at] for at in checked])
        for at, ids in zip(checked, whole, strict=True):
            if found[at] != ids:
                raise SegmentsDiffer(texts[at])

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _borders(tokenizer: Any) -> "re.Pattern[str] | None":
    """Matches the tokens at which a text may be cut; None where cutting could change ids.

    Of the added tokens, those not `normalized` are found first, in the text as it is, leftmost and
    then longest; where nothing is normalized, all are. They are borders if they neither take white
    space along (`lstrip`, `rstrip`) nor ask for a border of words (`single_word`).
    """
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return None
    normalizes = tokenizer.backend_tokenizer.normalizer is not None
    first = [
        token
        for token in tokenizer.added_tokens_decoder.values()
        if token.content and not (token.normalized and normalizes)
    ]
    if not first or any(token.lstrip or token.rstrip or token.single_word for token in first):
        return None
    longest_first = sorted({token.content for token in first}, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _backend(tokenizer: Any) -> Any:
    """A copy of the tokenizer's engine that neither cuts nor pads."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _finds_words(backend: Any, added: Mapping[int, Any]) -> bool:
    """Whether a byte-level BPE cuts at `_WORDS`, and what stands on one side ignores the other.

    A normalizer other than NFC, which composes nothing with a space, could write what is looked
    for; so could an added token that is looked for in normalized text.
    """
    from tokenizers.models import BPE

    if not isinstance(backend.model, BPE) or backend.pre_tokenizer is None:
        return False
    if backend.model.dropout or backend.model.end_of_word_suffix:
        return False
    if backend.normalizer is not None and (
        _state(backend.normalizer) != {"type": "NFC"}
        or any(token.normalized for token in added.values())
    ):
        return False
    state = _state(backend.pre_tokenizer)
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    known = [
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _EXPRESSIONS
        and step["behavior"] == "Isolated"
        and not step["invert"]
        for step in splits
    ]
    return all(known) and (last["use_regex"] or any(known))


def _state(part: Any) -> Any:
    """A part of the engine as tokenizer.json has it."""
    return json.loads(part.__getstate__())
