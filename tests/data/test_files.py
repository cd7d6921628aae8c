import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from myna.data.files import BadRow, Record, content_hash, read_file, read_records
from myna.errors import DataError

Write = Callable[[str, str | bytes], Path]
ROW = '{"instruction": "a", "output": "b"}'


def faults(path: Path) -> list[str]:
    return [str(row.fault) for row in read_records([path]) if isinstance(row, BadRow)]


def records(path: Path) -> list[Record]:
    rows = list(read_records([path]))
    assert all(isinstance(row, Record) for row in rows), rows
    return [row for row in rows if isinstance(row, Record)]


def test_list_over_several_lines_gives_each_row_its_line(write: Write) -> None:
    path = write("a.json", '\n[\n  {"x": 1},\n  {\n    "x": 2\n  }, {"x": 3}\n]\n')
    assert [(row.value["x"], row.place.line, row.place.row) for row in records(path)] == [
        (1, 3, 1),
        (2, 4, 2),
        (3, 6, 3),
    ]
    assert str(records(path)[1].place) == "a.json line 4"


def test_lines_blank_lines_carriage_returns_and_byte_order_mark(write: Write) -> None:
    path = write("a.txt", b'\xef\xbb\xbf{"x": 1}\r\n\r\n  {"x": 2}\r\n')
    assert [(row.value["x"], row.place.line, row.place.row) for row in records(path)] == [
        (1, 1, 1),
        (2, 3, 2),
    ]


def test_line_separator_inside_a_text_ends_no_line(write: Write) -> None:
    (row,) = records(write("a.jsonl", '{"x": "one\u2028two\x85three"}'))
    assert row.value["x"] == "one\u2028two\x85three"


def test_content_decides_not_the_suffix(write: Write) -> None:
    assert len(records(write("a.jsonl", f"[{ROW}, {ROW}]"))) == 2
    assert len(records(write("b.json", f"{ROW}\n{ROW}"))) == 2


def test_several_files_follow_each_other(write: Write) -> None:
    paths = [write("a.jsonl", ROW), write("b.jsonl", ROW)]
    assert [row.place.file for row in read_records(paths) if isinstance(row, Record)] == paths


def test_hash_is_that_of_the_bytes(write: Write) -> None:
    one, two = write("a.jsonl", ROW), write("b.jsonl", f"\ufeff{ROW}")
    assert read_file(one).sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    assert content_hash([read_file(one)]) == read_file(one).sha256
    both = content_hash([read_file(one), read_file(two)])
    assert both != content_hash([read_file(two), read_file(one)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"{ROW}\n{{'instruction': 1}}\n{ROW}",
            'a.jsonl line 2, column 2: broken JSON: found "\'instruction"; expected a key in '
            "double "
            'quotes ("key").\n  Remove a comma that stands before }, and use double quotes only.',
        ),
        (
            '{"x": 1 "y": 2}',
            'a.jsonl line 1, column 9: broken JSON: found "\\"y\\": 2}"; expected a comma or the '
            'closing bracket.\n  Put a comma between fields, and write a " inside a text as \\".',
        ),
        (
            '{"x": "a\tb"}',
            'a.jsonl line 1, column 9: broken JSON: found "\\tb\\"}"; expected no raw line '
            "break, tab "
            "or other control character inside a text.\n"
            "  Write a line break as \\n and a tab as \\t.",
        ),
        (
            f"{ROW}{ROW}",
            'a.jsonl line 1, column 36: broken JSON: found "{\\"instructio"; expected the end of '
            "the "
            "row.\n  Put each row on a line of its own, or all into [ ].",
        ),
        (
            f'{ROW}\n{{"x": "cut o',
            "a.jsonl line 2, column 7: broken JSON: found a text that begins here; expected its "
            'closing ".\n  Close the text, write a line break inside it as \\n and a " as \\".  '
            "This "
            "is the last line and it has no end: was the file cut off?",
        ),
        (
            '{\n  "x": 1\n}\n',
            "a.jsonl line 1, column 2: broken JSON: found the end of the line; expected a key in "
            'double quotes ("key").\n  Remove a comma that stands before }, and use double quotes '
            "only.  The file is one JSON object over several lines; expected a list of rows in [ ] "
            "or one row a line.",
        ),
        (
            f"[{ROW},\n {ROW},\n]",
            'a.jsonl line 3, column 1: broken JSON: found "]"; expected another row after the '
            "comma."
            "\n  Remove the comma before ].",
        ),
        (
            f"[{ROW}\n {ROW}]",
            'a.jsonl line 2, column 2: broken JSON: found "{\\"instructio"; expected a comma or '
            "the "
            'closing bracket.\n  Put a comma between fields, and write a " inside a text as \\".',
        ),
        (
            f"[{ROW},\n {ROW}\n",
            "a.jsonl line 3, column 1: broken JSON: found the end of the file; expected ] at the "
            "end "
            "of the list.\n  Was the file cut off?",
        ),
        (
            f"[{ROW}]\n{ROW}",
            'a.jsonl line 2, column 1: broken JSON: found "{\\"instructio"; expected the end of '
            "the "
            "file after ].\n  Put all rows into one [ ].",
        ),
        (
            '{"x": 1, "x": 2}',
            'a.jsonl line 1: the key "x" occurs twice in one object.\n  Keep one of them; a reader '
            "would silently take the last.",
        ),
        ('{"x": NaN}', "a.jsonl line 1: NaN is not JSON.\n  Write a number or null."),
        ('{"x": -Infinity}', "a.jsonl line 1: -Infinity is not JSON.\n  Write a number or null."),
        ('{"x": 1e999}', "a.jsonl line 1: 1e999 is not JSON.\n  Write a number or null."),
        (
            '{"x": ' + "9" * 5000 + "}",
            "a.jsonl line 1: a number has more than 4,300 digits.\n  Write it as a text in quotes.",
        ),
        (
            '{"x": ' + "[" * 100_000,
            "a.jsonl line 1: lists or objects are nested too deeply.\n  Flatten the row.",
        ),
        (
            '{"x": "\\ud83d"}',
            "a.jsonl line 1: an escape of \\ud800 to \\udfff stands alone; it is half of a "
            "character."
            "\n  Write both halves of the pair, or the character itself.",
        ),
        (
            f'{ROW}\n"text"',
            'a.jsonl line 2: the row is the text "text"; expected an object with named fields in '
            "{ }.",
        ),
    ],
)
def test_broken_rows_name_line_column_finding_and_mend(
    write: Write, text: str, expected: str
) -> None:
    assert faults(write("a.jsonl", text)) == [expected]


def test_a_broken_line_does_not_hide_the_next(write: Write) -> None:
    path = write("a.jsonl", f"{ROW}\n{{\n{ROW}\n{{\n{ROW}")
    assert [isinstance(row, Record) for row in read_records([path])] == [True, False] * 2 + [True]


def test_rows_behind_a_refused_one_in_a_list_are_read(write: Write) -> None:
    path = write("a.json", f'[{{"x": 1, "x": 2}}, {{"x": NaN}}, {ROW}]')
    assert [isinstance(row, Record) for row in read_records([path])] == [False, False, True]


def test_escaped_pair_is_one_character(write: Write) -> None:
    (row,) = records(write("a.jsonl", '{"x": "\\ud83d\\ude00"}'))
    assert row.value["x"] == "😀"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "a.jsonl is empty (0 bytes); expected a JSON list or one JSON object a line."),
        (" \n", "a.jsonl is empty (2 bytes, white space only)"),
        (
            "instruction,output\na,b",
            'a.jsonl line 1: the file begins with "instruction,output\\na"; expected a JSON list, '
            "which begins with [, or one JSON object a line, which begins with {.",
        ),
        (
            '{"x": "a"}\n{"x": "你好"}'.encode("gb18030"),
            "a.jsonl line 2: byte 0xc4 at offset 18 is not UTF-8; the file looks like GB18030.\n"
            "  Save it as UTF-8, for example: iconv -f GB18030 -t UTF-8 a.jsonl > utf8-a.jsonl",
        ),
        (
            ROW.encode("utf-16"),
            "a.jsonl line 1: byte 0xff at offset 0 is not UTF-8; the file looks like UTF-16.",
        ),
        (b'\xef\xbb\xbf{"x": "\x80"}', "a.jsonl line 1: byte 0x80 at offset 10 is not UTF-8.\n"),
    ],
)
def test_unusable_files(write: Write, content: str | bytes, expected: str) -> None:
    with pytest.raises(DataError) as error:
        read_file(write("a.jsonl", content))
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("Training has not started.")


def test_missing_file_names_the_near_ones(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train.jsonl", ROW)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read_file(Path("trian.jsonl"))
    assert str(error.value) == (
        f"trian.jsonl was not found (working directory: {tmp_path}).\n  Did you mean train.jsonl?"
    )
    with pytest.raises(DataError, match=r"Data files in \.: train\.jsonl\."):
        read_file(Path("zzz"))
    with pytest.raises(DataError, match="The folder nowhere does not exist"):
        read_file(Path("nowhere/train.jsonl"))


def test_a_folder_is_no_file(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", ROW)
    with pytest.raises(DataError) as error:
        read_file(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is a folder; expected a JSON or JSONL file.\n  Files in it: train.jsonl"
    )
