"""Data files: any file of rows, of any size, as a stream of chunks.

Owns what a file is: JSON (a list or one object a line, told by content), CSV and TSV (by suffix),
Parquet and Arrow (by their first bytes), plain text; packed by gzip or zstd or not. The readers are
`json_rows.py`, `text_tables.py`, `arrow_tables.py` and `documents.py`; what the fields of a row
mean is left to `formats.py`.

    read_chunks(path) -> chunks, raw and small, that can be sent to other processes
    chunk.records()   -> Record or BadRow, each with its place in the file
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from myna.data.arrow_tables import arrow_chunks, arrow_note, parquet_chunks, parquet_note
from myna.data.byte_source import BOM, ByteSource, data_suffix, find_source
from myna.data.byte_source import content_hash as content_hash
from myna.data.byte_source import content_sha256 as content_sha256
from myna.data.documents import document_chunks
from myna.data.foreign_files import encoding_other_than_utf8, looks_like
from myna.data.json_rows import line_chunks, list_chunks
from myna.data.records import BadRow as BadRow
from myna.data.records import Chunk as Chunk
from myna.data.records import Record as Record
from myna.data.records import describe as describe
from myna.data.records import quote
from myna.data.text_tables import find_delimiter, table_chunks, table_note
from myna.errors import DataError

Kind = Literal["JSON list", "JSON lines", "CSV", "TSV", "Parquet", "Arrow", "plain text"]

_HEAD_BYTES = 4096
_WHITE = b" \t\r\n"
_NOT_STARTED = "Training has not started."
_BINARY_SUFFIXES = {"Parquet": (".parquet",), "Arrow": (".arrow", ".feather")}
_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was looked at, but not read."""

    source: ByteSource
    kind: Kind
    note: str
    """How it is read, where that is not plain from its name."""

    def chunks(self) -> Iterator[Chunk]:
        """The rows in order, about a thousand or a megabyte in each chunk."""
        if self.kind == "JSON list":
            return list_chunks(self.source)
        if self.kind == "JSON lines":
            return line_chunks(self.source)
        if self.kind == "Parquet":
            return parquet_chunks(self.source.path)
        if self.kind == "Arrow":
            return arrow_chunks(self.source.path)
        if self.kind == "plain text":
            return document_chunks(self.source)
        return table_chunks(self.source, find_delimiter(self.source, self.kind))


def look_at(path: Path) -> DataFile:
    """Tell what a file is from its name and its first bytes.

    Raises:
        DataError: not found (with the nearest names), unreadable, empty, of another kind than its
            name says, or of a kind that holds no rows.
    """
    source = find_source(path)
    head, skipped_lines = _visible_head(source)
    suffix = data_suffix(path)
    if kind := _binary_kind(head):
        return _binary_file(source, kind, suffix)
    _refuse_foreign(source, head, suffix)
    packed = f", unpacked from {source.packing}" if source.packing else ""
    if suffix in (".csv", ".tsv"):
        if head.startswith((b"{", b"[{")):
            raise _misnamed(path, suffix, "JSON", ".jsonl")
        table: Kind = "CSV" if suffix == ".csv" else "TSV"
        return DataFile(source, table, table_note(source, table) + packed)
    if suffix == ".txt" and not _is_json(head):
        return DataFile(
            source, "plain text", f"plain text, blank lines divide the documents{packed}"
        )
    if not head.startswith((b"{", b"[")):
        raise DataError(_no_json(path, head, skipped_lines))
    is_list = head.startswith(b"[")
    return DataFile(source, "JSON list" if is_list else "JSON lines", packed.removeprefix(", "))


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The rows of a file in order; see `DataFile.chunks`.

    Raises:
        DataError: at once as `look_at`; later where a packed or binary file breaks off.
    """
    return look_at(path).chunks()


def read_records(paths: Sequence[Path]) -> Iterator[Record | BadRow]:
    """The rows of all files, in order."""
    for path in paths:
        for chunk in read_chunks(path):
            yield from chunk.records()


def _visible_head(source: ByteSource) -> tuple[bytes, int]:
    """The first bytes from the first that is no white space, and the lines before it.

    Raises DataError where there are none.
    """
    size = lines = 0
    with source.opened() as stream:
        while block := stream.read(_HEAD_BYTES):
            shown = (block.removeprefix(BOM) if size == 0 else block).lstrip(_WHITE)
            if shown:
                lines += block[: len(block) - len(shown)].count(b"\n")
                return shown + stream.read(_HEAD_BYTES - len(shown)), lines
            size += len(block)
            lines += block.count(b"\n")
    found = "0 bytes" if not size else f"{size:,} bytes, white space only"
    raise DataError(
        f"{source.path.name} is empty ({found}); expected a JSON list or one JSON object a line.\n"
        f"  {_NOT_STARTED}"
    )


def _binary_kind(head: bytes) -> Literal["Parquet", "Arrow"] | None:
    if head.startswith(b"PAR1"):
        return "Parquet"
    return "Arrow" if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) else None


def _binary_file(source: ByteSource, kind: Literal["Parquet", "Arrow"], suffix: str) -> DataFile:
    if source.packing:
        raise DataError(
            f"{source.path.name} is {kind} inside {source.packing}; expected it unpacked.\n"
            f"  {kind} is compressed in itself: unpack the file. {_NOT_STARTED}"
        )
    others = [name for name in _BINARY_SUFFIXES if name != kind]
    if suffix in _TEXT_SUFFIXES or any(suffix in _BINARY_SUFFIXES[name] for name in others):
        raise _misnamed(source.path, suffix, kind, _BINARY_SUFFIXES[kind][0])
    note = parquet_note if kind == "Parquet" else arrow_note
    return DataFile(source, kind, note(source.path))


def _misnamed(path: Path, suffix: str, kind: str, right_suffix: str) -> DataError:
    name = path.name[: path.name.lower().rindex(suffix)] + right_suffix
    return DataError(
        f"{path.name} is named {suffix}, but its content looks like {kind}.\n"
        f"  If it is, rename it to {name}. {_NOT_STARTED}"
    )


def _refuse_foreign(source: ByteSource, head: bytes, suffix: str) -> None:
    """Raise DataError for a file that is known to be something else."""
    name = source.path.name
    if encoding := encoding_other_than_utf8(head):
        found = f"byte 0x{head[0]:02x} at offset 0 is not UTF-8"
        if head[0] <= 0x7F:
            found = "bytes 0x00 stand between the characters"
        raise DataError(
            f"{name} line 1: {found}; the file looks like {encoding}.\n"
            f"  Save it as UTF-8, for example: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}\n"
            f"  {_NOT_STARTED}"
        )
    is_prose = suffix in (".txt", ".csv", ".tsv")
    if (foreign := looks_like(head)) and not (foreign.is_text and is_prose):
        inside = f" inside {source.packing}" if source.packing else ""
        raise DataError(
            f"{name} looks like {foreign.name}{inside}; expected rows as JSON, CSV, Parquet, Arrow "
            f"or text.\n  {foreign.mend} {_NOT_STARTED}"
        )
    for kind, suffixes in _BINARY_SUFFIXES.items():
        if suffix in suffixes:
            shown = quote(head[:20].decode(errors="replace"))
            raise DataError(
                f"{name} is named {suffix} and begins with {shown}; expected {kind}.\n"
                f"  Name it by what it holds (.jsonl, .csv), or fetch it again. {_NOT_STARTED}"
            )


def _is_json(head: bytes) -> bool:
    """Whether a text file holds rows of JSON and not prose that begins with a bracket."""
    return head.removeprefix(b"[").lstrip(_WHITE).startswith(b"{") and b'"' in head


def _no_json(path: Path, head: bytes, skipped_lines: int) -> str:
    first_line = head.split(b"\n")[0].decode(errors="replace")
    hint = ""
    for delimiter, suffix in (("\t", ".tsv"), (",", ".csv"), (";", ".csv")):
        if delimiter in first_line:
            hint = f"If it is a table, name it {path.stem}{suffix}. "
            break
    shown = quote(head[:40].decode(errors="replace")[:20])
    return (
        f"{path.name} line {skipped_lines + 1}: the file begins with {shown}; expected a JSON "
        "list, which begins with [, or one JSON object a line, which begins with {.\n"
        f"  {hint}{_NOT_STARTED}"
    )
