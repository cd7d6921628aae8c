"""What entries of `data` mean."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from myna.config import DataEntry
from myna.data.sources import Source, find_sources, read_sources, source_name
from myna.errors import ConfigError, DataError

Write = Callable[[str, str | bytes], Path]
ROW = '{"instruction": "a", "output": "b"}\n'


def names(folder: Path, **entry: object) -> list[str]:
    sources, _ = find_sources([DataEntry(path=str(folder), **entry)])
    return [str(source.path.relative_to(folder)) for source in sources]


def refusal(*data: str | DataEntry) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        find_sources(data)
    return str(error.value)


def test_a_file_is_taken_as_it_is(write: Write) -> None:
    path = write("a.anything", ROW)
    assert find_sources([str(path)]) == ([Source(path)], [])


def test_a_folder_gives_its_data_files_in_order_and_names_the_others(
    write: Write, tmp_path: Path
) -> None:
    for name in ("b.jsonl", "a.csv", "c.parquet", "d.json.gz", "E.JSON"):
        write(name, ROW)
    for name in ("README.md", "readme.txt", ".hidden.json", "notes.txt", "dataset_infos.json"):
        write(name, ROW)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "f.jsonl").write_text(ROW)
    assert names(tmp_path) == ["E.JSON", "a.csv", "b.jsonl", "c.parquet", "d.json.gz"]
    _, notes = find_sources([str(tmp_path)])
    assert notes == [
        f"{tmp_path}: 5 files: E.JSON, a.csv, b.jsonl, c.parquet, d.json.gz; not read: "
        ".hidden.json, README.md, dataset_infos.json, notes.txt, readme.txt"
    ]


def test_texts_are_data_where_nothing_else_is(write: Write, tmp_path: Path) -> None:
    write("one.txt", "a")
    write("two.txt", "b")
    write("LICENSE.txt", "c")
    assert names(tmp_path) == ["one.txt", "two.txt"]


def test_files_of_several_splits_are_not_mixed(write: Write, tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-0.parquet"):
        write(name, ROW)
    write("my_val.parquet", ROW)
    text = refusal(str(tmp_path))
    assert text.startswith(f"{tmp_path} has files of several splits by their names (")
    assert text.endswith(f"Say which: {{path: {tmp_path}, split: train}}, or list the files.")
    train = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert names(tmp_path, split="train") == train
    assert names(tmp_path, split="validation") == ["my_val.parquet"]
    assert "has no files of split dev2; it has my_val.parquet," in refusal(
        DataEntry(path=str(tmp_path), split="dev2")
    )
    sources, _ = find_sources([f"{tmp_path}/train*.parquet"])
    assert [source.path.name for source in sources] == train


def test_globs(write: Write, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.md"):
        write(name, ROW)
    (tmp_path / "inner").mkdir()
    write("inner/d.jsonl", ROW)
    sources, notes = find_sources([f"{tmp_path}/**/*"])
    assert [source.path.name for source in sources] == ["a.jsonl", "b.jsonl", "d.jsonl"]
    assert notes == [f"{tmp_path}/**/*: 3 files: a.jsonl, b.jsonl, d.jsonl; not read: c.md"]
    text = refusal(f"{tmp_path}/*.csv")
    assert text.startswith(f"{tmp_path}/*.csv: no data files (.json, .jsonl,")
    assert text.endswith("Training has not started.")
    literal = write("a[1].jsonl", ROW)  # a name that looks like a pattern
    assert find_sources([str(literal)])[0] == [Source(literal)]


def test_an_empty_folder_names_what_lies_deeper(write: Write, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write("data/train.parquet", ROW)
    write("README.md", "")
    text = refusal(str(tmp_path))
    assert "It has README.md." in text
    assert f"Folders in it have data/train.parquet: give such a folder, or {tmp_path}/**/*" in text


def test_an_entry_carries_weight_rows_and_columns(write: Write) -> None:
    one, two = write("a.jsonl", ROW), write("b.jsonl", ROW)
    entry = DataEntry(path=str(two), weight=0.5, rows=10, columns={"prompt": "q"})
    sources, notes = find_sources([str(one), entry])
    assert sources == [Source(one), Source(two, 0.5, {"prompt": "q"}, 10, 1)]
    assert notes == [
        f"{two}: each row counts 0.5 times per epoch",
        f"{two}: only the first 10 rows are taken",
    ]


def test_the_rows_of_an_entry_are_counted_over_its_files(write: Write) -> None:
    paths = [write(name, ROW * 3) for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")]
    limited = [Source(path, rows=4, entry=0) for path in paths[:3]]
    found = [
        (number, row.place.row)
        for number, chunk in read_sources([*limited, Source(paths[3], entry=1)])
        for row in pickle.loads(pickle.dumps(chunk)).records()
    ]
    assert found == [(0, 1), (0, 2), (0, 3), (1, 1), (3, 1), (3, 2), (3, 3)]


def test_a_file_twice_is_a_weight(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", ROW)
    assert refusal(str(path), str(tmp_path)) == (
        f"{path} is given twice in data.\n"
        "  Name it once; {path: …, weight: 2} takes its rows twice per epoch."
    )


def test_split_and_subset_of_a_file_mean_nothing(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", ROW)
    assert refusal(DataEntry(path=str(path), split="train")) == (
        f"{path} is a file; `split` is for hub ids and folders.\n  Leave it out."
    )
    assert "`subset` is for hub ids" in refusal(DataEntry(path=str(tmp_path), subset="en"))


def test_names_of_a_registry(write: Write, tmp_path: Path) -> None:
    entries = {
        "one": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}},
        "two": {"file_name": "folder", "num_samples": 5, "split": "train"},
        "three": {"file_name": "a.json", "split": "train"},
    }
    registry = write("dataset_info.json", json.dumps(entries))
    path = write("a.json", ROW)
    (tmp_path / "folder").mkdir()
    write("folder/train.json", ROW)
    write("folder/test.json", ROW)
    sources, notes = find_sources([f"{registry}:one"])
    assert sources == [Source(path, columns={"prompt": "q", "completion": "a"})]
    assert notes == ["dataset_info.json, one: a.json; columns prompt: q, completion: a"]
    sources, _ = find_sources([f"{registry}:two"])
    assert sources == [Source(tmp_path / "folder" / "train.json", rows=5)]
    assert find_sources([f"{registry}:three"])[0] == [Source(path)]
    assert 'there is no "tow". Did you mean "two"?' in refusal(f"{registry}:tow")
    assert refusal(str(registry)) == (
        f"{registry} lists data sets and holds no rows.\n  Name one of them: {registry}:NAME."
    )


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ("rows.jsonl", "rows"),
        ("/a/rows.v2.json.gz", "rows.v2"),
        ("data/*.jsonl", "data"),
        ("*.jsonl", "data"),
        ("/a/b/**/*.csv", "b"),
        ("owner/name@main", "name"),
        ("owner/name-1.5", "name-1.5"),
        ("/a/dataset_info.json:identity", "identity"),
        (DataEntry(path="folder/"), "folder"),
    ],
)
def test_a_run_is_named_after_its_first_source(item: str | DataEntry, name: str) -> None:
    assert source_name(item) == name
