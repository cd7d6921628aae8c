"""Guards: what is refused before a request is read, and what is cut off while it is.

Owns the API key, which hosts and origins a request may name, the sizes of headers and body, and
how long a client may take to send and to receive. It stands before the routes: nothing, known path
or not, is reached without passing it.
"""

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Iterator, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from myna.inference.server.api_error import ApiError
from myna.inference.server.limits import Limits

OPEN_PATHS = ("/healthz",)
"""Answered without a key."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_LINGER_BYTES, _LINGER_SECONDS = 2**24, 2.0
"""How much of a refused body is read and thrown away, so that its sender gets to the answer."""


class Gone(BaseException):
    """The client left or was cut off: there is nobody to tell, and nothing to log."""


class Guard:
    """Passes on what may pass.

    `hosts` are the names that the `Host` header may have, without a port; None: any. A page that
    makes its own name point at this machine (DNS rebinding) is refused by it. `front` is what `/`
    answers to those without the key, with status 401: the page that asks for it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        hosts: Sequence[str] | None,
        limits: Limits,
        front: ASGIApp,
    ) -> None:
        self._app = app
        self._key = api_key.encode() if api_key is not None else None
        self._hosts = frozenset(hosts) if hosts is not None else None
        self._limits = limits
        self._front = front
        self._held_bytes = 0
        """Bytes of the bodies of all requests under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request, or let the app answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = _Client(scope, receive, send, self._limits, self._hold)
        with contextlib.suppress(Gone), client.counted():
            try:
                self._check(scope)
            except ApiError as refusal:
                # A browser has to be shown where its user can give the key.
                asks = refusal.status == 401 and scope["path"] == "/" and scope["method"] == "GET"
                answer = self._front if asks else error_response(refusal)
                await answer(scope, client.receive, client.send)
            else:
                await self._app(scope, client.receive, client.send)

    def _hold(self, num_bytes: int) -> None:
        """Note that more is in memory, or less. Raises ApiError where that is too much."""
        self._held_bytes += num_bytes
        if num_bytes > 0 and self._held_bytes > self._limits.bodies_bytes:
            raise ApiError(
                503,
                "Too many long requests are being answered; ask again in a moment.",
                code="overloaded",
                headers={"Retry-After": str(self._limits.retry_seconds)},
            )

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        if size > self._limits.header_bytes:
            raise ApiError(
                431,
                f"The headers are longer than {self._limits.header_bytes:,} bytes.",
                code="headers_too_long",
            )
        self._check_host(_only(headers, b"host"), _only(headers, b"origin"))
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            self._check_key(_only(headers, b"authorization"))
        length = _only(headers, b"content-length")
        if length is not None and length.isdigit() and int(length) > self._limits.body_bytes:
            raise too_large(self._limits)

    def _check_host(self, host: bytes | None, origin: bytes | None) -> None:
        name = (host or b"").decode("latin-1").lower()
        if self._hosts is not None and _without_port(name) not in self._hosts:
            raise ApiError(
                403,
                "The Host header names a host that this server does not answer for.",
                code="host_not_allowed",
            )
        if origin is not None:
            scheme, separator, rest = origin.decode("latin-1").lower().partition("://")
            if not separator or scheme not in ("http", "https") or rest != name:
                raise ApiError(
                    403,
                    "Pages of other origins may not use this server.",
                    code="origin_not_allowed",
                )

    def _check_key(self, authorization: bytes | None) -> None:
        assert self._key is not None, "only asked where there is one"
        if not hmac.compare_digest(_given_key(authorization), self._key):
            raise ApiError(
                401,
                "No valid API key; expected the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Client:
    """The two directions of a connection, held to the limits."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limits: Limits,
        hold: Callable[[int], None],
    ) -> None:
        self._scope = scope
        self._hold = hold
        self._receive = receive
        self._send = send
        self._limits = limits
        self._read = 0
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._whole = _only(headers, b"transfer-encoding") is None and (
            _only(headers, b"content-length") in (None, b"0")
        )
        """Whether nothing of the body is still to come."""
        self._lingers = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside the block what was read counts as held."""
        try:
            yield
        finally:
            self._hold(-self._read)

    async def receive(self) -> Message:
        """As ASGI's, raising ApiError for a body that is too long or too slow."""
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._next_part()
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not come in within {self._limits.body_seconds:g} seconds.",
                code="body_too_slow",
            ) from None
        if message["type"] == "http.disconnect":
            raise Gone
        if self._read > self._limits.body_bytes:
            raise too_large(self._limits)
        self._hold(len(message.get("body", b"")))
        return message

    async def send(self, message: Message) -> None:
        """As ASGI's, cutting off a client that does not take what it asked for."""
        if message["type"] == "http.response.start":
            # What is left of a body that nobody wanted would be taken for the next request.
            self._lingers = not self._whole
            closing = [(b"connection", b"close")] if self._lingers else []
            message = {**message, "headers": [*message["headers"], *_HEADERS, *closing]}
        elif self._lingers and not message.get("more_body", False):
            await self._pass_on({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limits.write_seconds):
                await self._send(message)
        except TimeoutError:
            abort = self._scope.get("state", {}).get("abort")
            if abort is not None:
                abort()
                await asyncio.sleep(0)
            raise Gone from None

    async def _next_part(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        return message

    async def _linger(self) -> None:
        """Throw away a little of the body: closed at once, the client could lose the answer."""
        most = self._read + _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self._whole and self._read < most:
                    await self._next_part()


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


def error_response(error: ApiError) -> JSONResponse:
    """The answer that tells an error."""
    return JSONResponse(error.as_json(), status_code=error.status, headers=error.headers)


def too_large(limits: Limits) -> ApiError:
    """The answer to a body beyond the limit."""
    return ApiError(
        413, f"The body is longer than {limits.body_bytes:,} bytes.", code="body_too_large"
    )


def _given_key(authorization: bytes | None) -> bytes:
    """The bearer token in an `Authorization` header; empty where there is none."""
    scheme, _, rest = (authorization or b"").partition(b" ")
    return rest.strip() if scheme.lower() == b"bearer" else b""


def _only(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The value of a header; one that stands there twice counts as none of them."""
    values = [value for key, value in headers if key == name]
    return values[0] if len(values) == 1 else (b"" if values else None)


def _without_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return name if separator and port.isdigit() else host
