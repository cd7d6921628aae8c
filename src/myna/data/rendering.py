"""Rendering: chat templates to text, strange ones in a process of their own.

Owns which templates are trusted (those of `known_templates.txt`, which are this package's), the
process that renders all others, its deadline and its end. What a template may do, and the limits
that the process sets itself, are `template_sandbox.py`; which template is rendered, and with what
variables, is `templates.py`'s.

A process is started when it is first needed, serves one `Renderer` for as long as that lives, and
is killed when a template runs away. Nothing is pickled on the wire, and the child inherits no
environment variables but the few that Python needs to start. A `Renderer` may be pickled or taken
along by a fork: the copy starts a process of its own.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from myna.data import template_sandbox
from myna.data.template_sandbox import Compiled, Stopped
from myna.errors import ConfigError, DataError

KNOWN_TEMPLATES = Path(__file__).parent / "builtin_templates" / "known_templates.txt"
"""SHA-256 of the templates that need no process: one a line, with a name."""

DEADLINE_SECONDS = 2.0
"""Longest time for one conversation."""

_START_SECONDS = 60.0
_AGAIN_SECONDS = 0.5
"""Longest time for a conversation of a batch in which one was stopped already."""
_END_SECONDS = 5.0
_WATCH_SECONDS, _IDLE_SECONDS = 0.05, 0.25
"""How often the watch looks at the clock, with and without a request under way."""
_BUFFER_BYTES = 2**16
_BATCH_BYTES = 2**23
_LONGEST_LINE = 2**29
_INHERITED = ("SYSTEMROOT", "PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")

Request = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, str]
"""Messages, tools, and what is wanted: a kind of `template_sandbox`."""


STOPPED_MEND = (
    "  No chat template needs that for a row of ordinary length. Take the model from where you "
    "trust it, or set `template: FILE` to another."
)


class TemplateError(DataError):
    """A template refused messages; the text is the template's own."""


class TemplateStopped(DataError):
    """A template did what no chat template has to do, and was stopped."""

    def __init__(self, why: str, index: int) -> None:
        super().__init__(f"The chat template was stopped: {why}.\n{STOPPED_MEND}")
        self.why = why
        self.index = index
        """Number, from 0, of the request at which it happened."""

    def __reduce__(self) -> tuple[type["TemplateStopped"], tuple[str, int]]:
        """It may be raised in a worker process and read in another."""
        return TemplateStopped, (self.why, self.index)


class Renderer:
    """Renders templates; in this process those that the package knows, all others in a child.

    Methods raise TemplateStopped for a template that runs away, and ConfigError where no process
    can be started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        _RENDERERS.add(self)

    def __reduce__(self) -> tuple[type["Renderer"], tuple[()]]:
        """A copy starts a process of its own."""
        return Renderer, ()

    def render(
        self, source: str, variables: Mapping[str, Any], requests: Sequence[Request]
    ) -> list[list[str] | TemplateError]:
        """Per request its texts, or the template's refusal."""
        if is_known(source):
            return [
                _render_here(source, variables, request, index)
                for index, request in enumerate(requests)
            ]
        with self._lock:
            return self._render_there(source, variables, requests)

    def variables(self, source: str) -> frozenset[str]:
        """Names that the template reads without setting them itself.

        Raises TemplateError for one that Jinja cannot parse.
        """
        (names,) = self.render(source, {}, [((), None, template_sandbox.VARIABLES)])
        if isinstance(names, TemplateError):
            raise names
        return frozenset(names)

    def _render_there(
        self, source: str, variables: Mapping[str, Any], requests: Sequence[Request]
    ) -> list[list[str] | TemplateError]:
        answers: list[list[str] | TemplateError] = []
        for batch in _batches(requests):
            made, stop = self._exchange(source, variables, batch, DEADLINE_SECONDS)
            answers += made
            if stop is not None and len(batch) > 1:
                # Answers in its buffer died with it: one at a time, the guilty request is found.
                for line in batch[len(made) :]:
                    made, stop = self._exchange(source, variables, [line], _AGAIN_SECONDS)
                    if stop is not None:
                        break
                    answers += made
            if stop is not None:
                raise TemplateStopped(str(stop), len(answers))
        return answers

    def _exchange(
        self, source: str, variables: Mapping[str, Any], lines: Sequence[bytes], seconds: float
    ) -> tuple[list[list[str] | TemplateError], Stopped | None]:
        """The answers of a child, and what it was stopped for, if it was."""
        answers: list[list[str] | TemplateError] = []
        try:
            if self._child is None:
                self._child = _Child(self)
            for answer in self._child.exchange(source, variables, lines, seconds):
                if isinstance(answer, Stopped):
                    self._kill()
                    return answers, answer
                answers.append(answer)
        except BaseException:
            # Ctrl-C too: what is left in the pipes belongs to no later request.
            self._kill()
            raise
        return answers, None

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _forget(self) -> None:
        """In the copy that a fork made: the process belongs to the original."""
        self._lock = threading.Lock()
        if self._child is not None:
            self._child.abandon()
            self._child = None


_RENDERERS: "weakref.WeakSet[Renderer]" = weakref.WeakSet()


def _forget_all() -> None:
    for renderer in _RENDERERS:
        renderer._forget()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_all)


class _Child:
    """One process, and the thread that kills it when a deadline has passed."""

    def __init__(self, owner: Renderer) -> None:
        self._sent: dict[str, int] = {}
        self._deadline: float | None = time.monotonic() + _START_SECONDS
        self._late = False
        self._over = threading.Event()
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        try:
            self._process = subprocess.Popen(
                # -P: that file's folder, with its `files.py` and such, is no place to import from.
                [sys.executable, "-P", "-S", "-s", template_sandbox.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=_BUFFER_BYTES,
                env={**inherited, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        except OSError as error:
            raise ConfigError(
                f"The process that renders chat templates could not be started: {error}."
            ) from error
        assert self._process.stdin is not None and self._process.stdout is not None, "both are PIPE"
        self._input, self._output = self._process.stdin, self._process.stdout
        self._finalizer = weakref.finalize(owner, _end, self._process, self._over)
        threading.Thread(target=self._watch, name="myna-template-watch", daemon=True).start()
        if self._output.readline(_LONGEST_LINE) != template_sandbox.READY:
            code = self._code()
            self.kill()
            raise ConfigError(
                f"The process that renders chat templates ended with code {code} before it began.\n"
                f"  See why with: {sys.executable} {template_sandbox.__file__}"
            )
        self._deadline = None

    def exchange(
        self, source: str, variables: Mapping[str, Any], lines: Sequence[bytes], seconds: float
    ) -> Iterator[list[str] | TemplateError | Stopped]:
        """Send requests and read their answers, each in `seconds`; nothing follows a `Stopped`."""
        is_new = source not in self._sent
        header = {
            "template": self._sent.setdefault(source, len(self._sent)),
            "source": source if is_new else None,
            "variables": dict(variables),
            "count": len(lines),
        }
        try:
            self._input.write(b"".join([template_sandbox.to_line(header), *lines]))
            self._input.flush()
        except OSError:  # it has ended, and closed the pipe
            yield Stopped(self._end_of_process())
            return
        for _ in lines:
            # Every answer gets the whole time: the child shows each in good time.
            self._deadline = time.monotonic() + seconds
            line = self._output.readline(_LONGEST_LINE)
            yield _parse(line) if line.endswith(b"\n") else Stopped(self._end_of_process())
        self._deadline = None

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._finalizer()

    def abandon(self) -> None:
        """Let go of a process that is another's: no signal, no byte into its pipes."""
        self._finalizer.detach()
        for stream in (self._input, self._output):
            stream.raw.close()  # type: ignore[attr-defined]  # typeshed: IO[bytes]
        self._process.returncode = 0  # else Popen warns of a process left running

    def _watch(self) -> None:
        while not self._over.wait(_IDLE_SECONDS if self._deadline is None else _WATCH_SECONDS):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._late = True
                self._process.kill()
                return

    def _code(self) -> int:
        """The exit code of a process that has closed its output."""
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _end_of_process(self) -> str:
        """Why there is no answer."""
        code = self._code()
        if self._late or code == -getattr(signal, "SIGALRM", 0):
            return f"it takes longer than {DEADLINE_SECONDS:g} seconds for one conversation"
        if code == template_sandbox.OUT_OF_MEMORY:
            return template_sandbox.TOO_MUCH_MEMORY
        return f"its process ended with code {code}"


def _end(process: subprocess.Popen[bytes], over: threading.Event) -> None:
    """Let a process end by the end of its input, or end it."""
    over.set()
    assert process.stdin is not None and process.stdout is not None, "both are PIPE"
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _batches(requests: Sequence[Request]) -> Iterator[list[bytes]]:
    """Lines of the wire, so many at a time that a batch stays small."""
    batch: list[bytes] = []
    size = 0
    for request in requests:
        line = template_sandbox.to_line(request)
        if batch and size + len(line) > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield batch


def _parse(line: bytes) -> list[str] | TemplateError | Stopped:
    """An answer of the child, of which nothing is believed but strings."""
    with contextlib.suppress(ValueError, RecursionError):
        match template_sandbox.from_line(line):
            case {"refused": str(text)}:
                return TemplateError(text)
            case {"stopped": str(text)}:
                return Stopped(text)
            case list(texts) if all(isinstance(text, str) for text in texts):
                return texts
    return Stopped("its process answered what it was not asked")


@lru_cache(maxsize=4)
def renderer_for(source: str) -> Renderer:
    """The renderer of a template, shared by all encoders of this process that use it."""
    return Renderer()


@lru_cache(maxsize=64)
def is_known(source: str) -> bool:
    """Whether this very text is one that the package vouches for."""
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() in _known_hashes()


@cache
def _known_hashes() -> frozenset[str]:
    lines = KNOWN_TEMPLATES.read_text(encoding="utf-8").splitlines()
    return frozenset(line.split()[0] for line in lines if line and not line.startswith("#"))


_compiled = lru_cache(maxsize=16)(Compiled)


def _render_here(
    source: str, variables: Mapping[str, Any], request: Request, index: int
) -> list[str] | TemplateError:
    try:
        return _compiled(source).texts(request, variables, sys.maxsize)
    except Stopped as stop:
        raise TemplateStopped(str(stop), index) from stop
    except Exception as error:  # as in the child: a template can raise anything
        return TemplateError(template_sandbox.describe(error))
