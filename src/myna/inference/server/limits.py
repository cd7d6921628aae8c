"""Limits: how much of everything one server takes before it says no.

Owns the numbers that a deployment may want other values of. What a single request may ask for
(choices, stop texts, tools …) is fixed, and stands with the fields in `requests.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds, numbers of requests."""

    body_bytes: int = 4 * 2**20
    """Largest request body; a longer one is answered 413 while it is still coming in."""
    header_bytes: int = 64 * 2**10
    """All headers of a request with its path; more is answered 431."""
    header_seconds: float = 20.0
    """A connection that has sent no whole request by then is closed."""
    bodies_bytes: int = 64 * 2**20
    """All bodies in memory together; a request beyond it is answered 503."""
    body_seconds: float = 30.0
    """Longest time a body may take to come in; then 408."""
    write_seconds: float = 60.0
    """A client that takes no byte for so long is disconnected."""
    keep_alive_seconds: int = 10
    """A connection without a request is closed after this."""
    connections: int = 4096
    """Open connections; further ones are answered 503."""
    waiting: int = 256
    """Answers that wait for their turn; a request whose answers would be more is answered 429."""
    retry_seconds: int = 1
    """What `Retry-After` says with 429 and 503."""
    batch: int = 64
    """Answers computed at once."""
    turn_seconds: float = 1.0
    """How long one adapter's requests go on being admitted while those of another one wait."""
    default_tokens: int = 512
    """Longest answer where a chat request names no length; the same as in `myna chat`."""
    default_completion_tokens: int = 16
    """The same for plain completions; OpenAI's value."""
    stop_seconds: float = 10.0
    """How long answers under way may take when the server is told to stop."""
