"""Arrow tables: Parquet, and Arrow's own files and streams (Feather), batch by batch.

Owns which column types make rows and how they become Python values: lists and structs do; moments,
maps and bytes do not, because nothing says how a template should write them. A column that holds
them may stand there; where it is used, its row is refused.
Structs have all fields of all rows, with null where a row had none: a field of a struct that is
null is left out, as it was before the table was made.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.conversation import Place
from myna.data.faults import Fault
from myna.data.records import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    MAX_ROW_BYTES,
    ROW_LIMIT,
    BadRow,
    Chunk,
    NotJson,
    Record,
    Refused,
    list_columns,
    quote,
)
from myna.errors import DataError

_NOT_STARTED = "Training has not started."
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """A chunk of rows: a record batch with its schema, as an Arrow stream."""

    path: Path
    data: bytes
    row: int
    """Number of the first."""
    num_rows: int

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order."""
        import pyarrow.ipc

        batch = pyarrow.ipc.open_stream(self.data).read_next_batch()
        schema = batch.schema
        unread = _unread_columns(schema)
        converters = [
            (field.name, converter)
            for field in schema
            if field.name not in unread and (converter := _converter(field.type))
        ]
        rows = _to_python(batch.select([name for name in schema.names if name not in unread]))
        for row, value in enumerate(rows, self.row):
            place = Place(self.path, 0, row)
            if isinstance(value, UnicodeDecodeError):
                finding = f"a text holds byte 0x{value.object[value.start]:02x}, which is no UTF-8."
                yield BadRow(Fault("encoding", place, finding, "Write the table again."))
                continue
            try:
                for name, convert in converters:
                    if value[name] is not None:
                        value[name] = convert(value[name])
            except (ValueError, RecursionError) as error:
                finding = f"column {name} holds broken JSON: {error}."
                yield BadRow(Fault("json:column", place, finding, "Write the table again."))
                continue
            if unread:  # in the order of the columns
                value = {
                    name: NotJson(unread[name]) if name in unread else value[name]
                    for name in schema.names
                }
            yield Record(value, place)


def _to_python(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    if not batch.num_columns:
        yield from ({} for _ in range(batch.num_rows))
        return
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # of which row it does not say
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """What makes the row's value of Arrow's Python value; None: it is the same."""
    from pyarrow import types

    if _is_json(kind):
        return json.loads
    if types.is_struct(kind):
        fields = [(field.name, _converter(field.type)) for field in kind]
        return lambda value: {
            name: convert(value[name]) if convert else value[name]
            for name, convert in fields
            if value[name] is not None
        }
    if _is_list(kind) and (convert_item := _converter(kind.value_type)):
        return lambda value: [None if item is None else convert_item(item) for item in value]
    return None


def parquet_note(path: Path) -> str:
    """`Parquet, 3,729 rows, columns instruction, output`; DataError for what cannot be read."""
    with _reading(path, "Parquet"), _open_parquet(path) as file:
        columns = _describe_columns(path, file.schema_arrow)
        return f"Parquet, {file.metadata.num_rows:,} rows, {columns}"


def parquet_chunks(path: Path) -> Iterator[Chunk]:
    """Chunks of a Parquet file; no more of a row group is held than a chunk takes."""
    row = 1
    with _reading(path, "Parquet"), _open_parquet(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        mean = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
        size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, mean)))
        for batch in file.iter_batches(batch_size=size, use_threads=False):
            yield from _chunks_of(path, batch, row)
            row += batch.num_rows


def arrow_note(path: Path) -> str:
    """`Arrow, columns instruction, output`; DataError for what cannot be read."""
    with _reading(path, "Arrow"), _opened_arrow(path) as (schema, _):
        return f"Arrow, {_describe_columns(path, schema)}"


def arrow_chunks(path: Path) -> Iterator[Chunk]:
    """Chunks of an Arrow file or stream, whose batches are mapped into memory, not read."""
    row = 1
    with _reading(path, "Arrow"), _opened_arrow(path) as (_, batches):
        for batch in batches:
            # Offsets that lead out of their buffers would end the process when they are followed.
            batch.validate(full=True)
            batch = _without_views(batch)
            size = max(1, min(CHUNK_ROWS, CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, size):
                part = batch.slice(start, size)
                yield from _chunks_of(path, part, row)
                row += part.num_rows


def _without_views(batch: Any) -> Any:
    """The batch with its views on texts as texts: a part of a view carries all that is viewed."""
    import pyarrow

    fields = [field.with_type(_viewed_type(field.type)) for field in batch.schema]
    schema = pyarrow.schema(fields)
    return batch if schema == batch.schema else batch.cast(schema)


def _viewed_type(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if types.is_string_view(kind):
        return pyarrow.large_string()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_viewed_type(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_viewed_type(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_viewed_type(kind.value_type)))
    return kind


def _chunks_of(path: Path, batch: Any, row: int) -> Iterator[Chunk]:
    """One chunk, or one for each row where a single row may be too long."""
    if batch.nbytes <= MAX_ROW_BYTES or batch.num_rows == 0:
        if batch.num_rows:
            yield ArrowRows(path, _to_bytes(batch), row, batch.num_rows)
        return
    for index in range(batch.num_rows):
        single = batch.slice(index, 1)
        if single.nbytes > MAX_ROW_BYTES:
            finding = f"the row is longer than {ROW_LIMIT}; no model trains on so long a text."
            place = Place(path, 0, row + index)
            yield Refused(Fault("too_long", place, finding, "Divide it into several rows."))
        else:
            yield ArrowRows(path, _to_bytes(single), row + index, 1)


def _to_bytes(batch: Any) -> bytes:
    import pyarrow
    import pyarrow.ipc

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    # With a buffer, column chunks are read page by page.
    return pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False)


@contextlib.contextmanager
def _opened_arrow(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """(schema, batches) of a file in either of Arrow's two layouts."""
    import pyarrow
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            yield file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            # A stream that was cut between two batches reads like one that ends there.
            source.seek(max(0, source.size() - len(_END_OF_STREAM)))
            if source.read() != _END_OF_STREAM:
                raise EOFError("it has no end mark")
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            yield stream.schema, iter(stream)


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises for broken files into a DataError."""
    import pyarrow

    try:
        yield
    except (
        pyarrow.ArrowException,
        OSError,
        EOFError,
        MemoryError,
        ValueError,
        RecursionError,
    ) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"{path.name} could not be read as {kind} ({reason}).\n"
            f"  Was the file cut off? Fetch or write it again. {_NOT_STARTED}"
        ) from error


def _describe_columns(path: Path, schema: Any) -> str:
    """The names of the columns; DataError where two are the same."""
    names = list(schema.names)
    for index, name in enumerate(names):
        if name in names[:index]:
            raise DataError(
                f"{path.name}: two columns are named {quote(name)}; expected different names.\n"
                f"  Rename or remove one of them. {_NOT_STARTED}"
            )
    unread = _unread_columns(schema)
    listed = list_columns([name for name in names if name not in unread])
    left_out = "".join(f"; {name} is not read ({kind})" for name, kind in unread.items())
    return f"columns {listed}{left_out}"


def _unread_columns(schema: Any) -> dict[str, str]:
    """Name -> what it holds, of the columns that hold something that makes no row."""
    found: dict[str, str] = {}
    for field in schema:
        for where, kind in _refused_types(field.name, field.type):
            found.setdefault(field.name, kind if where == field.name else f"{kind} in {where}")
    return found


def _refused_types(name: str, kind: Any) -> Iterator[tuple[str, str]]:
    """(place, type) of everything within a column that makes no row."""
    from pyarrow import types

    if _is_json(kind):
        return
    if types.is_dictionary(kind):
        yield from _refused_types(name, kind.value_type)
    elif types.is_struct(kind):
        names = [field.name for field in kind]
        if len(set(names)) < len(names):
            yield name, "struct with two fields of one name"
        for inner in kind:
            yield from _refused_types(f"{name}.{inner.name}", inner.type)
    elif _is_list(kind):
        yield from _refused_types(f"{name}[]", kind.value_type)
    elif not (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    ):
        yield name, str(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_json(kind: Any) -> bool:
    """Whether texts of the type are JSON (`arrow.json`), as `datasets` writes mixed shapes."""
    return str(getattr(kind, "extension_name", "")) == "arrow.json"
