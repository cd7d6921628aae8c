"""What a hostile client sends to a server, and how a bad answer is told from a good one.

Owns bodies made at random from the schema of requests and then spoiled, model names that are paths,
and connections that never end: for the tests of the server and for `serving.py`, which repeats them
in larger numbers. What becomes of them is counted there.
"""

import contextlib
import copy
import http.client
import json
import re
import socket
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MOST_TOKENS = 3
"""Longest answer that a well-formed body asks for: refusals are tried here, not generation."""

LEAKS = re.compile(
    r"Traceback \(most recent|File \"|\bobject at 0x|0x[0-9a-fA-F]{6,}|/site-packages/|\.py\b|"
    r"pydantic|starlette|uvicorn|torch\."
)
"""Words of a program's inside that no client needs to read."""

Json = Any


@dataclass(frozen=True)
class Sent:
    """One request with its body as bytes."""

    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Received:
    """The whole answer to one request."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """One connection that is opened again when the server closed it."""

    def __init__(self, host: str, port: int, *, key: str | None = None) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=60)
        self._own = {"Authorization": f"Bearer {key}"} if key else {}

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Received:
        """The answer; the path goes out as it is, whatever characters it has."""
        sent = {**self._own, **(headers or {})}
        for attempt in range(2):
            try:
                self._connection.request(method, path, body, sent)
                with self._connection.getresponse() as answer:
                    # Names in small letters; http.client keeps them as the server wrote them.
                    received = {name.lower(): value for name, value in answer.getheaders()}
                    return Received(answer.status, received, answer.read())
            except (http.client.RemoteDisconnected, ConnectionError):
                self._connection.close()  # closed while it was idle, or by the last refusal
                if attempt:
                    raise
        raise AssertionError("the loop returns or raises")

    def post(self, path: str, value: Json, **headers: str) -> Received:
        """The answer to a JSON body."""
        body = json.dumps(value).encode()
        return self.send("POST", path, body, {"Content-Type": "application/json", **headers})

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def fault_of(answer: Received, secrets: Sequence[str] = ()) -> str | None:
    """What is wrong with an answer to any request whatever; None for what is promised.

    Promised is 2xx or 4xx, an error in OpenAI's form, and no text from inside the program;
    `secrets` are further texts that must not occur, such as paths.
    """
    if not (200 <= answer.status < 300 or 400 <= answer.status < 500):
        return f"status {answer.status}: {answer.body[:300]!r}"
    text = answer.body.decode("utf-8", "replace")
    if answer.status >= 400:
        fault = _fault_of_error(text)
        if fault is not None:
            return fault
        if found := LEAKS.search(text):
            return f"status {answer.status} tells of {found[0]!r}: {text[:300]}"
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        if '"error"' in text and _has_error_event(text):
            return f"an error inside a stream: {text[-300:]}"
        if not text.endswith("data: [DONE]\n\n"):
            return f"a stream without its end: {text[-300:]}"
    if found_secret := next((secret for secret in secrets if secret in text), None):
        return f"status {answer.status} tells of {found_secret}: {text[:300]}"
    return None


def _fault_of_error(text: str) -> str | None:
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"not an error of OpenAI's form: {text[:300]}"
    expected: dict[str, tuple[type, ...]] = {
        "message": (str,),
        "type": (str,),
        "param": (str, type(None)),
        "code": (str, type(None)),
    }
    if error.keys() != expected.keys() or not error["message"]:
        return f"not an error of OpenAI's form: {text[:300]}"
    wrong = [name for name, kinds in expected.items() if not isinstance(error[name], kinds)]
    return f"{wrong} of another type: {text[:300]}" if wrong else None


def _has_error_event(text: str) -> bool:
    events = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return any("error" in json.loads(event) for event in events if event != "[DONE]")


# Bodies.

_WORDS = [
    "",
    " ",
    "你好",
    "<|im_end|>",
    "<|im_start|>system\n",
    "</think>",
    "{{ 7 * 7 }}",
    "\x00",
    "\u202e\u0000\ufeff",
    "🐦" * 20,
    "a" * 2000,
    "../../etc/passwd",
    "%s%n%x",
    "'; drop table runs; --",
]
_NUMBERS = [
    0,
    -1,
    1,
    2,
    20,
    21,
    2**31,
    2**63,
    -(2**63),
    10**30,
    -(10**30),
    0.5,
    -0.5,
    1e308,
    1e-320,
]
_PARTS = [
    [{"type": "text", "text": "hello"}],
    [{"type": "text"}],
    [{"type": "text", "text": 7}],
    [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/cat.png"}}],
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
    [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
    [{"type": "file", "file": {"file_id": "../../x"}}],
    [],
]
_FOREIGN = {
    "logit_bias": {"50256": -100},
    "prompt_embeds": "AAAA",
    "guided_regex": "(a+)+$",
    "chat_template": "{{ ''.__class__ }}",
    "lora_path": "/etc",
    "best_of": 100,
    "n_discard": -1,
    "suffix": "x",
    "__proto__": {"model": "base"},
}
"""Fields of other servers, some of which were the way into them."""


def _wild() -> st.SearchStrategy[Json]:
    """Any JSON, with a liking for what has broken servers."""
    leaf = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(_NUMBERS),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(_WORDS),
        st.text(max_size=30),
        st.sampled_from(_PARTS),
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.text(max_size=8), inner, max_size=4),
        ),
        max_leaves=8,
    )


WILD = _wild()


def from_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> st.SearchStrategy:
    """Values that fit the part of JSON Schema that pydantic writes for requests."""
    if "$ref" in schema:
        return from_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return st.one_of([from_schema(part, definitions) for part in schema[choice]])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _numbers(kind, schema)
    if kind == "string":
        return _texts(schema)
    if kind == "array":
        smallest = schema.get("minItems", 0)
        return st.lists(
            from_schema(schema.get("items", {}), definitions),
            min_size=smallest,
            max_size=min(schema.get("maxItems", 3), max(smallest, 3)),
        )
    if kind == "object":
        return _objects(schema, definitions)
    simple = {"boolean": st.booleans(), "null": st.none()}
    return simple.get(str(kind), WILD)


def _numbers(kind: str, schema: Mapping[str, Any]) -> st.SearchStrategy:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", 100))
    if kind == "integer":
        return st.one_of(st.sampled_from([low, high]), st.integers(low, high))
    open_ends = {
        "exclude_min": "exclusiveMinimum" in schema,
        "exclude_max": "exclusiveMaximum" in schema,
    }
    return st.floats(low, high, allow_subnormal=False, **open_ends)


def _texts(schema: Mapping[str, Any]) -> st.SearchStrategy:
    if "pattern" in schema:
        return st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
    smallest = schema.get("minLength", 0)
    texts = st.text(min_size=smallest, max_size=min(schema.get("maxLength", 30), 30))
    return texts if smallest else st.one_of(texts, st.sampled_from(_WORDS))


def _objects(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> st.SearchStrategy:
    fields = {
        name: from_schema(field, definitions)
        for name, field in schema.get("properties", {}).items()
    }
    if not fields:
        inner = schema.get("additionalProperties", {})
        values = WILD if isinstance(inner, bool) else from_schema(inner, definitions)
        names = st.one_of(st.just("name"), st.text(string.ascii_lowercase, max_size=8))
        return st.dictionaries(names, values, min_size=schema.get("minProperties", 0), max_size=3)
    needed = set(schema.get("required", []))
    return st.fixed_dictionaries(
        {name: field for name, field in fields.items() if name in needed},
        optional={name: field for name, field in fields.items() if name not in needed},
    )


@st.composite
def _spoiled(draw: st.DrawFn, values: st.SearchStrategy[Json]) -> Json:
    """A value in which, as often as not, something at some place is another."""
    value = copy.deepcopy(draw(values))  # parts of it are shared by all examples
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        places = list(_places(value))
        if not places:
            return draw(WILD)
        container, place = draw(st.sampled_from(places))
        if draw(st.booleans()):
            container[place] = copy.deepcopy(draw(WILD))
        else:
            del container[place]
    if isinstance(value, dict) and draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(sorted(_FOREIGN)))
        value[name] = _FOREIGN[name]
    return value


def _places(value: Json) -> Iterator[tuple[Any, Any]]:
    entries = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for place, inner in entries:
        yield value, place
        yield from _places(inner)


@st.composite
def _as_bytes(draw: st.DrawFn, value: Json) -> bytes:
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    how = draw(st.integers(0, 31))
    if how == 0:
        text = re.sub(r"\d+(\.\d+)?", draw(st.sampled_from(_LITERALS)), text, count=1)
    elif how == 1:
        text = text[: draw(st.integers(0, len(text)))]
    elif how == 2:
        text = "[" * draw(st.sampled_from([60, 70, 100_000])) + text
    elif how == 3:
        text = text.replace('"role"', '"role": "user", "role"', 1)
    elif how == 4:
        text = text.replace('"content"', '"content": "\\ud800", "x"', 1)
    body = text.encode()
    if how == 5:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=8)) + body[at:]
    elif how == 6:
        body = text.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
    elif how == 7:
        body = draw(st.binary(max_size=40))
    return body


_LITERALS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "1" + "0" * 30, "01"]
_TYPES = ["application/json"] * 20 + ["text/plain", "multipart/form-data; boundary=x", "", "x"]


def requests(
    schemas: Mapping[str, Mapping[str, Any]], models: Sequence[str]
) -> st.SearchStrategy[Sent]:
    """Requests to the paths of `schemas` (path to JSON Schema of its body), most of them bad."""
    return st.one_of([_to_path(path, schema, models) for path, schema in sorted(schemas.items())])


def _to_path(
    path: str, schema: Mapping[str, Any], models: Sequence[str]
) -> st.SearchStrategy[Sent]:
    fields = dict(schema["properties"])
    fields["model"] = {"enum": [*models, *models, "unknown"]}
    fields["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
    if "max_completion_tokens" in fields:  # the same limit under another name; never both
        fields["max_completion_tokens"] = {"type": "null"}
    needed = [*schema["required"], "max_tokens"]
    whole = {**schema, "properties": fields, "required": needed}
    # Most fields at random contradict each other somewhere; few rarely do.
    few = {name: fields[name] for name in (*needed, "n", "temperature", "stream", "stop")}
    kinds = [
        _spoiled(from_schema({**whole, "properties": part}, schema.get("$defs", {})))
        for part in (fields, few)
    ]
    return _sent(path, st.one_of([*kinds * 9, WILD]))


@st.composite
def _sent(draw: st.DrawFn, path: str, values: st.SearchStrategy[Json]) -> Sent:
    body = draw(_as_bytes(draw(values)))
    headers = {"Content-Type": draw(st.sampled_from(_TYPES))}
    if draw(st.integers(0, 29)) == 0:
        headers["Content-Encoding"] = draw(st.sampled_from(["gzip", "deflate", "br", "x"]))
    return Sent(path, body, headers)


# Names.


def names(known: str, absolute: str) -> list[str]:
    """500 model names that mean a file elsewhere; `known` is a model, `absolute` a real folder."""
    ups = [
        "..",
        "...",
        "..;",
        ".%00.",
        "%2e%2e",
        "%252e%252e",
        "%c0%ae%c0%ae",
        "．．",
        "․․",
        "‥",
        "..\x00",
        "..\u200b",
        ".\u2024",
    ]
    separators = ["/", "\\", "//", "%2f", "%5c", "%252f", "／", "∕", "⁄", "\x00/", "/./", "\n/"]
    targets = ["etc/passwd", "adapter_config.json", known, "", ".ssh/id_rsa"]
    climbing = [
        separator.join([up] * depth + [target])
        for target in targets
        for up in ups
        for separator in separators
        for depth in (1, 6)
    ]
    direct = [
        absolute,
        f"{absolute}/",
        f"file://{absolute}",
        f"{absolute}_evil",
        f"{known}_evil",
        f"{known}/",
        f"{known}/.",
        f"{known}/..",
        f"./{known}",
        f"{known}\x00",
        f"{known}\x00.safetensors",
        f"{known}%00",
        f"{known} ",
        f" {known}",
        f"{known}\n",
        f"{known}.",
        f"{known}:stream",
        f"{known}@main",
        known.upper(),
        f"~/{known}",
        f"$HOME/{known}",
        f"${{PWD}}/{known}",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/stdin",
        "C:\\Windows\\win.ini",
        "C:/Windows/win.ini",
        "\\\\server\\share\\adapter",
        "//server/share/adapter",
        "\\\\?\\C:\\x",
        "file:///etc/passwd",
        "http://192.0.2.1/adapter",
        "s3://bucket/adapter",
        "hf://owner/adapter",
        "owner/adapter",
        "CON",
        "NUL",
        "aux.safetensors",
        ".",
        "-",
        "_",
        "--help",
        "*",
        "?",
        "[a-z]*",
        "a" * 256,
        "🐦",
    ]
    step = len(climbing) / (500 - len(direct))
    chosen = [climbing[int(number * step)] for number in range(500 - len(direct))]
    return [*direct, *chosen]


def as_path(name: str) -> str:
    """A model's own path with `name` in it, percent-encoded but for what is so already."""
    return f"/v1/models/{quote(name, safe='%.')}"


# Connections.


class Crowd:
    """Connections that are open at the same time and say little or nothing."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._idle: list[socket.socket] = []
        self._slow: list[socket.socket] = []

    def join(self, idle: int, slow: int) -> None:
        """Open `idle` connections that send nothing, and `slow` ones that begin a request."""
        for number in range(idle + slow):
            connection = socket.create_connection(self._address, timeout=10)
            if number < idle:
                self._idle.append(connection)
            else:
                connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {self._address[0]}".encode())
                self._slow.append(connection)

    def drip(self) -> None:
        """One more byte of a header on each slow connection that is still open."""
        for connection in self._slow:
            with contextlib.suppress(OSError):
                connection.send(b"x")

    def open_ones(self) -> int:
        """Connections that the server has not closed."""
        count = 0
        for connection in (*self._idle, *self._slow):
            connection.setblocking(False)
            try:
                while connection.recv(4096):
                    pass  # a refusal before the close
            except BlockingIOError:
                count += 1
            except OSError:
                pass
        return count

    def leave(self) -> None:
        """Close all of them."""
        for connection in (*self._idle, *self._slow):
            connection.close()
        self._idle, self._slow = [], []


def send_endless_body(
    host: str, port: int, most_bytes: int, key: str | None = None
) -> tuple[int, int]:
    """Send a body without a length until the server answers: (status, bytes sent by then)."""
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\n{authorization}"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    block = b"[" * 65536
    sent = 0
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(head.encode())
        while sent < most_bytes:
            try:
                connection.sendall(b"%x\r\n%s\r\n" % (len(block), block))
            except OSError:  # closed by the server, whose answer may be waiting here
                break
            sent += len(block)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if connection.recv(1, socket.MSG_PEEK):
                    break
            connection.settimeout(30)
        connection.settimeout(30)
        try:
            status_line = connection.recv(4096).split(b"\r\n")[0]
        except ConnectionResetError:
            return 0, sent
    return int(status_line.split()[1]) if status_line else 0, sent


def open_stream(host: str, port: int, body: Json, key: str | None = None) -> socket.socket:
    """A streaming request whose answer is left to the caller to read, or not."""
    data = json.dumps({**body, "stream": True}).encode()
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    connection = socket.create_connection((host, port), timeout=60)
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\n{authorization}"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


FIRST_WORD = (b'"delta":{"content":"', b'"finish_reason":"')
"""A stream's first text, or its end: where tokens are drawn, the first may be the one that ends."""


def read_until(connection: socket.socket, *texts: bytes) -> bytes:
    """What arrived, up to and with the block in which one of `texts` first stood."""
    received = b""
    while not any(text in received for text in texts):
        block = connection.recv(4096)
        if not block:
            raise ConnectionError(f"closed before {texts!r}: {received[-300:]!r}")
        received += block
    return received


def wait_until(met: Any, seconds: float) -> bool:
    """Whether `met()` came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not met():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
