"""`myna chat`: talking in the terminal.

Owns the prompt line, the commands, and what goes where: answers to standard output, everything else
to standard error. What is said and remembered is `inference.chat`'s.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from myna.cli.loading import collector_resting
from myna.cli.remote_code import warn_of_remote_code
from myna.cli.terminal import error_console, harmless
from myna.errors import ConfigError, DataError

if TYPE_CHECKING:
    from myna.inference.chat import ChatSession
    from myna.inference.generate import Answer, Sampling
    from myna.inference.speaker import Speaker

HELP = """\
/clear   forget what was said
/quit    leave (or Ctrl-D)
/help    this
Ctrl-C   interrupts an answer; what was said of it is remembered"""

_COMMAND = re.compile(r"/[a-z]+")


def run(
    source: str | None,
    *,
    prompt: str | None,
    system: str | None,
    sampling: dict[str, Any],
    trust_remote_code: bool,
    force_base: bool = False,
) -> None:
    """Talk to `source`, or ask it `prompt` once.

    Raises ConfigError, and DataError for a `prompt` that cannot be asked; in a conversation such a
    question is refused and the conversation goes on.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError('--prompt is empty; expected a question, for example --prompt "你好".')
    with collector_resting():
        from myna.inference.chat import ChatSession
        from myna.inference.generate import Sampling
        from myna.inference.speaker import open_speaker

        wanted = Sampling(**sampling)
        if trust_remote_code:
            warn_of_remote_code(source, error_console)
        speaker = open_speaker(
            source, system=system, trust_remote_code=trust_remote_code, force_base=force_base
        )
    session = ChatSession(speaker, wanted, note=_note)
    if prompt is not None:
        _print_answer(session, prompt)
        return
    _print_header(speaker, wanted)
    for question in _questions():
        if _COMMAND.fullmatch(question):
            if question == "/quit":
                return
            _obey(question, session)
            continue
        try:
            _print_answer(session, question)
        except DataError as error:
            _note(str(error), style="red")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            _note("interrupted")


def _questions() -> Iterator[str]:
    """Lines typed or piped in, without white space around them, until the input ends."""
    read = _typed_lines if sys.stdin.isatty() else _piped_lines
    for line in read():
        if question := line.strip():
            yield question


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() line editing and history)
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _note("/quit or Ctrl-D leaves")


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input: byte 0x{error.object[error.start]:02x} is not UTF-8; expected "
            "questions line by line.\n  Convert it, for example with iconv -t UTF-8."
        ) from None


def _obey(command: str, session: "ChatSession") -> None:
    if command == "/clear":
        session.clear()
        _note("forgotten")
    elif command == "/help":
        _note(HELP)
    else:
        _note(f"there is no command {command}; /help lists them")


def _print_answer(session: "ChatSession", question: str) -> None:
    """Stream the answer to `question`, and say why it ended where the model did not end it."""
    stream = session.ask(_decodable(question))
    write = _writer()
    said = False
    try:
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                answer: Answer = end.value
                break
            said = True
            write(piece)
        write("\n")
    except BaseException:
        if said:
            write("\n")
        raise
    finally:
        stream.close()
    if not answer.stopped:
        context = session.speaker.context
        if answer.limit < session.sampling.max_new_tokens:
            _note(f"cut: the context of {context:,} tokens is full; /clear makes room")
        else:
            _note(f"cut after {answer.limit:,} tokens; --max-new-tokens N allows more")
    elif not answer.text:
        _note("the model ended its answer at once, without a word")


def _writer() -> Callable[[str], None]:
    """Writes pieces to standard output at once, harmless for a terminal."""
    is_terminal = sys.stdout.isatty()

    def write(piece: str) -> None:
        sys.stdout.write(harmless(piece) if is_terminal else piece)
        sys.stdout.flush()

    return write


def _decodable(text: str) -> str:
    """`text`, if it came as UTF-8; Python passes other bytes on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("The question is not UTF-8; set the terminal to UTF-8.") from None
    return text


def _print_header(speaker: "Speaker", sampling: "Sampling") -> None:
    rows = [("base", speaker.description)]
    if speaker.adapter is not None:
        rows.append(("adapter", str(speaker.adapter)))
    rows.append(("persona", speaker.encoder.system or "none"))
    limits = f"answers up to {sampling.max_new_tokens:,} tokens"
    if speaker.context is not None:
        limits += f", context {speaker.context:,}"
    rows.append(("sampling", f"{speaker.describe(sampling)}; {limits}"))
    for name, text in rows:
        error_console.print(f"[bold]{name:<9}[/]{escape(text)}", soft_wrap=True)
    for text in speaker.notes:
        _note(text)
    _note("/help lists commands, Ctrl-D leaves")


def _note(text: str, style: str = "dim") -> None:
    error_console.print(text, style=style, markup=False, soft_wrap=True)
