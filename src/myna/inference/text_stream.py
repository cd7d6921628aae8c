"""Text of an answer while its token ids are still arriving.

Owns one promise: the pieces, joined, are the decoded text of all ids, and no piece has to be taken
back. Ids come from `generate.py`; who shows the pieces is the caller's business.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_WINDOW = 64
"""Ids decoded together at most, or a few more: decoding all of a long answer takes longer with
every id."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of `ids` without control tokens, white space as the model wrote it."""
    # transformers' clean-up of " ," and " n't" is on in some published tokenizers; the model did
    # not write that text, and the next turn would send another one than was answered.
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence of ids decodes to one text"
    return text


class TextStream:
    """Decodes ids one by one; `push` and `finish` return the text that is certain by then.

    An id is never decoded alone: sentencepiece drops the space of a first word, which a word in
    the middle keeps. What is decoded anew each time is a window of the last ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._silent = frozenset(tokenizer.all_special_ids)
        self._window: list[int] = []
        self._sent = ""
        """As much of the window's text as was returned."""

    def push(self, token_id: int) -> str:
        """The further text that `token_id` makes certain; empty inside a character."""
        self._window.append(token_id)
        # A run of byte pieces decodes as a whole: one bad byte at its end turns good characters
        # before it into U+FFFD, so none of it is certain before the run is over. Control tokens
        # are left out before decoding and do not end it.
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._silent or (isinstance(piece, str) and _BYTE_PIECE.fullmatch(piece)):
            return ""
        text = decode(self._tokenizer, self._window)
        certain = text.rstrip(_REPLACEMENT)
        further = self._send(certain)
        if certain == text and len(self._window) >= _WINDOW:
            # Its last id stays, so that the next one does not come first.
            self._window = [token_id]
            self._sent = decode(self._tokenizer, self._window)
        return further

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        return self._send(decode(self._tokenizer, self._window))

    def _send(self, text: str) -> str:
        if len(text) <= len(self._sent):
            return ""
        assert text.startswith(self._sent), "a decoder took back text that was sent"
        further, self._sent = text[len(self._sent) :], text
        return further
