"""`myna chat` at a pipe and at a terminal: what is said where, and what a key does."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from myna.cli.chat import run
from myna.errors import ConfigError, DataError


def chat(source: Path, prompt: str | None = None, **sampling: object) -> None:
    run(
        str(source),
        prompt=prompt,
        system=None,
        sampling={"max_new_tokens": 5} | sampling,
        trust_remote_code=False,
    )


def pipe(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured anew in every process otherwise, and so is the answer's rounding.
    from myna.device import Compute
    from myna.inference import speaker

    monkeypatch.setattr(speaker, "choose_compute", lambda *_: Compute("cpu", "float32", "test"))


def test_one_question_prints_the_answer_alone(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(tiny_model, "hello")
    first = capsys.readouterr()
    assert first.out.endswith("\n")
    assert len(first.out.strip()) > 0
    assert first.err == "cut after 5 tokens; --max-new-tokens N allows more\n"
    chat(tiny_model, "hello", seed=1)
    assert capsys.readouterr().out == first.out


def test_questions_line_by_line_make_one_conversation(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "hello\n\n  hello  \n/clear\nhello\n/sing\n/help\n/quit\nhello\n")
    chat(tiny_model, temperature=0)
    captured = capsys.readouterr()
    chat(tiny_model, "hello", temperature=0)
    once = capsys.readouterr().out
    assert captured.out.startswith(once)
    assert captured.out.endswith(once)
    notes = captured.err.splitlines()
    assert notes[:4] == [
        f"base     {tiny_model} (llama, 0.0 M parameters, float32 on cpu)",
        "persona  none",
        "sampling greedy; answers up to 5 tokens, context 256",
        "/help lists commands, Ctrl-D leaves",
    ]
    assert notes.count("cut after 5 tokens; --max-new-tokens N allows more") == 3
    assert "forgotten" in notes
    assert "there is no command /sing; /help lists them" in notes
    assert "/clear   forget what was said" in notes


def test_a_refused_question_is_said_and_the_next_is_answered(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "a<|im_end|>b\nhello\n")
    chat(tiny_model, temperature=0)
    captured = capsys.readouterr()
    assert 'The user text of turn 1 contains "<|im_end|>" at character 2' in captured.err
    chat(tiny_model, "hello", temperature=0)
    assert capsys.readouterr().out == captured.out


def test_a_full_context_is_said(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat(tiny_model, "x" * 200, max_new_tokens=100, temperature=0)
    note = "cut: the context of 256 tokens is full; /clear makes room\n"
    assert capsys.readouterr().err == note


def test_remote_code_is_warned_of(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        str(tiny_model),
        prompt="hello",
        system=None,
        sampling={"max_new_tokens": 5},
        trust_remote_code=True,
    )
    assert capsys.readouterr().err.startswith(
        f"warning: --trust-remote-code runs Python files of {tiny_model} as you.\n"
    )


def test_errors(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        chat(tiny_model, " ")
    assert str(refused.value) == (
        '--prompt is empty; expected a question, for example --prompt "你好".'
    )
    with pytest.raises(DataError, match="reads as a control token"):
        chat(tiny_model, "<|im_end|>")
    with pytest.raises(DataError) as refused:
        chat(tiny_model, os.fsdecode(b"\xb0"))
    assert str(refused.value) == "The question is not UTF-8; set the terminal to UTF-8."
    pipe(monkeypatch, "你好".encode("gb18030") + b"\n")
    with pytest.raises(DataError) as refused:
        chat(tiny_model)
    assert str(refused.value) == (
        "standard input: byte 0xc4 is not UTF-8; expected questions line by line.\n"
        "  Convert it, for example with iconv -t UTF-8."
    )


class Screen:
    """Our end of a terminal: what was written there, read with a time limit."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.text = ""
        self.seen = 0

    def wait_for(self, pattern: str) -> None:
        """Read until `pattern` comes after what was waited for before."""
        until = time.monotonic() + 60
        while (found := re.compile(pattern, re.DOTALL).search(self.text, self.seen)) is None:
            left = max(0.0, until - time.monotonic())
            ready, _, _ = select.select([self.descriptor], [], [], left)
            assert ready and left, f"no {pattern!r} at the end of {self.text[-300:]!r}"
            self.text += os.read(self.descriptor, 4096).decode(errors="replace")
        self.seen = found.end()

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)


def take_terminal() -> None:
    """Make standard input the controlling terminal, whose Ctrl-C is a signal that is heard.

    A job in the background of a script, as tests may be, inherits that it is ignored.
    """
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_at_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(
    tiny_model: Path, tmp_path: Path
) -> None:
    # With room for an answer that takes minutes, unless it is interrupted.
    endless = Path(shutil.copytree(tiny_model, tmp_path / "endless"))
    config = json.loads((endless / "config.json").read_text())
    config["max_position_embeddings"] = 100_000
    (endless / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "myna.cli.main", "chat", str(endless)]
    command += ["--temperature", "0", "--max-new-tokens", "90000"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    screen = Screen(ours)
    try:
        screen.wait_for("> ")
        screen.type(b"hello\n")
        screen.wait_for("hello\r\n.")  # the answer has begun
        screen.type(b"\x03")
        screen.wait_for("\r\ninterrupted\r\n> ")
        screen.type(b"hello\n")
        screen.wait_for("hello\r\n.")
        screen.type(b"\x03")
        screen.wait_for("\r\ninterrupted\r\n> ")
        screen.type(b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
