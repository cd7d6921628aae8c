"""Who is let in, and what is refused before it is read."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI
from starlette.routing import Route

from myna.inference.server.app import create_app
from myna.inference.server.limits import Limits
from myna.inference.server.listener import serve_in_thread

from .conftest import Served

KEY = "sk-a-key"
SMALL = Limits(body_bytes=2_000, header_bytes=4_000, body_seconds=0.4, header_seconds=0.4)


def request(
    address: str, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=named)
        response = connection.getresponse()
        return response.status, response.read(), response
    finally:
        connection.close()


def get(address: str, path: str, **headers: str) -> tuple[int, bytes]:
    return request(address, "GET", path, **headers)[:2]


@pytest.fixture(scope="module")
def locked(served: Served) -> Iterator[str]:
    """The same engine behind a key and small limits."""
    address, stop = serve_in_thread(create_app(served.engine, api_key=KEY, limits=SMALL), SMALL)
    yield address
    stop()


def test_nothing_but_health_is_answered_without_the_key(served: Served, locked: str) -> None:
    app = create_app(served.engine, api_key=KEY)
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    assert "/v1/chat/completions" in paths
    paths += ["/docs", "/openapi.json", "/redoc", "/v1", "/nothing", "/v1/models/huan", "//healthz"]
    wrong = [{}, {"Authorization": "Bearer sk-a-kez"}, {"Authorization": KEY}]
    wrong += [{"Authorization": "Bearer "}, {"Authorization": "Basic ****"}]
    for path in paths:
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            for headers in wrong:
                status, body, _ = request(locked, method, path, **headers)
                if path == "/healthz":
                    assert status != 401
                    continue
                assert status == 401, (method, path, headers)
                if method != "HEAD" and (method, path) != ("GET", "/"):
                    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert get(locked, "/healthz") == (200, b"ok\n")


def test_the_key_lets_in(locked: str) -> None:
    with OpenAI(base_url=f"{locked}/v1", api_key=KEY) as client:
        assert len(list(client.models.list())) == 3
    with (
        OpenAI(base_url=f"{locked}/v1", api_key="other") as client,
        pytest.raises(openai.AuthenticationError, match="No valid API key"),
    ):
        client.models.list()


def test_the_page_may_run_only_what_stands_in_it(served: Served) -> None:
    status, _, response = request(served.address, "GET", "/")
    policy = response.headers["Content-Security-Policy"]
    assert status == 200
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil", "", "a@b"])
def test_other_hosts_are_refused(served: Served, host: str) -> None:
    status, body = get(served.address, "/v1/models", Host=host)
    assert status == 403
    assert json.loads(body)["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "file://"])
def test_pages_of_other_origins_are_refused(served: Served, origin: str) -> None:
    status, body = get(served.address, "/v1/models", Origin=origin)
    assert status == 403
    assert json.loads(body)["error"]["code"] == "origin_not_allowed"
    own = served.address
    assert get(served.address, "/v1/models", Origin=own)[0] == 200


def test_a_body_that_is_no_json_by_its_type_is_refused(served: Served) -> None:
    status, body, _ = request(
        served.address, "POST", "/v1/chat/completions", b"{}", Content_Type="text/plain"
    )
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")


def test_a_long_body_is_refused_by_its_length_and_while_it_comes_in(locked: str) -> None:
    status, body, _ = request(
        locked, "POST", "/v1/chat/completions", b"x" * 3_000, Authorization=f"Bearer {KEY}"
    )
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    with raw(locked) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
            + KEY.encode()
            + b"\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(3):
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        # It never ends, and is answered all the same.
        assert b" 413 " in connection.recv(100)


def test_bodies_are_bounded_together(served: Served) -> None:
    limits = Limits(body_bytes=2_000, bodies_bytes=3_000, body_seconds=5)
    address, stop = serve_in_thread(create_app(served.engine, limits=limits), limits)
    body = b'{"model": "base", "prompt": "' + b"x" * 1_800 + b'"}'
    path, kind = "/v1/completions", {"Content_Type": "application/json"}
    with raw(address) as holder:
        holder.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n"
            b"Content-Type: application/json\r\n\r\n" + b"x" * 1_900
        )
        deadline = time.monotonic() + 60
        status = None
        while status != 503 and time.monotonic() < deadline:
            status, said, response = request(address, "POST", path, body, **kind)
        assert (status, json.loads(said)["error"]["code"]) == (503, "overloaded")
        assert response.headers["Retry-After"] == "1"
    while status != 400 and time.monotonic() < deadline:  # too long for the model, but read
        status, _, _ = request(address, "POST", path, body, **kind)
    assert status == 400
    stop()


def test_long_headers_are_refused(locked: str) -> None:
    status, body, _ = request(locked, "GET", "/healthz", Cookie="x" * 5_000)
    assert (status, json.loads(body)["error"]["code"]) == (431, "headers_too_long")


def test_a_slow_body_is_answered_and_a_slow_head_is_cut_off(locked: str) -> None:
    with raw(locked) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer "
            + KEY.encode()
            + b"\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(100)
    with raw(locked) as connection:
        begun = time.monotonic()
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHo")
        with pytest.raises(ConnectionError):
            assert connection.recv(100) == b""
            raise ConnectionResetError
        assert 0.3 < time.monotonic() - begun < 5


def raw(address: str) -> socket.socket:
    where = urlsplit(address)
    connection = socket.create_connection((where.hostname, where.port), timeout=10)
    return connection


def test_unknown_addresses_and_methods_are_answered_in_the_same_shape(served: Served) -> None:
    status, body = get(served.address, "/v1/nothing")
    assert (status, json.loads(body)["error"]["message"]) == (
        404,
        "There is nothing at this address.",
    )
    assert get(served.address, "/v1/models/")[0] == 404
    assert get(served.address, "/v1/chat/completions")[0] == 405
    assert get(served.address, "/v1/models/..%2f..%2fetc%2fpasswd")[0] == 404
