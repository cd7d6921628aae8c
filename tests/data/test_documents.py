"""Plain text files."""

from collections.abc import Callable
from pathlib import Path

from myna.data.files import BadRow, Record, look_at, read_records

Write = Callable[[str, str | bytes], Path]


def documents(path: Path) -> list[tuple[int, str]]:
    found = list(read_records([path]))
    assert all(isinstance(row, Record) for row in found), found
    return [(row.place.line, row.value["text"]) for row in found if isinstance(row, Record)]


def test_blank_lines_divide_documents(write: Write) -> None:
    path = write(
        "a.txt", "\ufeff\n春眠不覺曉\r\n處處聞啼鳥\r\n \t\r\n\r\n  second\n\n\nthird\n  last"
    )
    assert documents(path) == [(2, "春眠不覺曉\n處處聞啼鳥"), (6, "  second"), (9, "third\n  last")]
    assert look_at(path).note == "plain text, blank lines divide the documents"


def test_a_file_without_blank_lines_is_one_document(write: Write) -> None:
    assert documents(write("a.txt", "one\ntwo\n")) == [(1, "one\ntwo")]
    assert documents(write("b.txt", "[Chorus]\n{la} la")) == [(1, "[Chorus]\n{la} la")]


def test_bad_bytes_name_their_line(write: Write) -> None:
    path = write("a.txt", b"one\n\ntwo\nab\x80\n\nthree\0\n\nfour")
    found = list(read_records([path]))
    assert [isinstance(row, Record) for row in found] == [True, False, False, True]
    assert isinstance(found[1], BadRow) and isinstance(found[2], BadRow)
    assert str(found[1].fault).startswith(
        "a.txt line 4, column 3: byte 0x80 at offset 11 is not UTF-8."
    )
    assert str(found[2].fault).startswith("a.txt line 6: the document holds NUL characters")
