"""The cache: every data set is encoded once, and kept under the hash of all that decides its ids.

Owns the folder, its size, and that what is read back is what was written. An entry is a folder with
one file per column and a manifest with their sizes and sums; it is filled aside and renamed when it
is whole, and what a killed process left is gone on with. What makes up a key is `pipeline.py`'s.

    $MYNA_CACHE, or the cache folder of the system
      encoded/<key>/           manifest.json  ids  texts  prompt_lengths …
      encoded/<key>.partial/   journal.jsonl  ids  texts  prompt_lengths …
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from myna.data.store import COLUMNS, HEAPS, Columns, behind
from myna.errors import StorageError
from myna.run_dir import sync_folder, write_file

MAX_BYTES = 20 * 10**9
"""Size of all entries together; those that were longest not used go first. A million rows of 100
tokens take about 0.8 GB."""

NAMES = (*COLUMNS, *HEAPS)
"""Of the arrays of an entry, each in a file of its own."""

_MANIFEST = "manifest.json"
_JOURNAL = "journal.jsonl"
_BLOCK = 1 << 22


def cache_folder() -> Path:
    """`MYNA_CACHE`, or myna's folder where the system keeps caches."""
    if named := os.environ.get("MYNA_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "myna"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "myna"


def cache_bytes() -> int:
    """Size of all entries."""
    return sum(_size(entry) for entry in _entries())


@dataclass(frozen=True)
class Entry:
    """What stands, or will stand, under one key."""

    key: str

    @property
    def folder(self) -> Path:
        """The finished entry."""
        return cache_folder() / "encoded" / self.key

    @property
    def partial(self) -> Path:
        """The same while it is filled."""
        return self.folder.with_name(f"{self.key}.partial")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the entry: of several processes with one task, one does it and the others wait.

        Raises StorageError where the cache cannot be written.
        """
        with _storage_errors():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            path = self.folder.with_name(f"{self.key}.lock")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # file systems without locks: all do it
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def open(self) -> tuple[Columns, dict[str, Any]] | None:
        """The columns, mapped from their files, and what was noted with them; None: there is none.

        An entry that is not what was written is removed.
        """
        try:
            manifest = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
            arrays, noted = manifest["arrays"], manifest["noted"]
            if manifest["sha256"] != _sum_of_json(arrays, noted):
                raise ValueError("the manifest is not what was written")
            with ThreadPoolExecutor() as threads:  # hashing lets other threads run
                sums = threads.map(lambda name: _hash_of(self.folder / name).hexdigest(), NAMES)
                if list(sums) != [arrays[name]["sha256"] for name in NAMES]:
                    raise ValueError("a column is not what was written")
            columns = {name: _mapped(self.folder / name, arrays[name]["dtype"]) for name in NAMES}
            os.utime(self.folder)  # the least recently used goes first
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        except OSError:  # it cannot be read by this process at this time
            return None
        return columns, noted

    def fill(self, dtypes: Mapping[str, str]) -> "Filling":
        """Begin the entry, or go on with what a process that was killed had written of it.

        Args:
            dtypes: of columns that are kept in another than their own.

        Raises StorageError where the cache cannot be written.
        """
        return Filling(self, {**COLUMNS, **HEAPS, **dtypes})


class Filling:
    """An entry that is being written: rows are appended, committed from time to time, finished."""

    def __init__(self, entry: Entry, dtypes: Mapping[str, str]) -> None:
        self._entry = entry
        self._folder = entry.partial
        self._dtypes = dtypes
        self.state: dict[str, Any] | None = None
        """What was given to the last `commit` of the process that began the entry."""
        self._files: dict[str, BinaryIO] = {}
        self._sums: dict[str, Any] = {}
        with _storage_errors():
            sizes = self._take_up()
            for name in NAMES:
                path = self._folder / name
                path.touch()
                os.truncate(path, sizes.get(name, 0))
                self._sums[name] = _hash_of(path)
                self._files[name] = open(path, "ab")  # noqa: SIM115 # closed by `close`
            self._journal = open(self._folder / _JOURNAL, "ab")  # noqa: SIM115 # likewise

    def _take_up(self) -> dict[str, int]:
        """Sizes of what is there and whole."""
        try:
            lines = (self._folder / _JOURNAL).read_bytes().splitlines(keepends=True)
            # The last line may be torn.
            line = next(line for line in reversed(lines[-2:]) if line.endswith(b"\n"))
            found = json.loads(line)
            sizes: dict[str, int] = found["bytes"]
            for name in NAMES:
                if _hash_of(self._folder / name, sizes[name]).hexdigest() != found["sha256"][name]:
                    raise ValueError(f"{name} is not what was written")
            self.state = found["state"]
            return sizes
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            return {}

    def append(self, columns: Columns) -> None:
        """Write examples behind those that are there.

        Raises StorageError where the disk is full.
        """
        ids = self._files["ids"].tell() // np.dtype(self._dtypes["ids"]).itemsize
        with _storage_errors():
            for name, column in behind(columns, ids, self._files["texts"].tell()).items():
                kept = np.ascontiguousarray(column, self._dtypes[name])
                assert kept.dtype == column.dtype or np.array_equal(kept, column), f"{name} cut off"
                self._files[name].write(kept.data)
                self._sums[name].update(kept.data)

    def commit(self, state: dict[str, Any]) -> None:
        """Have what is appended on disk; a process that goes on later finds `state`."""
        with _storage_errors():
            self._flush()
            line = {
                "state": state,
                "bytes": {name: file.tell() for name, file in self._files.items()},
                "sha256": {name: each.hexdigest() for name, each in self._sums.items()},
            }
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def columns(self) -> Columns:
        """What was appended, mapped from the files."""
        for file in self._files.values():
            file.flush()
        return {name: _mapped(self._folder / name, self._dtypes[name]) for name in NAMES}

    def discard(self) -> None:
        """Forget all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self, noted: dict[str, Any]) -> None:
        """Make it an entry: everything on disk, the manifest, then the name.

        Older entries are removed where all together are larger than `MAX_BYTES`.
        """
        with _storage_errors():
            self._flush()
            self.close()
            arrays = {
                name: {"dtype": self._dtypes[name], "sha256": each.hexdigest()}
                for name, each in self._sums.items()
            }
            manifest = {"arrays": arrays, "noted": noted, "sha256": _sum_of_json(arrays, noted)}
            write_file(self._folder / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            shutil.rmtree(self._entry.folder, ignore_errors=True)
            os.rename(self._folder, self._entry.folder)
            sync_folder(self._entry.folder.parent)
            (self._entry.folder / _JOURNAL).unlink()
        _prune(keep=self._entry.folder)

    def close(self) -> None:
        """Let go of the files; what was committed stays."""
        for file in (*self._files.values(), self._journal):
            file.close()


def _entries() -> list[Path]:
    """Finished entries and those that were begun."""
    with contextlib.suppress(OSError):
        return [path for path in (cache_folder() / "encoded").iterdir() if path.is_dir()]
    return []


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _prune(keep: Path) -> None:
    """Remove the entries that were longest not used, until all are small enough together."""
    entries = {}
    for path in _entries():
        with contextlib.suppress(OSError):
            entries[path] = path.stat().st_mtime_ns
    total = sum(map(_size, entries))
    for path in sorted(entries, key=entries.__getitem__):
        if total <= MAX_BYTES:
            return
        if path != keep:
            total -= _size(path)
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.with_name(f"{path.name.removesuffix('.partial')}.lock").unlink()


def _mapped(path: Path, dtype: str) -> np.ndarray[Any, Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _sum_of_json(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _hash_of(path: Path, size: int | None = None) -> Any:
    """The running sum of the first `size` bytes of a file, or of all; ValueError: it is shorter."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                raise ValueError(f"{path} is too short")
            digest.update(block)
            left -= len(block)
    return digest


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{cache_folder()}: the cache of encoded rows cannot be written: {error.strerror}.\n"
            "  Set MYNA_CACHE to a folder on a disk with more room."
        ) from error
