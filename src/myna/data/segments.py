"""Segments: token ids of many texts, each piece between control tokens encoded once.

Owns where a text may be cut without changing its ids, which pieces are remembered, and the check
that the result is the tokenizer's own. A fast tokenizer cuts every text at its added tokens before
it does anything else, so that what stands on one side of such a token does not see the other; what
all rows share in front of it (system text, headers), and a prompt that returns with its answer, is
then known already. Tokenizers of which that cannot be said encode whole texts.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

CHECKED_FIRST = 200
"""Texts, from the first, that are encoded whole too."""

CHECKED_EVERY = 64
"""Of the texts after them, one in so many is."""

_REMEMBERED = 1_000_000
"""Characters of pieces; what is frequent comes back at once after all are forgotten."""

_FREQUENT = 3
"""Times that a piece is met in a call, to be remembered, or one of a hundred texts if that is more.
A prompt and the same with its answer are two."""


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
        self._num_texts = 0
        if self._borders is not None:
            self._backend = _backend(tokenizer)
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
        texts = [piece if first else self._anchor + piece for first, piece in missing]
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for key, each in zip(missing, encoded, strict=True):
            ids_of[key] = each.ids if key[0] else each.ids[1:]
            if met[key] >= frequent:
                self._remember(key, ids_of[key])
        return ids_of

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
