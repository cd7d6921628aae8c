"""What `datasets` fetches or has saved, without a network."""

import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from myna.config import DataEntry
from myna.data.files import Record, read_records
from myna.data.hub_datasets import fetch_dataset
from myna.data.sources import find_sources
from myna.errors import ConfigError, DataError

ROWS = [{"instruction": f"q{number}", "output": "a"} for number in range(250)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def values(files: list[Path]) -> list[object]:
    return [row.value for row in read_records(files) if isinstance(row, Record)]


def test_a_dataset_is_read_from_the_files_that_datasets_keeps(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[0]))
    files, note = fetch_dataset(str(folder))
    assert values(files) == ROWS
    assert note == f"{folder}: split train, 250 rows"
    files, _ = fetch_dataset(str(folder), split="test")
    assert values(files) == ROWS[:1]
    with pytest.raises(ConfigError) as error:
        fetch_dataset(str(folder), split="dev")
    assert 'as a hub id it could not be loaded: Unknown split "dev"' in str(error.value)


def test_without_a_network_an_id_is_refused_in_words() -> None:
    with pytest.raises(ConfigError) as error:
        find_sources(["owner/name@v2"])
    assert str(error.value).startswith(
        "owner/name@v2: no such file or folder, and as a hub id it could not be loaded: "
    )
    assert str(error.value).endswith(
        "  Check the name and the network; `subset` and `split` of the entry choose a part."
    )


def test_a_missing_file_with_a_suffix_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources, _ = find_sources(["data/rows.jsonl"])
    with pytest.raises(DataError, match=r"data/rows\.jsonl was not found"):
        list(read_records([source.path for source in sources]))


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    sources, notes = find_sources([str(tmp_path / "one")])
    assert len(sources) == 3
    assert values([source.path for source in sources]) == ROWS
    assert notes == ["one: saved by datasets"]
    # Rows that were chosen and shuffled before saving are saved so.
    chosen = whole.shuffle(seed=1).select(range(50))
    parts = datasets.DatasetDict({"train": chosen, "test": whole.select([0])})
    parts.save_to_disk(tmp_path / "two")
    sources, notes = find_sources([str(tmp_path / "two")])
    assert values([source.path for source in sources]) == list(chosen)
    assert notes == ["two: saved by datasets, split train"]
    sources, _ = find_sources([DataEntry(path=str(tmp_path / "two"), split="test")])
    assert values([source.path for source in sources]) == ROWS[:1]
    with pytest.raises(ConfigError, match="has no split dev; it has train, test"):
        find_sources([DataEntry(path=str(tmp_path / "two"), split="dev")])
    with pytest.raises(ConfigError, match="holds one split without a name"):
        find_sources([DataEntry(path=str(tmp_path / "one"), split="train")])
    datasets.DatasetDict({"a": whole, "b": whole}).save_to_disk(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"has the splits a, b and no train\.\n  Name one: "):
        find_sources([str(tmp_path / "three")])
