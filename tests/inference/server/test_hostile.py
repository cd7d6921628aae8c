"""A server among people who mean it harm: bodies, numbers, names, keys, hosts and connections.

Everything goes over HTTP to a real server on a tiny model. An audit hook watches this process, that
holds the server, for what it opens and whom it contacts. The long forms are those of the promises
(`SECURITY.md`); `benchmarks/serving.py` repeats them on a server in a process of its own.
"""

import http.client
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from hostile_requests import (
    CHAT,
    COMPLETIONS,
    FIRST_WORD,
    Client,
    Crowd,
    Received,
    Sent,
    as_path,
    fault_of,
    names,
    open_stream,
    read_until,
    requests,
    send_endless_body,
    wait_until,
)
from myna.inference.server.limits import Limits
from myna.inference.server.requests import ChatRequest, CompletionRequest
from served import CONTEXT, Served, make_runs, serve_engine, serve_runs

LIMITS = Limits(
    body_bytes=2**18,
    header_seconds=1.0,
    body_seconds=2.0,
    keep_alive_seconds=2,
    connections=6000,
    default_tokens=3,
    default_completion_tokens=3,
)
KEY = "a-key-of-this-test"
QUESTION = [{"role": "user", "content": "Hello?"}]
SCHEMAS = {
    CHAT: ChatRequest.model_json_schema(),
    COMPLETIONS: CompletionRequest.model_json_schema(),
}

_SEEN: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _SEEN is None:
        return
    if event == "open":
        _SEEN.append(f"open {arguments[0]!r}")
    elif event in ("socket.connect", "socket.sendto"):
        _SEEN.append(f"{event} {arguments[1]!r}")
    elif event == "socket.getaddrinfo" and arguments[0] == "127.0.0.1":
        return  # no name, and nobody is asked: what a client of this process connects to
    elif event in ("socket.getaddrinfo", "subprocess.Popen", "os.system"):
        _SEEN.append(f"{event} {arguments[0]!r}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What this process opens, contacts and starts meanwhile."""
    global _SEEN
    _SEEN = []
    try:
        yield _SEEN
    finally:
        _SEEN = None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(tmp_path_factory.mktemp("hostile"), "one", "two")


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[Served]:
    with serve_runs(runs, limits=LIMITS) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    opened = Client(server.host, server.port)
    yield opened
    opened.close()


def secrets_of(runs: list[Path]) -> list[str]:
    """Paths that no answer may tell."""
    return [str(runs[0].parents[1]), str(Path.home()), str(Path(__file__).parents[3]), sys.prefix]


# P23 and P29.


def fuzz(server: Served, runs: list[Path], trials: int) -> None:
    client = Client(server.host, server.port)
    secrets = secrets_of(runs)

    @settings(
        max_examples=trials,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(sent=requests(SCHEMAS, sorted(server.models)))
    def send(sent: Sent) -> None:
        answer = client.send("POST", sent.path, sent.body, sent.headers)
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        fault = fault_of(answer, secrets)
        assert fault is None, fault

    statuses: dict[int, int] = {}
    with watched() as seen:
        send()
    client.close()
    # The client is in this process too: it contacts the server, and nobody else.
    assert not [
        line
        for line in seen
        if "socket" in line and f"({server.host!r}, {server.port})" not in line
    ]
    assert not [line for line in seen if line.startswith(("subprocess", "os.system"))]
    assert statuses[200] > trials / 40, statuses
    assert statuses[400] > trials / 20, statuses


def test_malformed_bodies_are_answered_as_promised(server: Served, runs: list[Path]) -> None:
    fuzz(server, runs, trials=300)
    assert server.becomes_idle()


@pytest.mark.full
def test_ten_thousand_malformed_bodies(server: Served, runs: list[Path]) -> None:
    fuzz(server, runs, trials=10_000)
    assert server.becomes_idle()


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/cat.png", "https://localhost/x", "file:///etc/passwd", "data:,x"]
)
def test_pictures_are_refused_and_never_fetched(client: Client, url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"model": "one", "messages": [{"role": "user", "content": [part]}]}
    with watched() as seen:
        answer = client.post(CHAT, body)
    assert answer.status == 400
    assert "fetches nothing" in json.loads(answer.body)["error"]["message"]
    assert not [line for line in seen if "getaddrinfo" in line or "192.0.2.1" in line]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"model": "one", "model": "two"}', "occurs twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "4,300 digits"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b"null", "no object"),
    ],
)
def test_what_is_no_json_is_said_to_be_none(client: Client, body: bytes, reason: str) -> None:
    answer = client.send("POST", CHAT, body, {"Content-Type": "application/json"})
    assert answer.status == 400
    assert fault_of(answer) is None
    assert reason in json.loads(answer.body)["error"]["message"]


# P24.

NUMBERS: dict[str, list[tuple[str, Any, Any]]] = {
    CHAT: [
        ("max_tokens", 1, 2**20),
        ("max_completion_tokens", 1, 2**20),
        ("n", 1, 8),
        ("seed", 0, 2**63 - 1),
        ("temperature", 0, 2),
        ("top_p", 1e-300, 1),
        ("top_logprobs", 0, 20),
        ("presence_penalty", 0, 0),
        ("frequency_penalty", 0, 0),
    ],
    COMPLETIONS: [
        ("max_tokens", 1, 2**20),
        ("n", 1, 8),
        ("seed", 0, 2**63 - 1),
        ("temperature", 0, 2),
        ("top_p", 1e-300, 1),
        ("logprobs", 0, 20),
        ("best_of", 1, 1),
        ("presence_penalty", 0, 0),
        ("frequency_penalty", 0, 0),
    ],
}
"""Least and greatest value of every number that a request may hold."""


def numbers_in(schema: dict[str, Any]) -> set[str]:
    """Fields that may hold a number."""
    return {
        name
        for name, field in schema["properties"].items()
        if {"integer", "number"} & {part.get("type") for part in field.get("anyOf", [field])}
    }


def body_with(path: str, literals: dict[str, str]) -> bytes:
    """A valid request with some fields as literal JSON."""
    fields = {"model": '"one"', "max_tokens": "1"}
    if "max_completion_tokens" in literals:
        del fields["max_tokens"]
    if "top_logprobs" in literals:
        fields["logprobs"] = "true"
    name, value = ("messages", json.dumps(QUESTION)) if path == CHAT else ("prompt", '"Hello"')
    fields |= {name: value} | literals
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


def send_json(client: Client, path: str, body: bytes) -> Received:
    return client.send("POST", path, body, {"Content-Type": "application/json"})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_number_is_known_to_these_tests(path: str) -> None:
    assert numbers_in(SCHEMAS[path]) == {name for name, _, _ in NUMBERS[path]}


@pytest.mark.parametrize(
    ("path", "name", "least", "most"),
    [(path, *number) for path, numbers in NUMBERS.items() for number in numbers],
)
def test_every_number_is_bounded_on_both_sides(
    client: Client, path: str, name: str, least: Any, most: Any
) -> None:
    whole = isinstance(least, int) and name not in ("temperature", "presence_penalty")
    whole = whole and name != "frequency_penalty"
    step = 1 if whole else 1e-9
    # Values beyond the bounds, and those that are no number of this kind at all.
    bad = [json.dumps(most + step), json.dumps(least - step), "1e30", "-1e30", "NaN", "-Infinity"]
    bad += ["1e400", "-1e400", "9" * 31, "-" + "9" * 31, "true", "false", '"1"', "[1]", "{}"]
    bad += ["1.5"] if whole else []
    if name == "top_p":
        bad[1] = "0"
    for literal in bad:
        answer = send_json(client, path, body_with(path, {name: literal}))
        assert (answer.status, fault_of(answer)) == (400, None), (literal, answer.body)
        error = json.loads(answer.body)["error"]
        if literal not in ("NaN", "-Infinity") and "e400" not in literal:  # no JSON at all
            assert error["param"] == name, (literal, error)
    for value in (least, most):
        answer = send_json(client, path, body_with(path, {name: json.dumps(value)}))
        if most == 2**20 and value == most:  # the model's context is smaller
            assert json.loads(answer.body)["error"]["code"] == "context_length_exceeded"
            answer = send_json(client, path, body_with(path, {name: "3"}))
        assert answer.status == 200, (value, answer.body)


@pytest.mark.parametrize(
    ("field", "fits", "too_many"),
    [
        ("stop", ["x"] * 4, ["x"] * 5),
        ("stop", ["x" * 64], ["x" * 65]),
        ("stop", ["x"], [""]),
        ("messages", QUESTION, []),
        ("messages", QUESTION, QUESTION * 1025),
        (
            "tools",
            [{"type": "function", "function": {"name": "f"}}],
            [{"type": "function", "function": {"name": "f"}}] * 129,
        ),
    ],
)
def test_every_list_is_bounded(
    client: Client, field: str, fits: list[Any], too_many: list[Any]
) -> None:
    body = {"model": "one", "messages": QUESTION, "max_tokens": 1}
    assert client.post(CHAT, body | {field: fits}).status == 200
    answer = client.post(CHAT, body | {field: too_many})
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["param"].startswith(field)


def test_numbers_are_refused_before_the_prompt_is_read(client: Client) -> None:
    """The prompt is longer than the context too, which only its tokens would show."""
    long = [{"role": "user", "content": "x" * CONTEXT}]
    answer = client.post(CHAT, {"model": "one", "messages": long, "n": 9})
    assert json.loads(answer.body)["error"]["param"] == "n"
    answer = client.post(CHAT, {"model": "one", "messages": long})
    assert json.loads(answer.body)["error"]["code"] == "context_length_exceeded"


def test_a_regular_expression_of_a_client_is_not_taken(client: Client) -> None:
    form = {"type": "regex", "pattern": "(a+)+$"}
    body = {"model": "one", "messages": QUESTION, "response_format": form}
    assert client.post(CHAT, body).status == 400


# P25.


def test_a_body_is_refused_while_it_comes_in(server: Served) -> None:
    status, sent = send_endless_body(server.host, server.port, most_bytes=2**26)
    assert status == 413
    # No more than the limit was kept; what is in the sockets' buffers was sent all the same.
    assert sent < LIMITS.body_bytes + 2**23


def test_a_body_that_says_it_is_too_long_is_not_waited_for(server: Served) -> None:
    connection = socket.create_connection((server.host, server.port), timeout=20)
    length = LIMITS.body_bytes + 1
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n".encode()
    )
    assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 413 ")
    connection.close()


def test_headers_are_bounded(server: Served) -> None:
    for size, expected in ((LIMITS.header_bytes - 1000, 200), (LIMITS.header_bytes + 1000, 431)):
        client = Client(server.host, server.port)
        answer = client.send("GET", "/v1/models", headers={"X-Long": "x" * size})
        assert (answer.status, fault_of(answer)) == (expected, None)
        client.close()


def test_headers_without_an_end_are_cut_off(server: Served) -> None:
    connection = socket.create_connection((server.host, server.port), timeout=20)
    connection.sendall(b"GET / HTTP/1.1\r\nX-Long: ")
    sent = 0
    with pytest.raises(OSError):
        while sent < 2**26:
            connection.sendall(b"x" * 65536)
            sent += 65536
    connection.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def crowd(server: Served, idle: int, slow: int) -> None:
    client = Client(server.host, server.port)
    client.send("GET", "/healthz")
    before = descriptors()
    there = Crowd(server.host, server.port)
    there.join(idle, slow)
    assert client.send("GET", "/healthz").status == 200
    assert client.post(CHAT, {"model": "one", "messages": QUESTION, "max_tokens": 1}).status == 200

    def all_closed() -> bool:
        there.drip()
        return there.open_ones() == 0

    # Not one gets more time for its headers by sending them slowly.
    assert wait_until(all_closed, LIMITS.header_seconds + 20)
    assert client.send("GET", "/healthz").status == 200
    there.leave()
    assert wait_until(lambda: descriptors() <= before, 10), (descriptors(), before)
    client.close()


def test_idle_and_slow_connections_do_no_harm(server: Served) -> None:
    crowd(server, idle=50, slow=20)


@pytest.mark.full
def test_thousands_of_idle_and_slow_connections_do_no_harm(server: Served) -> None:
    crowd(server, idle=2000, slow=200)


def test_a_body_that_comes_slowly_is_cut_off(server: Served) -> None:
    connection = socket.create_connection((server.host, server.port), timeout=20)
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: 1000\r\n\r\n{{".encode()
    )
    assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 408 ")
    connection.close()


def test_a_full_queue_says_when_to_come_again(runs: list[Path]) -> None:
    with serve_runs(runs, limits=Limits(waiting=2, batch=1)) as small:
        body = {"model": "one", "messages": QUESTION, "max_tokens": 900, "temperature": 1.5}
        streams = [open_stream(small.host, small.port, body) for _ in range(6)]
        client = Client(small.host, small.port)
        assert wait_until(lambda: small.engine.load().waiting >= 2, 20)
        answer = client.post(CHAT, body | {"n": 8})
        assert (answer.status, fault_of(answer)) == (429, None)
        assert int(answer.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        assert small.becomes_idle()
        assert client.post(CHAT, body | {"max_tokens": 1}).status == 200
        client.close()


# P26.


def abort(server: Served, trials: int, at_once: int = 10) -> None:
    body = {"model": "one", "messages": QUESTION, "max_tokens": 900, "temperature": 1.0}
    for start in range(0, trials, at_once):
        model = ["one", "two"][start // at_once % 2]
        streams = [
            open_stream(server.host, server.port, body | {"model": model})
            for _ in range(start, min(start + at_once, trials))
        ]
        for number, stream in enumerate(streams):
            # Some go before the first word, some after it.
            if number % 2:
                read_until(stream, *FIRST_WORD)
            stream.close()
    assert server.becomes_idle(2.0), server.engine.load()


def test_answers_nobody_waits_for_are_not_computed(server: Served) -> None:
    before = descriptors()
    abort(server, trials=20)
    assert wait_until(lambda: descriptors() <= before, 10)


@pytest.mark.full
def test_a_thousand_answers_nobody_waits_for(server: Served) -> None:
    before = descriptors()
    abort(server, trials=1000)
    assert wait_until(lambda: descriptors() <= before, 10)


def test_an_answer_that_is_not_streamed_ends_with_its_client_too(server: Served) -> None:
    body = {"model": "one", "messages": QUESTION, "max_tokens": 900, "temperature": 1.0}
    data = json.dumps(body).encode()
    connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
    connection.request("POST", CHAT, data, {"Content-Type": "application/json"})
    assert wait_until(lambda: server.engine.load().running > 0, 20)
    connection.close()
    assert server.becomes_idle(2.0), server.engine.load()


def test_one_who_reads_nothing_holds_nobody_up(server: Served) -> None:
    body = {"model": "one", "messages": QUESTION, "max_tokens": 900, "temperature": 1.0, "n": 8}
    stalled = open_stream(server.host, server.port, body)
    client = Client(server.host, server.port)
    answer = client.post(CHAT, {"model": "one", "messages": QUESTION, "max_tokens": 2})
    assert answer.status == 200
    stalled.close()
    client.close()
    assert server.becomes_idle(5.0), server.engine.load()


# P27.


@pytest.fixture(scope="module")
def locked(server: Served) -> Iterator[Served]:
    with serve_engine(server.engine, limits=LIMITS, api_key=KEY) as served:
        yield served


def paths_of(served: Served) -> Iterator[tuple[str, str]]:
    """Every method of every route, and addresses that there are not."""
    for route in served.routes:
        for method in sorted(route.methods or ["GET"]):
            yield method, route.path.replace("{name}", "one")
    for path in ("/docs", "/openapi.json", "/redoc", "/v1", "/v1/", "/nothing", "//", "/%2e%2e/x"):
        yield "GET", path
    for path in ("/healthz/", "/healthz/..", "/HEALTHZ", "/healthz%2f..%2fv1/models", "/%00"):
        yield "GET", path
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "X"):
        yield method, "/v1/models"


def test_every_address_but_one_asks_for_the_key(locked: Served) -> None:
    addresses = list(paths_of(locked))
    assert {"/", "/healthz", "/metrics", "/v1/models", CHAT, COMPLETIONS} <= {
        path for _, path in addresses
    }
    keys = [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Bearer é"]
    keys += [f"Bearer  {KEY} x", f"Basic {KEY}"]
    for method, path in addresses:
        for key in keys if path == "/v1/models" else keys[:2]:
            client = Client(locked.host, locked.port)
            headers = {} if key is None else {"Authorization": key}
            try:
                answer = client.send(method, path, headers=headers)
            except ValueError:  # http.client does not send such a header
                continue
            finally:
                client.close()
            expected = 200 if path == "/healthz" else 401
            assert answer.status == expected, (method, path, key, answer)


def test_the_page_that_asks_for_the_key_is_shown_without_it(locked: Served) -> None:
    client = Client(locked.host, locked.port)
    answer = client.send("GET", "/")
    assert answer.status == 401
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert b"<title>myna</title>" in answer.body
    # A browser's own dialog would send the key with every request from then on, whoever made it.
    assert "www-authenticate" not in answer.headers
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    client.close()


def test_the_key_opens_and_a_second_one_does_not(locked: Served) -> None:
    client = Client(locked.host, locked.port, key=KEY)
    assert client.send("GET", "/v1/models").status == 200
    assert client.post(CHAT, {"model": "one", "messages": QUESTION}).status == 200
    client.close()
    connection = socket.create_connection((locked.host, locked.port), timeout=20)
    connection.sendall(
        f"GET /v1/models HTTP/1.1\r\nHost: {locked.host}\r\nAuthorization: Bearer wrong\r\n"
        f"Authorization: Bearer {KEY}\r\n\r\n".encode()
    )
    assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 401 ")
    connection.close()


def crafted(host: str, port: int) -> list[tuple[str, dict[str, str]]]:
    """50 requests as a page of another origin, or of a name that was rebound, makes them."""
    own = f"{host}:{port}"
    origins = [
        "http://evil.example",
        "https://evil.example",
        f"http://{host}",
        f"http://{host}:{port + 1}",
        f"https://{own}.evil.example",
        f"http://evil.example/{own}",
        f"http://evil.example#{own}",
        f"http://{own}@evil.example",
        f"file://{own}",
        f"chrome-extension://{own}",
        "null",
        "",
        "http://",
        own,
        f"http://{own}, http://evil.example",
        f"http://{own}/",
        "http://[::1]:1",
        "http://localhost",
        f"http://localhost:{port}",
        "*",
    ]
    hosts = [
        "evil.example",
        f"evil.example:{port}",
        f"{host}.evil.example",
        f"evil.example.{host}",
        "169.254.169.254",
        "0.0.0.0",
        f"0.0.0.0:{port}",
        "",
        "127.1",
        "2130706433",
        "0x7f000001",
        "[::ffff:127.0.0.1]",
        "localhost.evil.example",
        "localhost.",
        "127.0.0.1.nip.example",
    ]
    of_pages = [("origin", {"Host": own, "Origin": origin}) for origin in origins]
    rebound = [("host", {"Host": name}) for name in hosts]
    both = [("host", {"Host": name, "Origin": f"http://{name}"}) for name in hosts]
    return [*of_pages, *rebound, *both]


def test_pages_of_other_origins_change_nothing(server: Served) -> None:
    requests_made = crafted(server.host, server.port)
    assert len(requests_made) == 50
    body = json.dumps({"model": "one", "messages": QUESTION, "max_tokens": 1}).encode()
    before = server.answers()
    for _, headers in requests_made:
        connection = socket.create_connection((server.host, server.port), timeout=20)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\n{lines}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        answer = read_until(connection, b"\r\n\r\n")
        assert answer.split()[1] in (b"400", b"403"), (headers, answer)
        assert b"access-control" not in answer.lower()
        connection.close()
    assert server.answers() == before


def test_a_page_cannot_post_without_being_asked(client: Client) -> None:
    """Kinds that a form or a script of another origin may send without a preflight request."""
    body = json.dumps({"model": "one", "messages": QUESTION, "max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert client.send("POST", CHAT, body, {"Content-Type": kind}).status == 415
    answer = client.send("OPTIONS", CHAT, headers={"Access-Control-Request-Method": "POST"})
    assert answer.status == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


# P28.


def test_model_names_are_no_paths(client: Client, runs: list[Path]) -> None:
    absolute = str(runs[0] / "adapter")
    tried = names("one", absolute)
    assert len(set(tried)) == 500
    body: dict[str, Any] = {"messages": QUESTION, "max_tokens": 1}
    outside = secrets_of(runs)
    with watched() as seen:
        for name in tried:
            answer = client.post(CHAT, body | {"model": name})
            # A name too long to be one is a bad value, any other is one that nobody has.
            assert answer.status in (400, 404), (name, answer)
            assert fault_of(answer, [path for path in outside if path not in name]) is None, name
            answer = client.send("GET", as_path(name))
            if answer.status not in (200, 307):
                assert answer.status in (400, 404), (name, answer)
    assert not [line for line in seen if line.startswith("open ")], seen


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    with watched() as seen, socket.socket() as closed:
        (tmp_path / "file").write_text("x")
        closed.settimeout(1)
        with pytest.raises(OSError):
            closed.connect(("127.0.0.1", 9))
    assert any(line.startswith("open ") and "file" in line for line in seen)
    assert any(line.startswith("socket.connect") for line in seen)
