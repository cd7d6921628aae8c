"""Parquet and Arrow, written by pyarrow and `datasets`."""

import datetime
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from myna.data.files import BadRow, Record, look_at, read_chunks, read_records
from myna.data.records import NotJson, describe
from myna.errors import DataError

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"你好 {number}", "name": None},
            {"role": "assistant", "content": "hello", "name": "A" if number % 2 else None},
        ],
        "score": number / 4,
        "tags": [["a"], []] if number % 3 else None,
        "id": number,
        "ok": number % 2 == 0,
    }
    for number in range(2_500)
]


def without_null_fields(row: dict[str, Any]) -> dict[str, Any]:
    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


WRITERS: dict[str, Callable[[pa.Table, Path], Any]] = {
    "a.parquet": lambda table, path: pa.parquet.write_table(table, path, row_group_size=700),
    "a.arrow": write_stream,
    "a.feather": lambda table, path: pa.feather.write_feather(table, path, compression="zstd"),
    "no_suffix": write_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](pa.Table.from_pylist(ROWS), path)
    chunks = list(read_chunks(path))
    assert all(len(list(chunk.records())) == chunk.num_rows <= 1000 for chunk in chunks)
    sent = [pickle.loads(pickle.dumps(chunk)) for chunk in chunks]
    rows = [row for chunk in sent for row in chunk.records()]
    assert all(isinstance(row, Record) for row in rows)
    assert [row.value for row in rows] == [without_null_fields(row) for row in ROWS]
    assert [row.place.row for row in rows] == list(range(1, 2_501))
    assert str(rows[41].place) == f"{name} row 42"
    assert "columns messages, score, tags, id, ok" in look_at(path).note


def test_texts_of_every_width_and_categories(tmp_path: Path) -> None:
    texts = ["a", None, "é😀"]
    table = pa.table(
        {
            "large": pa.array(texts, pa.large_string()),
            "view": pa.array(texts, pa.string_view()),
            "category": pa.array(texts).dictionary_encode(),
            "fixed": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
            "none": pa.nulls(3),
        }
    )
    write_stream(table, tmp_path / "a.arrow")
    rows = [row.value for row in read_records([tmp_path / "a.arrow"]) if isinstance(row, Record)]
    fixed = ([1, 2], None, [3, 4])
    assert rows == [
        {"large": text, "view": text, "category": text, "fixed": pair, "none": None}
        for text, pair in zip(texts, fixed, strict=True)
    ]


def test_columns_that_json_has_no_like_of(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 1, 1)
    table = pa.table(
        {
            "output": ["yes"],
            "when": pa.array([moment]),
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())),
            "deep": pa.array([[{"at": [moment]}]]),
            "bytes": pa.array([b"\xff"]),
        }
    )
    for name, write in WRITERS.items():
        path = tmp_path / name
        write(table, path)
        (row,) = read_records([path])
        assert isinstance(row, Record)
        assert row.value["output"] == "yes"
        assert row.value["when"] == NotJson("timestamp[us]")
        assert describe(row.value["when"]) == "of type timestamp[us]"
        assert describe(row.value["map"]).startswith("of type map<string, int32")
        assert row.value["deep"] == NotJson("timestamp[us] in deep[].at[]")
        assert row.value["bytes"] == NotJson("binary")
        assert "columns output; when is not read (timestamp[us]); map is" in look_at(path).note


def test_json_columns_of_datasets_keep_their_nulls(tmp_path: Path) -> None:
    tools = ['{"a": {"b": null}}', None]
    table = pa.table(
        {
            "tools": pa.array(tools, pa.json_()),
            "inside": pa.ListArray.from_arrays(
                [0, 1, 2],
                pa.StructArray.from_arrays([pa.array(tools, pa.json_())], names=["arguments"]),
            ),
        }
    )
    write_stream(table, tmp_path / "a.arrow")
    rows = [row.value for row in read_records([tmp_path / "a.arrow"]) if isinstance(row, Record)]
    assert rows == [
        {"tools": {"a": {"b": None}}, "inside": [{"arguments": {"a": {"b": None}}}]},
        {"tools": None, "inside": [{}]},
    ]


def test_a_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xc4\xe3", b"c"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pa.parquet.write_table(pa.table({"x": texts}), tmp_path / "a.parquet")
    rows = list(read_records([tmp_path / "a.parquet"]))
    assert [isinstance(row, Record) for row in rows] == [True, False, True]
    assert isinstance(rows[1], BadRow)
    assert str(rows[1].fault).startswith(
        "a.parquet row 2: a text holds byte 0xc4, which is no UTF-8."
    )


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    write_stream(table, tmp_path / "a.arrow")
    with pytest.raises(DataError, match=r'a\.arrow: two columns are named "x"; expected different'):
        look_at(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_a_file_that_is_cut_off(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](pa.Table.from_pylist(ROWS), path)
    content = path.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError) as error:
            list(read_records([path]))
        kind = "Parquet" if name == "a.parquet" else "Arrow"
        assert str(error.value).startswith(f"{name} could not be read as {kind} (")
        assert str(error.value).endswith(
            "  Was the file cut off? Fetch or write it again. Training has not started."
        )


def test_a_long_row_is_refused_and_its_neighbours_are_not(tmp_path: Path) -> None:
    texts = ["a", "b" * (9 << 20), "c"]
    for name in ("a.parquet", "a.arrow"):
        WRITERS[name](pa.table({"x": texts}), tmp_path / name)
        rows = list(read_records([tmp_path / name]))
        assert [isinstance(row, Record) for row in rows] == [True, False, True]
        assert isinstance(rows[1], BadRow)
        assert str(rows[1].fault).startswith(f"{name} row 2: the row is longer than 8 MiB;")
