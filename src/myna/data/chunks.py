"""Chunks: a data file as a stream of small groups of rows, which another process can parse.

Owns the cut. Large files of one object a line are read piece by piece; all others are read whole by
`files.py`, which owns what a row is.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from myna.data.conversation import Place
from myna.data.files import BadRow, DataFile, Record, read_file

CHUNK_ROWS = 1000
"""Rows in a chunk."""

_LARGE = 16 << 20
"""Bytes from which a file of lines is streamed."""


class Chunk(Protocol):
    """Some consecutive rows of a file; can be pickled."""

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order."""
        ...


@dataclass(frozen=True, slots=True)
class _Parsed:
    rows: list[Record | BadRow]

    def records(self) -> Iterator[Record | BadRow]:
        return iter(self.rows)


@dataclass(frozen=True, slots=True)
class _Lines:
    path: Path
    text: bytes
    before: int
    """Lines, and rows, in front of these."""

    def records(self) -> Iterator[Record | BadRow]:
        for row in DataFile(self.path, self.text.decode(), "").records():
            if isinstance(row, Record):
                yield Record(row.value, self._moved(row.place))
            else:
                yield BadRow(replace(row.fault, place=self._moved(row.fault.place)))

    def _moved(self, place: Place) -> Place:
        return Place(place.file, place.line + self.before, place.row + self.before)


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The rows of a file in order.

    Raises:
        DataError: as `files.read_file`.
    """
    if not path.is_file() or path.stat().st_size < _LARGE or _first_byte(path) != b"{":
        records = read_file(path).records()
        while rows := list(islice(records, CHUNK_ROWS)):
            yield _Parsed(rows)
        return
    with open(path, "rb") as file:
        before = 0
        while lines := list(islice(file, CHUNK_ROWS)):
            yield _Lines(path, b"".join(lines), before)
            before += len(lines)


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def content_sha256(path: Path) -> str:
    """sha256 of the bytes of a file, in hexadecimal.

    Raises:
        DataError: as `files.read_file`.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return read_file(path).sha256  # which says what is wrong


def content_hash(digests: Sequence[str]) -> str:
    """One digest for the data: that of the only file, or of the digests of all in order."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
