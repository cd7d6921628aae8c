"""From `data` of the settings to rows, of several kinds of files at once."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from myna.cli.preparation import prepare_rows
from myna.config import Config
from myna.config_file import load_config
from myna.errors import ConfigError, DataError

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


def test_a_weight_is_not_ignored(job: Path) -> None:
    with pytest.raises(ConfigError, match="the weight of a source is not used yet; expected 1"):
        prepare_rows(prepare(job, "data=[{path: rows, weight: 2}]"), trust_remote_code=False)
