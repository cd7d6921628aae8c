import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from myna.cli.pager import paged

needs_shell = pytest.mark.skipif(shutil.which("sh") is None, reason="no sh to act as a pager")


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=40, color_system="standard")


def test_what_is_no_terminal_is_written_to_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", "false")
    console = Console(file=io.StringIO(), width=40)
    with paged(console) as output:
        assert output is console


@pytest.mark.parametrize("pager", ["", "no-such-program-anywhere"])
def test_without_a_pager_all_is_printed(monkeypatch: pytest.MonkeyPatch, pager: str) -> None:
    monkeypatch.setenv("PAGER", pager)
    console = terminal()
    with paged(console) as output:
        assert output is console


@needs_shell
def test_the_pager_reads_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = tmp_path / "read"
    monkeypatch.setenv("PAGER", f"sh -c 'cat > {read}'")
    console = terminal()
    with paged(console) as output:
        output.print("[green]好[/] one")
    assert read.read_text(encoding="utf-8") == "\x1b[32m好\x1b[0m one\n"
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@needs_shell
def test_a_reader_who_leaves_ends_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", "sh -c 'head -c 1 > /dev/null'")
    printed = 0
    with paged(terminal()) as output:
        while printed < 1_000_000:
            output.print("a line of some length, as rows have")
            printed += 1
    assert 0 < printed < 1_000_000


@needs_shell
def test_errors_of_the_block_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", "sh -c 'cat > /dev/null'")
    with pytest.raises(ZeroDivisionError), paged(terminal()):
        raise ZeroDivisionError
