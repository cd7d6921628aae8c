import gzip
import hashlib
import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from myna.data.files import (
    BadRow,
    Record,
    content_hash,
    content_sha256,
    look_at,
    read_chunks,
    read_records,
)
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
    digests = [content_sha256(one), content_sha256(two)]
    assert digests[0] == hashlib.sha256(one.read_bytes()).hexdigest()
    assert content_hash(digests[:1]) == digests[0]
    assert content_hash(digests) != content_hash(digests[::-1])


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
            'a.jsonl line 1, column 10: the key "x" occurs twice in one object.\n'
            "  Keep one of them; a reader would silently take the last.",
        ),
        ('{"x": NaN}', "a.jsonl line 1, column 7: NaN is not JSON.\n  Write a number or null."),
        (
            '{"x": -Infinity}',
            "a.jsonl line 1, column 7: -Infinity is not JSON.\n  Write a number or null.",
        ),
        ('{"x": 1e999}', "a.jsonl line 1, column 7: 1e999 is not JSON.\n  Write a number or null."),
        (
            '{"x": ' + "9" * 5000 + "}",
            "a.jsonl line 1, column 7: a number has more than 4,300 digits.\n"
            "  Write it as a text in quotes.",
        ),
        (
            '{"x": ' + "[" * 100_000,
            "a.jsonl line 1, column 106: lists or objects are nested more than 100 deep.\n"
            "  Flatten the row.",
        ),
        (
            '{"x": "\\ud83d"}',
            "a.jsonl line 1, column 8: an escape of \\ud800 to \\udfff stands alone; it is half "
            "of a character."
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
            ROW.encode("utf-16"),
            "a.jsonl line 1: byte 0xff at offset 0 is not UTF-8; the file looks like UTF-16.",
        ),
    ],
)
def test_unusable_files(write: Write, content: str | bytes, expected: str) -> None:
    with pytest.raises(DataError) as error:
        look_at(write("a.jsonl", content))
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("Training has not started.")


def test_missing_file_names_the_near_ones(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train.jsonl", ROW)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        look_at(Path("trian.jsonl"))
    assert str(error.value) == (
        f"trian.jsonl was not found (working directory: {tmp_path}).\n  Did you mean train.jsonl?"
    )
    with pytest.raises(DataError, match=r"Data files in \.: train\.jsonl\."):
        look_at(Path("zzz"))
    with pytest.raises(DataError, match="The folder nowhere does not exist"):
        look_at(Path("nowhere/train.jsonl"))


def test_a_folder_is_no_file(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", ROW)
    with pytest.raises(DataError) as error:
        look_at(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is a folder; expected a data file.\n  Files in it: train.jsonl"
    )


def test_encodings_other_than_utf8(write: Write) -> None:
    assert faults(write("a.jsonl", f'{ROW}\n{{"x": "你好"}}'.encode("gb18030"))) == [
        f"a.jsonl line 2, column 8: byte 0xc4 at offset {len(ROW) + 8} is not UTF-8; it looks like "
        "GB18030.\n  Save the file as UTF-8, for example: iconv -f GB18030 -t UTF-8 OLD > NEW"
    ]
    (found,) = faults(write("b.jsonl", b'\xef\xbb\xbf{"x": "\x80"}'))
    assert found.startswith("b.jsonl line 1, column 8: byte 0x80 at offset 10 is not UTF-8.\n")
    listed = '[{"x": "é"},\n{"x": "'.encode() + b"\x80" + b'"}]'
    (found,) = faults(write("c.json", b"\xef\xbb\xbf" + listed))
    assert found.startswith("c.json line 2, column 8: byte 0x80 at offset 24 is not UTF-8.\n")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_encodings_without_a_byte_order_mark(write: Write, encoding: str) -> None:
    with pytest.raises(DataError) as error:
        look_at(write("a.jsonl", '{"instruction": "你好", "output": "hello"}'.encode(encoding)))
    assert f"the file looks like {encoding[:6].upper()}{encoding[-2:].upper()}." in str(error.value)


def test_chunks_are_small_and_can_be_parsed_elsewhere(write: Write) -> None:
    rows = [{"x": number, "text": "é" * 3} for number in range(2_500)]
    for path in (
        write("a.jsonl", "\n".join(json.dumps(row) for row in rows)),
        write("b.json", json.dumps(rows, indent=1)),
        write("c.csv", "x,text\n" + "".join(f"{row['x']},{row['text']}\n" for row in rows)),
        write("d.txt", "\n\n".join(str(row["x"]) for row in rows)),
    ):
        chunks = list(read_chunks(path))
        assert [len(list(chunk.records())) for chunk in chunks] == [1000, 1000, 500]
        assert [chunk.num_rows for chunk in chunks] == [1000, 1000, 500]
        sent = [pickle.loads(pickle.dumps(chunk)) for chunk in chunks]
        elsewhere = [row for chunk in reversed(sent) for row in chunk.records()][::-1]
        assert sorted(elsewhere, key=lambda row: row.place.row) == list(read_records([path]))


def test_a_chunk_ends_with_the_row_that_fills_it(write: Write) -> None:
    long = "a" * 600_000
    for path in (
        write("a.jsonl", f'{{"x": "{long}"}}\n' * 5),
        write("b.json", "[" + ", ".join(f'{{"x": "{long}"}}' for _ in range(5)) + "]"),
        write("c.csv", "x\n" + f"{long}\n" * 5),
        write("d.txt", f"{long}\n\n" * 5),
    ):
        assert [len(list(chunk.records())) for chunk in read_chunks(path)] == [2, 2, 1]


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_packed_files_are_told_by_their_first_bytes(
    tmp_path: Path, write: Write, packing: str
) -> None:
    text = "".join(f'{{"x": {number}}}\n' for number in range(20_000)).encode()
    zstd = pyarrow.Codec("zstd")
    content = gzip.compress(text) if packing == "gzip" else zstd.compress(text, asbytes=True)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        path = write(name, content)
        assert [row.value["x"] for row in records(path)] == list(range(20_000))
        assert look_at(path).note == f"unpacked from {packing}"
        assert content_sha256(path) == hashlib.sha256(content).hexdigest()
    twice = write("twice.jsonl.gz", content + content)
    assert len(records(twice)) == 40_000
    csv = write("a.csv.gz", gzip.compress(b"x,y\n1,2\n"))
    assert [row.value for row in records(csv)] == [{"x": "1", "y": "2"}]
    cut = write("cut.jsonl", content[: len(content) // 2])
    with pytest.raises(DataError) as error:
        records(cut)
    assert str(error.value) == (
        f"cut.jsonl: the {packing} file ends in its middle; expected its end mark.\n"
        "  Was it cut off? Fetch or pack it again. Training has not started."
    )
    broken = bytearray(content)
    broken[8:40] = bytes(32)
    with pytest.raises(DataError, match=f"could not be read as a {packing} file \\(|ends in its"):
        records(write("broken.jsonl", bytes(broken)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b"PAR1....", "a.json is named .json, but its content looks like Parquet.\n"
         "  If it is, rename it to a.parquet."),
        ("a.jsonl", b"ARROW1\0\0", "a.jsonl is named .jsonl, but its content looks like Arrow."),
        ("a.parquet", b'{"x": 1}', 'a.parquet is named .parquet and begins with "{\\"x\\": 1}"; '
         "expected Parquet."),
        ("a.csv", b'{"x": 1}', "a.csv is named .csv, but its content looks like JSON.\n"
         "  If it is, rename it to a.jsonl."),
        ("a.json.gz", gzip.compress(b"PAR1....", mtime=0), "a.json.gz is Parquet inside gzip; "
         "expected it unpacked."),
        ("a.json", b"PK\x03\x04\x14\0\0\0[Content_Types].xml", "a.json looks like an Excel "
         "workbook; expected rows as JSON, CSV, Parquet, Arrow or text.\n  Save the sheet as CSV"),
        ("a.json", b"PK\x03\x04\x14\0\0\0rows.json", "a.json looks like a zip archive;"),
        ("a.json", b"%PDF-1.7\n", "a.json looks like a PDF document;"),
        ("a.txt", b"%PDF-1.7\n", "a.txt looks like a PDF document;"),
        ("a.json", b"\n<!DOCTYPE HTML><html>", "a.json looks like an HTML page; expected rows as "
         "JSON, CSV, Parquet, Arrow or text.\n  Fetch the data itself, not the page around it."),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a.json looks like "
         "a Git LFS pointer, which stands for the data; expected rows as JSON, CSV, Parquet, Arrow "
         "or text.\n  Run `git lfs pull`."),
        ("a.json", b"\x80\x04\x95", "a.json looks like a Python pickle; expected rows as JSON, "
         "CSV, Parquet, Arrow or text.\n  Pickles are never read."),
        ("a.json", b"name\tanswer\n", 'a.json line 1: the file begins with "name\\tanswer\\n"; '
         "expected a JSON list, which begins with [, or one JSON object a line, which begins with "
         "{.\n  If it is a table, name it a.tsv."),
    ],
)  # fmt: skip
def test_content_of_another_kind_is_named(
    write: Write, name: str, content: bytes, expected: str
) -> None:
    with pytest.raises(DataError) as error:
        look_at(write(name, content))
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("Training has not started.")


def test_nul_bytes_at_the_end_come_from_a_damaged_disk(write: Write) -> None:
    assert faults(write("a.jsonl", f"{ROW}\n".encode() + bytes(4096))) == [
        "a.jsonl line 2, column 1: 4,096 NUL bytes (0x00) stand in the line; expected text.\n"
        "  The file was damaged, by a full disk or a power failure: restore it, or remove them."
    ]
    (found,) = faults(write("b.jsonl", '{"x": "a\0b"}'))
    assert found.startswith("b.jsonl line 1, column 9: broken JSON: found ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_row_of_a_hundred_megabytes_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    before, row, after = {
        "a.jsonl": ('{"x": "1"}\n\n{"x": "', '"}\n', '{"x": "3"}\n'),
        "a.json": ('[{"x": "1"},\n\n{"x": "', '"},\n', '{"x": "3"}]\n'),
        "a.csv": ("x\n1\n", "\n", "3\n"),
        "a.txt": ("1\n\n", "\n\n", "3\n"),
    }[name]
    with open(path, "w") as file:
        file.write(before)
        for _ in range(100):
            file.write("0" * 1_000_000)
        file.write(row + after)
    tracemalloc.start()
    rows = list(read_records([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    bad = rows[1]
    assert isinstance(bad, BadRow) and isinstance(rows[0], Record)
    assert str(bad.fault).startswith(f"{name} line 3: the ")
    assert "is longer than 8 MiB" in str(bad.fault)
    # Where the end of such a row can be seen, the next one is read.
    assert len(rows) == (3 if name in ("a.jsonl", "a.txt") else 2)
    assert bad.fault.ends_file == (len(rows) == 2)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is no regular file; expected one that can be read more"):
        look_at(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is no name of a file"):
        look_at(Path("a\0b.jsonl"))


def test_an_edit_that_keeps_size_and_time_changes_the_hash(write: Write) -> None:
    content = bytearray(b"\n".join(json.dumps({"x": n}).encode() for n in range(10_000)))
    path = write("a.jsonl", bytes(content))
    status = path.stat()
    seen = {content_sha256(path)}
    generator = random.Random(0)
    for _ in range(100):
        position = generator.randrange(len(content))
        content[position] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (len(content), status.st_mtime_ns)
        seen.add(content_sha256(path))
    assert len(seen) == 101
