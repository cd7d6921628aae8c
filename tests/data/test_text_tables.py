"""CSV and TSV, against hand-written expectation and the csv module with the file held whole."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from myna.data.files import BadRow, Record, look_at, read_records
from myna.errors import DataError

Write = Callable[[str, str | bytes], Path]


def rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    found = list(read_records([path]))
    assert all(isinstance(row, Record) for row in found), found
    return [(row.place.line, row.value) for row in found if isinstance(row, Record)]


def fault(path: Path) -> str:
    (bad,) = [str(row.fault) for row in read_records([path]) if isinstance(row, BadRow)]
    return bad


def test_quoted_fields_over_several_lines(write: Write) -> None:
    path = write(
        "a.csv",
        '\ufeffinstruction,output\r\n"one, two","a ""b""\r\nc"\r\n\r\n,"x"\n 5" disk ,\n',
    )
    assert rows(path) == [
        (2, {"instruction": "one, two", "output": 'a "b"\r\nc'}),
        (5, {"instruction": "", "output": "x"}),
        (6, {"instruction": ' 5" disk ', "output": ""}),
    ]


@pytest.mark.parametrize(
    ("name", "header", "note"),
    [
        ("a.csv", "a,b", "CSV divided by a comma, columns a, b"),
        ("a.csv", "a;b", "CSV divided by a semicolon, columns a, b"),
        ("a.csv", "a\tb", "CSV divided by a tab, columns a, b"),
        ("a.csv", "a|b", "CSV divided by a vertical bar, columns a, b"),
        ("a.csv", '"a;;;b",b', "CSV divided by a comma, columns a;;;b, b"),
        ("a.csv", "a", "CSV divided by a comma, columns a"),
        ("a.tsv", "a,a\tb", "TSV divided by a tab, columns a,a, b"),
        ("a.csv", ",a, b", "CSV divided by a comma, columns Unnamed: 0, a, b"),
    ],
)
def test_the_delimiter_is_found_in_the_header_and_said(
    write: Write, name: str, header: str, note: str
) -> None:
    assert look_at(write(name, f"{header}\n1\n")).note == note


def test_old_line_ends(write: Write) -> None:
    path = write("a.csv", 'x,y\r1,"a\rb"\r2,c\r')
    assert rows(path) == [(2, {"x": "1", "y": "a\rb"}), (4, {"x": "2", "y": "c"})]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "x,y\n1,2\n3\n4,5\n",
            "a.csv line 3: the row has 1 field; expected 2 as in the header (x, y).\n"
            '  A field that holds the delimiter, a line break or a " stands in double quotes.',
        ),
        ("x,y\n1,2,3\n", "a.csv line 2: the row has 3 fields; expected 2 as in the header (x, y)."),
        (
            'x,y\n1,2\n3,"open\n4,5\n',
            'a.csv line 3, column 3: a " opens a field here and none closes it.\n'
            '  Close it, and write a " inside a quoted field as "".',
        ),
        (
            'x,y\n1,"a "b" c"\n',
            'a.csv line 2: a closing " is followed by more text of the field.\n'
            '  Write a " inside a quoted field as ""; or a " of an earlier line was never closed.',
        ),
        (
            'x,y\n1,"open\n2,"b"\n',
            'a.csv line 3: a closing " is followed by more text of the field (the row begins on '
            "line 2).",
        ),
        ("x,y\n1,a\0b\n", 'a.csv line 2: column "y" holds NUL characters (0x00); expected text.'),
    ],
)
def test_rows_that_do_not_fit(write: Write, text: str, expected: str) -> None:
    assert fault(write("a.csv", text)).startswith(expected)


def test_a_bad_line_does_not_hide_the_next(write: Write) -> None:
    path = write("a.csv", b'x,y\n1,"a"b\n2,\xc4\xe3\xba\xc3\n3,c\n')
    found = list(read_records([path]))
    assert [isinstance(row, Record) for row in found] == [False, False, True]
    assert [row.place.row for row in found if isinstance(row, Record)] == [3]
    encoding = found[1]
    assert isinstance(encoding, BadRow)
    assert str(encoding.fault).startswith(
        'a.csv line 3: in column "y", byte 0xc4 is not UTF-8; it looks like GB18030.'
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x,y,x\n", 'a.csv line 1: two columns are named "x"; expected different names.'),
        (",\n1,2\n", "a.csv line 1: the header is empty; expected the names of the columns."),
        ('"x,y\n1,2\n', 'a.csv line 1, column 1: a " opens a field here and none closes it.'),
        (b"x,\xff\n", 'a.csv line 1: the name of column 2 is no UTF-8 text ("\ufffd").'),
    ],
)
def test_headers_that_are_none(write: Write, text: str | bytes, expected: str) -> None:
    with pytest.raises(DataError) as error:
        look_at(write("a.csv", text))
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("Training has not started.")


def test_long_fields_leave_the_limit_of_the_csv_module_alone(write: Write) -> None:
    limit = csv.field_size_limit()
    ((_, row),) = rows(write("a.csv", "x\n" + "a" * (limit + 10) + "\n"))
    assert len(row["x"]) == limit + 10
    assert csv.field_size_limit() == limit
