"""The listener: connections on a socket, until a signal ends it.

Owns what uvicorn is told, how long a connection may take to say what it wants, and the end: no new
connections, a while for the answers under way, then nothing waits any longer. What is answered is
the app's.
"""

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from myna.errors import ConfigError
from myna.inference.server.limits import Limits

_BACKLOG = 2048
_OTHER_FILES = 256
"""Files that are no connections: weights, tokenizers, pipes."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is a free one. Raises ConfigError with the system's reason."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # Connections inherit it. asyncio sets it for sockets that say their protocol only, and a
        # token would wait for the client's word on the one before it, 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}.\n"
            "  Choose another with --port; --port 0 takes a free one."
        ) from None


class Listener(Server):
    """Answers on one socket; `serve_forever` returns after `stop`, or after a signal."""

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        limits: Limits,
        *,
        ready: Callable[[], None],
        ending: Callable[[], None],
    ) -> None:
        super().__init__(
            Config(
                app,
                http=_protocol(limits),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_allow_connections(limits.connections),
                backlog=_BACKLOG,
                timeout_keep_alive=limits.keep_alive_seconds,
                # The engine ends what is left after stop_seconds, with a word to the client.
                timeout_graceful_shutdown=round(limits.stop_seconds) + 5,
                # Between the app's own limit and this, headers are answered 431; beyond it, 400.
                h11_max_incomplete_event_size=4 * limits.header_bytes,
            )
        )
        self._socket = sock
        self._ready = ready
        self._ending = ending

    def serve_forever(self) -> None:
        """Answer until the end is asked for."""
        asyncio.run(self.serve(sockets=[self._socket]))

    def stop(self) -> None:
        """Ask for the end, from any thread; asked twice, answers under way are not waited for."""
        if self.should_exit:
            self.force_exit = True
        else:
            self.should_exit = True
            self._ending()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets=sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server, and are not raised again once it has ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, lambda *_: self.stop())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)


def _allow_connections(wanted: int) -> int:
    """As many connections as the system lets this process have open, at most `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, soft - _OTHER_FILES)
    return wanted


def _protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, closing a connection that does not get to the end of its headers."""

    class Protocol(H11Protocol):
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # How the app cuts off a client that takes nothing: closing would wait for it.
            self.app_state = {**self.app_state, "abort": transport.abort}
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            requests_before = self.cycle
            super().data_received(data)
            if self.cycle is not requests_before:
                self._stop_watching()
            elif self._watch is None and self._is_idle():
                self._await_headers()

        def _is_idle(self) -> bool:
            return self.cycle is None or bool(self.cycle.response_complete)

        def _await_headers(self) -> None:
            self._watch = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def _stop_watching(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

    return Protocol


def serve_in_thread(app: ASGIApp, limits: Limits, host: str = "127.0.0.1") -> Any:
    """A server on a free port in a thread of its own: (address, stop), for programs and tests."""
    sock = open_socket(host, 0)
    started = threading.Event()
    listener = Listener(app, sock, limits, ready=started.set, ending=lambda: None)
    thread = threading.Thread(target=listener.serve_forever, name="myna-http", daemon=True)
    thread.start()
    assert started.wait(30), "the server did not start"

    def stop() -> None:
        listener.stop()
        thread.join()

    return f"http://{host}:{sock.getsockname()[1]}", stop
