"""Replies: answers as OpenAI's clients read them, whole and piece by piece.

Owns the JSON of `/v1/chat/completions`, `/v1/completions` and `/v1/models`. What the answers are
comes from the engine, how they are sent is `app.py`'s.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from myna.inference.server.engine import Token, TokenLogprob

DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    """Why it ended."""
    num_tokens: int = 0


class Reply(Protocol):
    """How one of the two endpoints writes answers."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a stream for one choice, if there is one without text."""

    def chunk(
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        """A chunk of a stream: further text, or the reason for its end."""

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk, with the numbers of tokens."""


@dataclass(frozen=True)
class _Head:
    id: str
    created: int
    model: str
    prompt_tokens: int
    with_usage: bool
    """Chunks of a stream that ends with the numbers of tokens say that they have none."""
    with_logprobs: bool

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        drawn = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
        }

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body(kind, choices) | ({"usage": None} if self.with_usage else {})


class ChatReply(_Head):
    """`/v1/chat/completions`."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:  # noqa: D102  (Reply says it)
        entries = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.reason,
            }
            for choice in choices
        ]
        return self._body("chat.completion", entries) | {"usage": self._usage(choices)}

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: D102
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(  # noqa: D102
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return self._delta(index, delta, self._logprobs(tokens) if tokens else None, reason)

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:  # noqa: D102
        return self._body("chat.completion.chunk", []) | {"usage": self._usage(choices)}

    def _delta(
        self, index: int, delta: dict[str, str], logprobs: Any, reason: str | None
    ) -> dict[str, Any]:
        entry = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk("chat.completion.chunk", [entry])

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {
            "content": [
                _logprob(token.chosen)
                | {"top_logprobs": [_logprob(one) for one in token.likeliest]}
                for token in tokens
            ],
            "refusal": None,
        }


class CompletionReply(_Head):
    """`/v1/completions`."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:  # noqa: D102  (Reply says it)
        entries = [
            self._entry(choice.index, choice.text, choice.tokens, choice.reason)
            for choice in choices
        ]
        return self._body("text_completion", entries) | {"usage": self._usage(choices)}

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: D102
        return None

    def chunk(  # noqa: D102
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        return self._chunk("text_completion", [self._entry(index, text, tokens, reason)])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:  # noqa: D102
        return self._body("text_completion", []) | {"usage": self._usage(choices)}

    def _entry(
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.with_logprobs:
            logprobs = {
                "tokens": [token.chosen.text for token in tokens],
                "token_logprobs": [token.chosen.logprob for token in tokens],
                "top_logprobs": [
                    {one.text: one.logprob for one in token.likeliest} for token in tokens
                ],
                "text_offset": None,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def models_list(names: Iterable[str], created: int) -> dict[str, Any]:
    """The body of `/v1/models`."""
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """The body of `/v1/models/NAME`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "myna"}


def as_event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    # A token that is part of a character has no text of its own, and its bytes are not told.
    data = None if "\ufffd" in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": data}
