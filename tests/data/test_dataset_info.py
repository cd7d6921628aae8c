"""Entries of LLaMA-Factory's dataset_info.json, as its documentation shows them."""

import json
from pathlib import Path
from typing import Any

import pytest

from myna.data.dataset_info import look_up
from myna.errors import ConfigError


def registry(folder: Path, entry: Any) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({"mine": entry, "other": {"file_name": "o.json"}}))
    return path


@pytest.mark.parametrize(
    ("entry", "columns"),
    [
        ({"file_name": "a.json"}, {}),
        ({"file_name": "a.json", "formatting": "sharegpt"}, {}),
        (
            {"file_name": "a.json", "columns": {"prompt": "q", "query": "more", "response": "a"}},
            {"prompt": "q", "input": "more", "completion": "a"},
        ),
        (
            {"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "query": None}},
            {"prompt": "q", "completion": "a"},
        ),
        ({"file_name": "a.json", "columns": {"prompt": "body"}}, {"text": "body"}),
        (
            {
                "file_name": "a.json",
                "ranking": True,
                "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
            },
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
        ),
        (
            {
                "file_name": "a.json",
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "system": "persona", "tools": "tools"},
                "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me"},
            },
            {
                "messages": "talk",
                "system": "persona",
                "tools": "tools",
                "role": "who",
                "content": "says",
                "user_tag": "me",
            },
        ),
    ],
)
def test_columns_in_our_words(tmp_path: Path, entry: dict[str, Any], columns: Any) -> None:
    found = look_up(registry(tmp_path, entry), "mine")
    assert found.columns == columns
    assert found.file == tmp_path / "a.json"


def test_hub_ids(tmp_path: Path) -> None:
    entry = {"hf_hub_url": "a/b", "subset": "en", "split": "test", "folder": "d", "num_samples": 9}
    found = look_up(registry(tmp_path, {**entry, "revision": "main"}), "mine")
    assert (found.hub_id, found.file) == ("a/b", None)
    assert (found.subset, found.split, found.folder) == ("en", "test", "d")
    assert (found.revision, found.rows) == ("main", 9)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"file_nam": "a"}, 'unknown key "file_nam". Did you mean "file_name"?\n  Known keys: '),
        ({"formatting": "alpaca"}, "it has no file_name; expected file_name or hf_hub_url."),
        ({"ms_hub_url": "a/b"}, "it lies in ModelScope (ms_hub_url); expected file_name or hf_hub"),
        ({"script_url": "a"}, "it lies in a loading script (script_url); expected file_name"),
        ({"file_name": "a", "formatting": "x"}, "formatting is 'x'; expected alpaca, sharegpt or"),
        (
            {"file_name": "a", "columns": {"prmpt": "q"}},
            'columns: unknown key "prmpt". Did you mean "prompt"?',
        ),
        ({"file_name": "a", "columns": {"images": "i"}}, "columns has images; only text can be"),
        ({"file_name": "a", "columns": {"kto_tag": "k"}}, "columns has kto_tag; KTO is not SFT."),
        ({"file_name": "a", "tags": {"role_tag": "r"}}, "tags belong to formatting sharegpt;"),
        (
            {"file_name": "a", "formatting": "sharegpt", "tags": {"role": "r"}},
            'tags: unknown key "role". Did you mean "role_tag"?',
        ),
        ({"file_name": "a", "ranking": True}, "ranking needs the columns chosen and rejected."),
        ({"file_name": "a", "num_samples": -1}, "num_samples is -1; expected a whole number from"),
        ({"file_name": 3}, "file_name is 3; expected a text."),
        ({"file_name": "a", "columns": ["q"]}, "columns is ['q']; expected names with texts."),
        (["a"], "expected an object with file_name or hf_hub_url."),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, entry: Any, expected: str) -> None:
    path = registry(tmp_path, entry)
    with pytest.raises(ConfigError) as error:
        look_up(path, "mine")
    assert str(error.value).startswith(f'{path}, "mine"')
    assert expected in str(error.value)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    path = registry(tmp_path, {})
    with pytest.raises(ConfigError) as error:
        look_up(path, "othr")
    assert str(error.value) == (
        f'{path}: there is no "othr". Did you mean "other"?\n  It has: mine, other.'
    )
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"dataset_info\.json is not JSON: Expecting property"):
        look_up(path, "other")
