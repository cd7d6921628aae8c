from pathlib import Path

import pytest
from huggingface_hub import constants

from myna.errors import ConfigError
from myna.models.source import find_folder, list_files, read_json


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert find_folder(str(tmp_path)) == tmp_path


def test_a_file_is_answered_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ConfigError) as caught:
        find_folder(str(path))
    assert str(caught.value) == (
        f"model: {path} is a file; expected a folder with config.json and weights, or a hub id.\n"
        f"  Give its folder: {tmp_path}"
    )


def test_what_is_no_folder_and_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_folder(f"{tmp_path}/missing")
    assert str(caught.value) == (
        f"model: there is no folder {tmp_path}/missing, and it cannot be a hub id, which looks "
        "like name/model."
    )


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_folder("somebody/some-model")
    text = str(caught.value)
    assert text.startswith(
        f"model: somebody/some-model is no folder here (looked in {tmp_path}), and as a hub id it "
        "is not in the local cache and the hub cannot be reached.\n"
        "  Connect, or download it elsewhere with `hf download` and give the folder.\n"
    )


def test_json_errors_name_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_json(path) == {}
    path.write_text('{\n "a": 1,\n "b" 2}', "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    assert str(caught.value) == (
        f"{path} line 3, column 6: not JSON (Expecting ':' delimiter).\n"
        "  The file may be cut short; fetch it again."
    )
    path.write_text("[1]", "utf-8")
    with pytest.raises(ConfigError, match=r"holds a list; expected an object"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_json(path)


def test_listing_is_cut_after_twenty(tmp_path: Path) -> None:
    assert list_files(tmp_path) == "nothing"
    (tmp_path / "sub").mkdir()
    for number in range(22):
        (tmp_path / f"{number:02d}.txt").touch()
    assert list_files(tmp_path).startswith("00.txt, 01.txt, ")
    assert list_files(tmp_path).endswith("19.txt and 3 more")
