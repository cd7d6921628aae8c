"""What a chat template runs in: Jinja's sandbox, and the process around it.

Owns the environment (the filters, globals and tags that transformers gives to chat templates, so
that the text is the same to a character; a test compares them) and the limits that a strange
template is held to. The module runs in two ways: imported, for templates that the package knows,
and as the program of a process of its own (`rendering.py` starts it), which reads requests from its
standard input and answers on its standard output. For the second it imports nothing but Jinja:
no torch, no transformers, no myna.

What the limits are: the sandbox refuses Python's internals and ranges above 100,000; the process
may not grow by more than 512 MB, write no file, and write at most 8 times its input and a million
characters more for one conversation. Time is kept by the parent; where signals exist, this side
ends itself a little later too, so that no template outlives a parent that was killed. Memory is
limited on Linux alone.
What they are not: a defence against a fault in Python or the kernel.

Wire: a line of JSON `{"template": number, "source": text or null, "variables": {...}, "count": n}`,
then n lines `[messages, tools, kind]`; n lines come back: a list of texts, or `{"refused": text}`,
or `{"stopped": text}`.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.debug  # imported by jinja2 at the first error; here before memory is limited
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_MB = 512
"""How much the process may grow, over what Python and Jinja take."""
OUTPUT_CHARACTERS, OUTPUT_RATIO = 1_000_000, 8
"""Longest text of one conversation: so many characters, and so many times its JSON."""

READY = b"ready\n"
OUT_OF_MEMORY = 3
"""Exit code where not even an answer could be made."""
TOO_MUCH_MEMORY = f"it needs more than {MEMORY_MB} MB of memory"
PROMPT, WHOLE, ANSWER, VARIABLES = "prompt", "whole", "answer", "variables"
"""Kinds of request: up to where an answer begins; all messages; both, the last message being the
answer; no text, but the names of the variables that the template reads."""

_MESSAGE_CHARACTERS = 1000
_FLUSH_SECONDS = 0.05
_ALARM_SECONDS = 5.0
"""When the process ends itself; the parent, if it lives, has ended it before."""


class Stopped(Exception):
    """The template did what no chat template has to do; the text says what."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, refusing at once what it otherwise lets a template hold without using it."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks answers for trainers that search for them; the text is its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that stand for Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self=` is a name that templates may use
        own, *rest = args
        _refuse_internal(dict(*rest, **kwargs))
        jinja2.utils.Namespace.__init__(own, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal([name])
        super().__setitem__(name, value)


def _refuse_internal(names: Any) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the name {name!r} in a namespace")


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which a model would have to read.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@contextlib.contextmanager
def _faults_named() -> Iterator[None]:
    """Turn what a template can do wrong by its nature into `Stopped`, whatever raised it."""
    try:
        yield
    except SecurityError as error:
        raise Stopped(f"it reaches for what templates may not have: {error}") from error
    except MemoryError as error:
        raise Stopped(TOO_MUCH_MEMORY) from error
    except RecursionError as error:
        raise Stopped("it calls itself, or is nested, without end") from error
    except OverflowError as error:
        raise Stopped(f"it counts too far: {error}") from error


class Compiled:
    """A template, compiled when it is first needed.

    Raises `Stopped` for what no chat template has to do, and whatever Jinja or the template raise.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._template: jinja2.Template | None = None

    def texts(self, request: Sequence[Any], variables: Mapping[str, Any], limit: int) -> list[str]:
        """What `request` (messages, tools, kind) asks for; no text longer than `limit`."""
        messages, tools, kind = request
        with _faults_named():
            if kind == VARIABLES:
                parsed = _environment().parse(self._source)
                return sorted(jinja2.meta.find_undeclared_variables(parsed))
            messages = [_with_thinking_named(message) for message in messages]
            texts = []
            if kind in (PROMPT, ANSWER):
                before = messages if kind == PROMPT else messages[:-1]
                texts.append(self._render(before, tools, True, variables, limit))
            if kind in (WHOLE, ANSWER):
                texts.append(self._render(messages, tools, False, variables, limit))
            return texts

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        limit: int,
    ) -> str:
        if self._template is None:
            self._template = _environment().from_string(self._source)
        pieces, size = [], 0
        for piece in self._template.generate(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        ):
            size += len(piece)
            if size > limit:
                raise Stopped(f"it writes more than {limit:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def output_limit(request: str | bytes) -> int:
    """Most characters that a request, as JSON, may lead to."""
    return OUTPUT_CHARACTERS + OUTPUT_RATIO * len(request)


def _with_thinking_named(message: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers offers the reasoning under this name too: gpt-oss reads it.
    if "reasoning_content" in message:
        return {"thinking": message["reasoning_content"], **message}
    return message


def describe(error: Exception) -> str:
    """The text of what a template raised, or its name where it has none."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.message} (line {error.lineno})"[:_MESSAGE_CHARACTERS]
    return (str(error) or type(error).__name__)[:_MESSAGE_CHARACTERS]


def to_line(value: Any) -> bytes:
    """A value as a line of JSON; lone surrogates pass, as they do in Python's strings."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def from_line(line: bytes) -> Any:
    """The value of a line that `to_line` wrote."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _limit_memory() -> None:
    """Let the process grow by `MEMORY_MB`; it writes no files and leaves no core."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (0, 0))
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[0])
    except OSError:  # macOS, where a limit on address space is not kept
        return
    size = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_MB * 2**20
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _alarm() -> Callable[[float], object]:
    """A function that ends this process after so many seconds; 0 takes the order back."""
    if not hasattr(signal, "setitimer"):
        return lambda seconds: None
    # The default action is the kernel's: it ends code that never returns to Python.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(compiled: Compiled, variables: Mapping[str, Any], line: bytes) -> bytes:
    try:
        with _faults_named():
            return to_line(compiled.texts(from_line(line), variables, output_limit(line)))
    except Stopped as stop:
        return to_line({"stopped": str(stop)})
    except Exception as error:  # a template can raise anything
        return to_line({"refused": describe(error)})


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer requests until the input ends."""
    alarm = _alarm()
    templates: dict[int, Compiled] = {}
    while header := incoming.readline():
        batch = from_line(header)
        if batch["source"] is not None:
            templates[batch["template"]] = Compiled(batch["source"])
        # All are read before any is answered: neither side waits for the other's pipe.
        lines = [incoming.readline() for _ in range(batch["count"])]
        flushed = time.monotonic()
        for line in lines:
            alarm(_ALARM_SECONDS)
            answer = _answer(templates[batch["template"]], batch["variables"], line)
            alarm(0)
            outgoing.write(answer)
            # Rare enough to cost nothing, and often enough to show the parent that this lives.
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                outgoing.flush()
                flushed = time.monotonic()
        outgoing.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    outgoing = open(sys.stdout.fileno(), "wb", buffering=2**16, closefd=False)  # noqa: SIM115 (as long as the process)
    _limit_memory()
    outgoing.write(READY)
    outgoing.flush()
    try:
        serve(sys.stdin.buffer, outgoing)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BrokenPipeError:  # the parent has gone
        os._exit(0)
