"""Documents: plain text as rows with one field, `text`.

Owns where a document begins and ends. Readers elsewhere take each line for a row, which tears prose
apart; a whole file is longer than any context. Here blank lines divide documents, so that verses
stay together, and a file without blank lines is one document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from myna.data.byte_source import BOM, ByteSource
from myna.data.conversation import Place
from myna.data.faults import Fault
from myna.data.records import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    MAX_ROW_BYTES,
    ROW_LIMIT,
    BadRow,
    Chunk,
    Record,
    Refused,
    bad_byte,
)

_WHITE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Documents:
    """A chunk of whole documents: each with its first line and its place in the file in bytes."""

    path: Path
    texts: tuple[tuple[int, int, bytes], ...]
    """(line, offset, bytes) of each document."""
    row: int
    """Number of the first."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.texts)

    def records(self) -> Iterator[Record | BadRow]:
        """The documents in order; lines end in \\n whatever ended them in the file."""
        for row, (line, offset, data) in enumerate(self.texts, self.row):
            place = Place(self.path, line, row)
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                line += data.count(b"\n", 0, error.start)
                before = data[data.rfind(b"\n", 0, error.start) + 1 : error.start]
                finding, mend = bad_byte(error, offset + error.start)
                place = Place(self.path, line, row)
                yield BadRow(Fault("encoding", place, finding, mend, len(before.decode()) + 1))
                continue
            if "\0" in text:
                finding = "the document holds NUL characters (0x00); expected text."
                yield BadRow(Fault("nul", place, finding, "Remove them, or restore the file."))
                continue
            yield Record({"text": text.replace("\r\n", "\n").rstrip()}, place)


def document_chunks(source: ByteSource) -> Iterator[Chunk]:
    """Chunks of a text file."""
    chunk: list[tuple[int, int, bytes]] = []
    lines: list[bytes] = []  # of the document that is being read; none is kept of a long one
    number = row = 1  # of the line, of the next document to be handed on
    first = size = offset = held = 0
    is_long = inside_line = False
    with source.opened() as stream:
        while True:
            data = stream.readline(MAX_ROW_BYTES + 1)
            if offset == 0 and data.startswith(BOM):
                data, offset = data[len(BOM) :], len(BOM)
            if data.strip(_WHITE) or (inside_line and data):
                first = first if size else number
                size += len(data)
                is_long = is_long or size > MAX_ROW_BYTES
                if is_long:
                    lines.clear()
                else:
                    lines.append(data)
            elif size:
                if not is_long:
                    chunk.append((first, offset - size, b"".join(lines)))
                    held += size
                if chunk and (is_long or len(chunk) == CHUNK_ROWS or held >= CHUNK_BYTES):
                    yield Documents(source.path, tuple(chunk), row)
                    row, chunk, held = row + len(chunk), [], 0
                if is_long:
                    finding = f"the document is longer than {ROW_LIMIT}."
                    mend = "Divide it by blank lines."
                    yield Refused(Fault("too_long", Place(source.path, first, row), finding, mend))
                    row += 1
                lines, size, is_long = [], 0, False
            if not data:
                break
            offset += len(data)
            inside_line = not data.endswith(b"\n")
            number += not inside_line
    if chunk:
        yield Documents(source.path, tuple(chunk), row)
