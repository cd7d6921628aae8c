"""Records: what reading a file gives, whatever the file is made of.

Owns the row with its place, the row that cannot be used, the chunk of rows that readers hand on,
and how a value is named in an error. Bytes become chunks in `files.py` and in the readers of one
kind each (`json_rows.py`, `text_tables.py`, `arrow_tables.py`, `documents.py`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from myna.data.conversation import Place
from myna.data.faults import Fault

CHUNK_ROWS = 1_000
"""Rows in a chunk at most."""

CHUNK_BYTES = 1 << 20
"""Bytes in a chunk, about: the row that passes it is the chunk's last."""

MAX_ROW_BYTES = 8 << 20
"""Longest row. Beyond a million tokens nothing is trained, and JSON that is made of empty objects
takes 30 times its size in memory, so that a row of this size still fits in 512 MB."""

ROW_LIMIT = f"{MAX_ROW_BYTES >> 20} MiB"


@dataclass(frozen=True, slots=True)
class Record:
    """One row, an object with named fields, and its place."""

    value: dict[str, Any]
    place: Place


@dataclass(frozen=True, slots=True)
class BadRow:
    """Something in a row's place that is no usable row."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class NotJson:
    """Stands for a value that JSON has no like of: a moment, bytes, a map."""

    kind: str
    """Its type, as the file calls it."""


class Chunk(Protocol):
    """Some consecutive rows of a file, unparsed. It can be pickled, to be parsed elsewhere."""

    @property
    def num_rows(self) -> int:
        """How many rows `records` gives, bad ones among them."""
        ...

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order."""
        ...


@dataclass(frozen=True, slots=True)
class Refused:
    """A chunk of one row that was found to be unusable while the file was cut into chunks."""

    fault: Fault

    @property
    def num_rows(self) -> int:
        """1."""
        return 1

    def records(self) -> Iterator[Record | BadRow]:
        """The one row."""
        yield BadRow(self.fault)


@dataclass(frozen=True, slots=True)
class Head:
    """The first rows of a chunk."""

    chunk: Chunk
    num_rows: int

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order."""
        return islice(self.chunk.records(), self.num_rows)


def describe(value: Any) -> str:
    """`a text`, `the number 5`, `null`: a JSON value as an error names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the text {quote(value[:20])}"
    if isinstance(value, NotJson):
        return f"of type {value.kind}"
    return "a list" if isinstance(value, list) else "an object"


def quote(text: str) -> str:
    """The text in double quotes, as JSON writes it."""
    return json.dumps(text, ensure_ascii=False)


def list_columns(columns: Sequence[str]) -> str:
    """The names in a row, the first dozen of them."""
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    return ", ".join(columns[:12]) + more


def bad_byte(error: UnicodeDecodeError, offset: int | None) -> tuple[str, str]:
    """(finding, mend) of a byte that is not UTF-8.

    Args:
        error: what decoding the row or a part of it raised.
        offset: place of the byte in the file, in bytes from 0, where that is known.
    """
    encoding = _probable_encoding(error.object)
    where = "" if offset is None else f" at offset {offset}"
    return (
        f"byte 0x{error.object[error.start]:02x}{where} is not UTF-8"
        f"{f'; it looks like {encoding}' if encoding else ''}.",
        "Save the file as UTF-8, for example: "
        f"iconv -f {encoding or 'ENCODING'} -t UTF-8 OLD > NEW",
    )


def _probable_encoding(content: bytes) -> str | None:
    # A block may begin or end within a character: one byte at each end may be left out.
    for trimmed in (content, content[:-1], content[1:], content[1:-1]):
        try:
            text = trimmed.decode("gb18030")
        except UnicodeDecodeError:
            continue
        return "GB18030" if any("\u4e00" <= character <= "\u9fff" for character in text) else None
    return None
