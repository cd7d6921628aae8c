"""What every input of the reader must do, and a run of many inputs that measures time and memory.

Owns the property (`check_reading`), the generator of damaged files (`damaged_files`) and the
corpus of known horrors. Three things use it: `tests/data/test_reading_fuzz.py` (hypothesis), this
file as a program (`python tests/fuzz/reading.py --inputs 10000`, one JSON object with the slowest
input and the peak memory), and `atheris_reading.py` where atheris is installed.
"""

import argparse
import csv
import gzip
import io
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from myna.data.byte_source import find_source
from myna.data.files import BadRow, Record, read_chunks, read_records
from myna.data.text_tables import find_delimiter
from myna.device import peak_memory_bytes
from myna.errors import DataError

NAMES = (
    "a.jsonl",
    "a.json",
    "a.csv",
    "a.tsv",
    "a.txt",
    "a.parquet",
    "a.arrow",
    "a",
    "a.jsonl.gz",
    "a.json.zst",
)

PIECES = [
    piece.encode("utf-8", "surrogatepass")
    for piece in (
        *("NaN", "-Infinity", "1e999", "null", "\ufeff", "\0", "\r", "\r\n", "\n", "\n\n", "\x1f"),
        *('"', '""', "\\", "\\u", "\\ud800", "\\udc00", "{", "}", "[", "]", ",", ":", ";", "\t"),
        *('{"a": 1, "a": 2}', '"instruction": ', "// comment\n", "'", "[" * 200, "9" * 4301),
        *("\u2028", "\x85", "😀", "é", "\ud800"),
    )
] + [
    b"\xff\xfe",
    b"\x80",
    b"\xc3",
    b"\xf0\x9f",
    b"PAR1",
    b"ARROW1",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
]


def check_reading(path: Path) -> int:
    """Read a file; the number of accepted rows.

    Whatever the bytes are: nothing but a DataError is raised, every refusal names the file and the
    line or row, and every accepted row is what the json or csv module reads there.
    """
    rows: list[Record | BadRow] = []
    try:
        for chunk in read_chunks(path):
            before = len(rows)
            rows += chunk.records()
            assert len(rows) - before == chunk.num_rows
    except DataError as error:
        assert path.name in str(error), error
        return 0
    accepted = [row for row in rows if isinstance(row, Record)]
    for number, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            fault = row.fault
            assert fault.place.file == path and fault.place.row == number
            unit, at = ("line", fault.place.line) if fault.place.line else ("row", number)
            assert str(fault).startswith(f"{path.name} {unit} {at}"), fault
            assert at >= 1 and (fault.column is None or fault.column >= 1)
            assert fault.reason and fault.finding
            assert not fault.ends_file or number == len(rows)
        else:
            assert row.place.file == path and row.place.row == number
            json.dumps(row.value, ensure_ascii=False, default=str).encode()
    _check_against_the_standard_library(path, accepted)
    return len(accepted)


def _check_against_the_standard_library(path: Path, accepted: list[Record]) -> None:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    elif content.startswith(b"(\xb5/\xfd"):
        content = pa.input_stream(pa.BufferReader(content), compression="zstd").read()
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if path.suffix in (".csv", ".tsv"):
        kind = path.suffix[1:].upper()
        table = iter(_table(text, find_delimiter(find_source(path), kind)))
        for row in accepted:
            values = list(row.value.values())
            assert values in table, (row, "is not among the rows, or not in their order")
        return
    if path.suffix == ".txt" and all(row.value.keys() == {"text"} for row in accepted):
        for row in accepted:
            assert row.value["text"] in text.replace("\r\n", "\n")
        return
    reference = _json_rows(text) if path.suffix not in (".parquet", ".arrow") else None
    if reference is not None:
        for row in accepted:
            key = row.place.line if isinstance(reference, dict) else row.place.row - 1
            if isinstance(reference, dict) or key < len(reference):
                assert _equal(row.value, reference[key]), (row, reference[key])


def _equal(one: Any, other: Any) -> bool:
    # repr tells 1 from 1.0 and from True.
    return repr(one) == repr(other)


def _table(text: str, delimiter: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            continue


def _json_rows(text: str) -> Any:
    """Rows by line or by number, as the json module reads them; None: there are none."""
    start = text.lstrip(" \t\r\n")[:1]
    if start == "{":
        values: dict[int, Any] = {}
        for number, line in enumerate(text.split("\n"), start=1):
            values[number] = _parsed(line)
        return values
    if start == "[":
        decoder = json.JSONDecoder(
            parse_int=lambda digits: int(digits) if len(digits) < 4300 else 0
        )
        position, listed = text.index("[") + 1, []
        while True:
            while position < len(text) and text[position] in " \t\r\n,":
                position += 1
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError):
                return listed  # the reader ends here too, or refuses this row and goes on
            listed.append(value)
    return None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def random_row(generator: random.Random) -> dict[str, Any]:
    """A row with nested values and texts of every kind."""

    def text() -> str:
        alphabet = 'abc "\\\n\r\t,;{}[]:é你😀\u2028'
        return "".join(generator.choice(alphabet) for _ in range(generator.randrange(12)))

    def value(depth: int) -> Any:
        kind = generator.randrange(7 if depth else 5)
        if kind == 5:
            return [value(depth - 1) for _ in range(generator.randrange(4))]
        if kind == 6:
            return {text(): value(depth - 1) for _ in range(generator.randrange(4))}
        return (None, True, generator.randrange(-9, 9**9), generator.uniform(-1, 1), text())[kind]

    return {"instruction": text(), "output": text(), text(): value(3)}


def valid_file(generator: random.Random, name: str) -> bytes:
    """A file that holds random rows, of the kind that `name` says."""
    rows = [random_row(generator) for _ in range(generator.randrange(1, 6))]
    pairs = [{key: row[key] for key in ("instruction", "output")} for row in rows]
    escape, indent = generator.random() < 0.5, generator.choice((None, 1))
    if name.endswith((".csv", ".tsv")):
        stream = io.StringIO()
        delimiter = "\t" if name.endswith(".tsv") else generator.choice(",;")
        writer = csv.DictWriter(stream, ["instruction", "output"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(pairs)
        return stream.getvalue().encode()
    if name.endswith((".parquet", ".arrow")):
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist([{**pair, "list": [pair]} for pair in pairs])
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(table, sink)
        else:
            new = generator.choice((pa.ipc.new_stream, pa.ipc.new_file))
            with new(sink, table.schema) as writer_:
                writer_.write_table(table)
        return sink.getvalue().to_pybytes()
    if name.endswith(".txt"):
        return "\n\n".join(pair["output"] for pair in pairs).encode()
    if name == "a.json" or (name == "a" and generator.random() < 0.5):
        return json.dumps(rows, ensure_ascii=escape, indent=indent).encode()
    content = "\n".join(json.dumps(row, ensure_ascii=escape) for row in rows).encode()
    if name.endswith(".zst"):
        return bytes(pa.Codec("zstd").compress(content, asbytes=True))
    return gzip.compress(content) if name.endswith(".gz") else content


def damage(generator: random.Random, content: bytes) -> bytes:
    """The content with a few of the things done to it that happen to files."""
    data = bytearray(content)
    for _ in range(generator.randrange(1, 4)):
        at = generator.randrange(len(data) + 1)
        end = min(len(data), at + generator.randrange(1, 30))
        kind = generator.randrange(7)
        if kind == 0:
            del data[at:]  # cut off
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = generator.choice(PIECES)
        elif kind == 3:
            data[at:end] = generator.choice(PIECES)
        elif kind == 4 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 5:
            data[at:at] = data[at:end]
        else:
            encoding = generator.choice(("utf-16", "utf-16-le", "gb18030", "latin-1"))
            data[:] = data.decode(errors="replace").encode(encoding, errors="replace")
    return bytes(data)


def damaged_files(generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """Name and content of one file after the other: damaged ones, and now and then mere noise."""
    while True:
        name = generator.choice(NAMES)
        if generator.random() < 0.1:
            yield name, generator.randbytes(generator.randrange(200))
        else:
            # Most damage happens under the right name, some under a wrong one.
            written = name if generator.random() < 0.9 else generator.choice(NAMES)
            yield name, damage(generator, valid_file(generator, written))


Parts = list[tuple[bytes, int]]
"""Pieces of a file, each with how often it is repeated: a large file is not held to be written."""


def horrors() -> Iterator[tuple[str, Parts]]:
    """Inputs known to end readers: large, deep, or both."""
    long = (b"a" * 1_000_000, 100)
    yield "a.jsonl", [(b'{"x": "', 1), long, (b'"}\n{"x": 1}', 1)]
    yield "a.json", [(b'[{"x": "', 1), long, (b'"}]', 1)]
    yield "a.jsonl.gz", [(b'{"x": "', 1), long, (b'"}\n{"x": 1}', 1)]
    yield "a.csv", [(b"x\n", 1), long]
    yield "a.csv", [(b'x\n"', 1), (b"a\n" * 500_000, 10)]
    yield "a.txt", [long]
    yield "a.jsonl", [(b" " * 1_000_000, 100)]
    yield "a.json", [(b"[", 1), (b" " * 1_000_000, 100), (b"{}]", 1)]
    yield "a.jsonl", [(b"\n" * 1_000_000, 10), (b"{", 1)]
    for opening in (b"[", b'{"a":', b"[{"):
        yield "a.jsonl", [(b'{"x": ', 1), (opening, 100_000)]
        yield "a.json", [(b'[{"x": ', 1), (opening, 100_000)]
    for name, before, after in (("a.jsonl", b"", b""), ("a.json", b"[", b"]")):
        yield name, [(before + b'{"x": ', 1), (b"9", 5_000), (b"}" + after, 1)]
        yield name, [(before + b'{"x": ', 1), (b"9" * 8_000, 1_000), (b"}" + after, 1)]
        yield name, [(before + b'{"x": [', 1), (b"{}," * 26_000, 100), (b"0]}" + after, 1)]
        yield name, [(before + '{"x": "😀'.encode(), 1), (b"a" * 80_000, 100), (b'"}' + after, 1)]
        keys = b",".join(b'"%d":0' % number for number in range(100_000))
        yield name, [(before + b"{" + keys + b',"0":0}' + after, 1)]


def write_parts(path: Path, parts: Parts) -> None:
    """Write the pieces; packed, if the name says so."""
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else open(path, "wb") as file:
        for piece, times in parts:
            for _ in range(times):
                file.write(piece)


def main() -> None:
    """Read the horrors and many damaged files; print what was slowest and the peak memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    files = damaged_files(generator)
    slowest, accepted = 0.0, 0
    horrid: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.inputs):
            name, content = next(files)
            path = Path(folder) / name
            path.write_bytes(content)
            started = time.process_time()
            accepted += check_reading(path) > 0
            slowest = max(slowest, time.process_time() - started)
        for name, parts in horrors():
            path = Path(folder) / name
            write_parts(path, parts)
            rows = sum(1 for _ in read_kept(path))
            horrid.append((name, rows))
    print(
        json.dumps(
            {
                "slowest_seconds": slowest,
                "accepted": accepted,
                "peak_bytes": peak_memory_bytes(),
                "horrors": horrid,
            }
        )
    )


def read_kept(path: Path) -> Iterator[bool]:
    """Whether each row is accepted; none is kept."""
    try:
        for row in read_records([path]):
            yield isinstance(row, Record)
    except DataError:
        return


if __name__ == "__main__":
    main()
