"""What the HTTP side asks of whoever computes answers, and what it is told meanwhile.

Owns the border between the two: a task goes in, events come out, from another thread, until the
last one. `batching.py` is the engine there is; nothing here computes or knows HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker


@dataclass(frozen=True)
class Task:
    """One answer that is wanted."""

    model: str
    """A name in `Engine.models`."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    logprobs: int | None = None
    """How many of the likeliest ids are told with each token; None: no log-probabilities at all."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token and its log-probability under the model, before temperature and top-p."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of the answer with the likeliest ones in its place."""

    chosen: TokenLogprob
    likeliest: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Piece:
    """Further text of an answer."""

    text: str
    tokens: tuple[Token, ...] = ()
    """Those that arrived since the last piece, where log-probabilities were asked for."""


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: Literal["stop", "length"]
    """The model or a stop text ended it, or its limit."""
    num_tokens: int
    """Tokens that were drawn, a stop id included."""
    text: str
    """The whole answer."""


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it; `text` says why, as a client may read it."""

    text: str


Event = Piece | Finished | Failed
"""`Finished` and `Failed` are the last of an answer."""


class Busy(Exception):
    """There is no room for further answers at the moment."""


class Stopping(Exception):
    """The server is about to end and takes nothing more."""


@dataclass(frozen=True)
class Load:
    """How many answers wait and how many are being computed."""

    waiting: int
    running: int


class Ticket(Protocol):
    """The answers of one request, under way."""

    def cancel(self) -> None:
        """End them after the token in work. From any thread, any number of times.

        For answers that have ended it does nothing.
        """


class Engine(Protocol):
    """Computes answers of models that share one base."""

    @property
    def models(self) -> Mapping[str, Speaker]:
        """By the name that clients send; `base` is always one of them."""

    def submit(self, tasks: Sequence[Task], tell: Callable[[int, Event], None]) -> Ticket:
        """Put all of `tasks` into the queue, or none.

        `tell` is called with the number of a task and an event, from another thread; it has to
        return at once and may not raise. Raises Busy and Stopping.
        """

    def load(self) -> Load:
        """What there is to do at the moment."""
