"""Preparation: rows of several kinds of files, what is seen meanwhile, which tokenizers differ."""

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console

from myna.cli.preparation import _rows_shown, _tokenizer_hash, prepare_rows
from myna.config import Config
from myna.config_file import load_config
from myna.data.loader import Draws
from myna.errors import DataError

ROWS = [{"instruction": f"What is {number}?", "output": f"It is {number}!"} for number in range(4)]


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "b.csv").write_text(
        "instruction;output\n" + "".join(f"{row['instruction']};{row['output']}\n" for row in ROWS)
    )
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "d.parquet")
    (folder / "README.md").write_text("About the rows.")
    path = tmp_path / "job.yaml"
    path.write_text(f"model: {tiny_model}\ndata: rows\n")
    return path


def prepare(job: Path, *overrides: str) -> Config:
    return load_config(job, overrides).config


def test_all_kinds_of_files_give_the_same_rows(job: Path) -> None:
    dataset = prepare_rows(prepare(job), trust_remote_code=False).dataset
    examples = [(example.prompt_text, example.completion_text) for example in dataset.examples]
    assert len(examples) == 16 and examples == examples[:4] * 4
    assert [example.place.row for example in dataset.examples] == [1, 2, 3, 4] * 4
    assert str(dataset.examples[-1].place) == "d.parquet row 4"
    assert any(
        note.endswith("rows: 4 files: a.json, b.csv, c.jsonl.gz, d.parquet; not read: README.md")
        for note in dataset.notes
    )
    assert "b.csv: CSV divided by a semicolon, columns instruction, output" in dataset.notes
    assert "d.parquet: Parquet, 4 rows, columns instruction, output" in dataset.notes


def test_bad_rows_stop_or_are_accounted_for(job: Path) -> None:
    with open(job.parent / "rows" / "b.csv", "a") as file:
        file.write('only one\n"";yes\n')
    with pytest.raises(DataError) as error:
        prepare_rows(prepare(job), trust_remote_code=False)
    assert "b.csv line 6: the row has 1 field; expected 2" in str(error.value)
    assert "b.csv line 7: instruction is empty" in str(error.value)
    dataset = prepare_rows(prepare(job, "train.on_bad_row=skip"), trust_remote_code=False).dataset
    assert dataset.accounting.to_json()["refused"] == {"fields": 1, "empty": 1}
    assert (dataset.accounting.rows_in, dataset.accounting.trained) == (18, 16)


def test_every_edit_of_the_data_changes_its_hash(job: Path) -> None:
    before = prepare_rows(prepare(job), trust_remote_code=False).hashes["data"]
    path = job.parent / "rows" / "a.json"
    path.write_text(path.read_text().replace("It is 3!", "It is 4!"))
    assert prepare_rows(prepare(job), trust_remote_code=False).hashes["data"] != before


def test_weights_of_sources_reach_the_examples(job: Path) -> None:
    config = prepare(job, "data=[{path: rows/a.json, weight: 2}, rows/b.csv]")
    dataset = prepare_rows(config, trust_remote_code=False).dataset
    assert dataset.examples.file_weights == (2.0, 1.0)
    assert any(note.endswith("each row counts 2 times per epoch") for note in dataset.notes)
    assert Draws.of(dataset.examples).num_rows == 4 * 2 + 4


def test_only_so_many_rows_are_taken(job: Path) -> None:
    config = prepare(job, "data=[{path: rows, rows: 6}]")
    dataset = prepare_rows(config, trust_remote_code=False).dataset
    assert dataset.accounting.rows_in == 6
    assert [str(each.place) for each in dataset.examples][3:] == [
        "a.json line 1",
        "b.csv line 2",
        "b.csv line 3",
    ]


def test_rows_are_shown_on_a_terminal_only() -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        with _rows_shown(Console(file=stream, force_terminal=terminal, width=80)) as show:
            show(12_345)
        assert ("12,345 rows" in stream.getvalue()) is terminal
        assert ("rows/s" in stream.getvalue()) is terminal


def test_code_that_decides_ids_is_part_of_the_tokenizer(tmp_path: Path) -> None:
    """A hash of the vocabulary alone would be that of another class, too."""

    def loaded(*, fast: bool) -> Any:
        tokenizer = SimpleNamespace(is_fast=fast)
        return SimpleNamespace(tokenizer=tokenizer, fingerprint="f" * 64, folder=tmp_path)

    (tmp_path / "tokenization.py").write_text("rule = 1")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert _tokenizer_hash(loaded(fast=True)) == "f" * 64
    first = _tokenizer_hash(loaded(fast=False))
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert _tokenizer_hash(loaded(fast=False)) == first
    (tmp_path / "tokenization.py").write_text("rule = 2")
    assert _tokenizer_hash(loaded(fast=False)) != first
