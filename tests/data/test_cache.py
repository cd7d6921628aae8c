"""The cache: what is read back is what was written, whatever happened in between."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from myna.data import cache
from myna.data.cache import NAMES, Entry, cache_bytes, cache_folder
from myna.data.conversation import Place
from myna.data.store import Columns, Example, Examples, columns_of
from myna.errors import StorageError

FILE = Path("rows.jsonl")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(first: int, number: int) -> list[Example]:
    return [
        Example(f"q{at}é", f"a{at}", (1, at, 7), (at + 3, 2)[: 1 + at % 2], Place(FILE, at, at), 1)
        for at in range(first, first + number)
    ]


def columns(first: int, number: int) -> Columns:
    return columns_of(rows(first, number), [FILE])


def written(key: str, number: int = 20) -> Entry:
    entry = Entry(key)
    filling = entry.fill({"ids": "uint16"})
    filling.append(columns(1, number))
    filling.finish({"notes": ["é"]})
    return entry


def examples(entry: Entry) -> list[Example]:
    found = entry.open()
    assert found is not None
    return list(Examples(found[0], [FILE]))


def test_what_was_written_is_read(folder: Path) -> None:
    entry = Entry("a" * 8)
    assert entry.open() is None
    filling = entry.fill({"ids": "uint16"})
    for first in (1, 11, 31):
        filling.append(columns(first, 10 if first < 31 else 0))
    assert list(Examples(filling.columns(), [FILE])) == rows(1, 20)
    filling.finish({"notes": ["é"]})
    found = entry.open()
    assert found is not None and found[1] == {"notes": ["é"]}
    assert examples(entry) == rows(1, 20)
    assert found[0]["ids"].dtype == np.uint16 and found[0]["id_starts"].dtype == np.int64
    assert (folder / "encoded" / ("a" * 8)).is_dir() and cache_bytes() > 0


def test_ids_that_do_not_fit_are_not_cut_off() -> None:
    filling = Entry("a").fill({"ids": "uint16"})
    with pytest.raises(AssertionError, match="ids cut off"):
        filling.append(columns(70_000, 1))
    filling.close()


def test_a_process_that_was_killed_is_gone_on_with() -> None:
    filling = Entry("a").fill({})
    assert filling.state is None
    filling.append(columns(1, 10))
    filling.commit({"chunks": 1})
    filling.append(columns(11, 10))
    filling.commit({"chunks": 2})
    filling.append(columns(90, 9))  # never committed
    filling.close()
    assert Entry("a").open() is None
    again = Entry("a").fill({})
    assert again.state == {"chunks": 2}
    again.append(columns(21, 5))
    again.commit({"chunks": 3})
    again.close()
    last = Entry("a").fill({})
    assert last.state == {"chunks": 3}
    last.finish({})
    assert examples(Entry("a")) == rows(1, 25)


def test_a_commit_that_was_cut_off_is_not_taken() -> None:
    filling = Entry("a").fill({})
    filling.append(columns(1, 10))
    filling.commit({"chunks": 1})
    filling.append(columns(11, 10))
    filling.commit({"chunks": 2})
    filling.close()
    journal = Entry("a").partial / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    again = Entry("a").fill({})
    assert again.state == {"chunks": 1}
    again.finish({})
    assert examples(Entry("a")) == rows(1, 10)


@pytest.mark.parametrize("name", ["ids", "texts", "rows", "journal.jsonl"])
def test_what_was_damaged_before_it_was_finished_begins_anew(name: str) -> None:
    filling = Entry("a").fill({})
    filling.append(columns(1, 10))
    filling.commit({"chunks": 1})
    filling.close()
    flip(Entry("a").partial / name)
    again = Entry("a").fill({})
    assert again.state is None and len(again.columns()["rows"]) == 0
    again.close()


def flip(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "torn", "gone"])
def test_a_damaged_entry_is_noticed_and_can_be_made_again(name: str, damage: str) -> None:
    entry = written("a")
    path = entry.folder / name
    stat = path.stat()
    if damage == "bit":
        flip(path)
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    if path.exists():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert entry.open() is None
    assert not entry.folder.exists()
    assert examples(written("a")) == rows(1, 20)


def test_notes_that_were_changed_are_noticed() -> None:
    entry = written("a")
    path = entry.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["noted"]["notes"] = ["all is well"]
    path.write_text(json.dumps(manifest))
    assert entry.open() is None


def test_the_longest_unused_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, key in enumerate("abc"):
        entry = written(key)
        os.utime(entry.folder, (1000 + number, 1000 + number))
    size = cache_bytes() // 3
    assert Entry("a").open() is not None  # used: now b was longest not used
    monkeypatch.setattr(cache, "MAX_BYTES", int(3.5 * size))
    written("d")
    assert [Entry(key).open() is not None for key in "abcd"] == [True, False, True, True]
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    written("e")
    assert [Entry(key).open() is not None for key in "abcde"] == [False] * 4 + [True]


def test_the_folder_is_named_or_the_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("MYNA_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("MYNA_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/myna")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "myna"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "myna"


def test_a_folder_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError) as error, Entry("a").locked():
        pass
    assert str(error.value) == (
        f"{tmp_path / 'file'}: the cache of encoded rows cannot be written: Not a directory.\n"
        "  Set MYNA_CACHE to a folder on a disk with more room."
    )


def test_a_full_disk_is_said() -> None:
    entry = Entry("a")
    filling = entry.fill({})
    filling._files["texts"].close()
    filling._files["texts"] = open("/dev/full", "ab")  # noqa: SIM115
    filling.append(columns(1, 10))
    with pytest.raises(StorageError, match="No space left on device"):
        filling.commit({})
    with contextlib.suppress(OSError):
        filling._files.pop("texts").close()
    filling.close()


def test_who_comes_second_waits() -> None:
    order: list[str] = []

    def second() -> None:
        with Entry("a").locked():
            order.append("second")

    with Entry("a").locked():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
