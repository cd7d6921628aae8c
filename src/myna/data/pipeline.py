"""The pipeline: data files to a dataset, in one stream, over all cores and through the cache.

Owns how chunks of rows are shared among processes and joined in their order, the account of each
file, and what makes up the key of the cache. What is in memory at any time are some chunks, however
many rows there are. Parsing is `files.py`'s, mapping `formats.py`'s, encoding `encode.py`'s, the
processes are `workers.py`'s and the files of the cache `cache.py`'s.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from myna import __version__
from myna.data.cache import Entry, Filling
from myna.data.conversation import Conversation, Place
from myna.data.dataset import (
    Accounting,
    Dataset,
    Encoded,
    Tally,
    dataset_of,
    encode_conversations,
    faults_from_json,
    refuse,
)
from myna.data.encode import Encoder
from myna.data.faults import Fault, Faults, OnBadRow
from myna.data.fields import Parsed, Unfit
from myna.data.files import (
    BadRow,
    Chunk,
    Record,
    content_hash,
    content_sha256,
    look_at,
)
from myna.data.formats import RECOGNISED_BY, FieldsSeen, Format, convert, recognise
from myna.data.segments import Segments, SegmentsDiffer
from myna.data.sources import Source, read_sources
from myna.data.store import Columns, Examples, joined
from myna.data.workers import CannotStart, Workers
from myna.device import processor
from myna.errors import DataError

FEW_CHUNKS = 8
"""Up to so many chunks are encoded here and kept in memory: starting processes would take longer,
and there is nothing to gain from a cache."""

MAX_WORKERS = 16
"""Each takes about 300 MB."""

COMMIT_SECONDS = 10.0
"""Between two commits of rows to the cache: so much work is lost when a process is killed."""

_IDS_IN_TWO_BYTES = 1 << 16

OnRows = Callable[[int], None]
"""Called from time to time with the number of rows that are done."""


@dataclass(frozen=True)
class Task:
    """Some rows of one file."""

    source: int
    path: Path
    form: Format | None
    """None where no row of the file could be read so far."""
    chunk: Chunk


@dataclass
class FileTally:
    """Counts over the rows of one file."""

    rows: int = 0
    """As the reader gave them."""
    fields: FieldsSeen = field(default_factory=FieldsSeen)


@dataclass(frozen=True)
class Done:
    """What a task became."""

    source: int
    rows: int
    """Rows of the chunk, as the reader gave them."""
    first_row: int | None
    """Number in the file of the chunk's first row; None if no row of it could be read."""
    encoded: Encoded
    fields: FieldsSeen


class EncodeChunk:
    """The job of a worker: the rows of a chunk, parsed, mapped and encoded."""

    def __init__(self, encoder: Encoder, *, by_pieces: bool = True) -> None:
        self._encoder = encoder
        self._by_pieces = by_pieces
        self._segments: Segments | None = None

    def __call__(self, task: Task) -> Done:
        """Raises SegmentsDiffer where the ids of pieces cannot be trusted."""
        if self._segments is None:
            self._segments = Segments(self._encoder.tokenizer, by_pieces=self._by_pieces)
        rows, first_row = 0, None
        conversations: list[Conversation] = []
        faults: list[Fault] = []
        seen = FieldsSeen()
        for record in task.chunk.records():
            rows += 1
            if isinstance(record, BadRow):
                faults.append(record.fault)
                continue
            first_row = first_row or record.place.row - rows + 1
            form = task.form
            assert form is not None, "the format is recognised by the first row that can be read"
            try:
                parsed = convert(record.value, form)
            except Unfit as error:
                faults.append(Fault(error.kind, record.place, error.finding, error.mend))
                continue
            conversations.append(_conversation(parsed, record.place))
            seen.add(record.value, parsed, form)
        encoded = encode_conversations(
            self._encoder, conversations, [task.path], self._segments.ids
        )
        faults = sorted([*faults, *encoded.faults], key=lambda fault: fault.place.row)
        encoded.tally.rows_in = rows
        encoded = Encoded(encoded.columns, encoded.tally, faults)
        return Done(task.source, rows, first_row, encoded, seen)


def _conversation(parsed: Parsed, place: Place) -> Conversation:
    return Conversation(tuple(parsed.messages), place, parsed.tools, parsed.text)


class _Account:
    """What became of all rows so far."""

    def __init__(self, num_sources: int, on_bad_row: OnBadRow = "stop") -> None:
        self.tally = Tally()
        self.files = [FileTally() for _ in range(num_sources)]
        self.faults = Faults(on_bad_row)
        self.has_faults = False
        self.stops = False
        """Whether nothing will be trained, and rows are read to find all faults."""
        self.chunks = 0

    def add(self, done: Done) -> None:
        """Count the rows of a chunk."""
        file = self.files[done.source]
        # Counted by the reader and by us: no row is lost on the way, and none comes twice.
        assert done.first_row in (None, file.rows + 1), (
            f"row {done.first_row} came after row {file.rows}"
        )
        outcomes = done.encoded.tally
        kept = outcomes.trained + sum(outcomes.truncated.values()) + sum(outcomes.refused.values())
        assert done.rows == kept + len(done.encoded.faults), (
            f"{done.rows} rows came in, {kept} and {len(done.encoded.faults)} faults came out"
        )
        file.rows += done.rows
        file.fields.merge(done.fields)
        self.tally.add(outcomes)
        self.chunks += 1
        for fault in done.encoded.faults:
            self.has_faults = True
            self.stops |= self.faults.on_bad_row == "stop" or fault.ends_file
            self.faults.add(fault)

    @property
    def rows(self) -> int:
        """Rows done."""
        return sum(file.rows for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The account where there are no faults; `go_on` reads it."""
        files = [{"rows": file.rows, "fields": vars(file.fields)} for file in self.files]
        return {"chunks": self.chunks, "tally": self.tally.to_json(), "files": files}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Begin with the account that another process had come to."""
        self.chunks = state["chunks"]
        self.tally = Tally.from_json(state["tally"])
        self.files = [
            FileTally(file["rows"], FieldsSeen.from_json(file["fields"])) for file in state["files"]
        ]

    def notes(self, sources: Sequence[Source], forms: Sequence[Format | None]) -> Iterator[str]:
        """What is said about each file."""
        for source, form, file in zip(sources, forms, self.files, strict=True):
            name = source.path.name
            if kind := look_at(source.path).note:
                yield f"{name}: {kind}"
            if form is not None and file.rows:
                file.fields.check_columns(source.columns, name)
                yield from file.fields.notes(name, form)
        yield from self.faults.notes()


def encode_files(
    encoder: Encoder,
    sources: Sequence[Source],
    *,
    tokenizer_hash: str,
    on_bad_row: OnBadRow = "stop",
    num_workers: int | None = None,
    on_rows: OnRows = lambda _: None,
) -> Dataset:
    """Read, map and encode the rows of all files, or take from the cache what that gave before.

    Args:
        encoder: renders and tokenizes.
        sources: the files, in order.
        tokenizer_hash: a hash of all that decides the ids of a text.
        on_bad_row: whether rows that cannot be trained on stop everything or are counted.
        num_workers: processes that encode. None: one per core that this process may use.
        on_rows: told how many rows are done.

    Raises:
        DataError: a file cannot be read, or all rows that cannot be trained on, listed at once.
        ConfigError: a process that encodes died.
        StorageError: the cache cannot be written.
    """
    digests = [content_sha256(source.path) for source in sources]
    entry = Entry(_key(encoder, sources, digests, tokenizer_hash, on_bad_row))
    if (cached := _cached(entry, encoder, sources, digests)) is not None:
        return cached
    forms = [_form_of(source) for source in sources]
    tasks = _tasks(sources, forms)
    few = list(islice(tasks, FEW_CHUNKS + 1))
    number = num_workers or max(1, min(MAX_WORKERS, int(processor().allowed_cores)))
    for by_pieces in (True, False):
        account = _Account(len(sources), on_bad_row)
        work = _Work(encoder, sources, forms, digests, account, on_rows, by_pieces=by_pieces)
        with contextlib.suppress(SegmentsDiffer):
            if len(few) <= FEW_CHUNKS:
                return work.in_memory(few)
            rest = tasks if by_pieces else islice(_tasks(sources, forms), len(few), None)
            return work.through_cache(entry, chain(few, rest), number)
    raise AssertionError("whole texts differ from whole texts")


def conversations_at(
    sources: Sequence[Source], places: Iterable[Place]
) -> dict[Place, Conversation]:
    """The conversations of these rows, read again from their files.

    Examples have rendered texts only; this is for the few rows whose messages are wanted.
    """
    wanted = set(places)
    files = {place.file for place in wanted}
    chosen = [source for source in sources if source.path in files]
    forms = [_form_of(source) for source in chosen]
    found = {}
    for number, chunk in read_sources(chosen):
        form = forms[number]
        for record in chunk.records():
            if isinstance(record, Record) and record.place in wanted and form is not None:
                found[record.place] = _conversation(convert(record.value, form), record.place)
    return found


class _Work:
    """One attempt to encode all files."""

    def __init__(
        self,
        encoder: Encoder,
        sources: Sequence[Source],
        forms: Sequence[Format | None],
        digests: Sequence[str],
        account: _Account,
        on_rows: OnRows,
        *,
        by_pieces: bool,
    ) -> None:
        self._encoder = encoder
        self._sources = sources
        self._forms = forms
        self._digests = digests
        self._on_rows = on_rows
        self._job = EncodeChunk(encoder, by_pieces=by_pieces)
        self._account = account

    def in_memory(self, tasks: Iterable[Task]) -> Dataset:
        """All by this process."""
        parts = [self._taken(done) for done in map(self._job, tasks)]
        refuse(self._encoder, self._account.tally, self._account.faults)
        self._check_unchanged()
        return self._dataset(joined(parts))

    def through_cache(self, entry: Entry, tasks: Iterable[Task], number: int) -> Dataset:
        """By `number` processes, into the cache; what is there of an interrupted run is taken."""
        account = self._account
        tokenizer = self._encoder.tokenizer
        largest_id = max([len(tokenizer), *tokenizer.added_tokens_decoder])
        dtypes = {"ids": "uint16"} if largest_id < _IDS_IN_TWO_BYTES else {}
        with entry.locked():
            # Another process may have done it while this one waited.
            cached = _cached(entry, self._encoder, self._sources, self._digests)
            if cached is not None:
                return cached
            with contextlib.closing(entry.fill(dtypes)) as filling:
                if filling.state is not None:
                    account.go_on(filling.state)
                remarks: list[str] = []
                left = islice(tasks, account.chunks, None)
                try:
                    with contextlib.closing(_results(self._job, left, number, remarks)) as results:
                        self._fill(filling, results)
                    refuse(self._encoder, account.tally, account.faults)
                    self._check_unchanged()
                except (DataError, SegmentsDiffer):
                    filling.discard()
                    raise
                dataset = self._dataset(filling.columns())
                filling.finish(_noted(dataset, account))
        return replace(dataset, notes=(*dataset.notes, *remarks))

    def _fill(self, filling: Filling, results: Iterable[Done]) -> None:
        committed = time.monotonic()
        for done in results:
            columns = self._taken(done)
            if self._account.stops:
                continue
            filling.append(columns)
            # Faults are not committed: a run that is gone on with meets them again.
            due = time.monotonic() - committed > COMMIT_SECONDS
            if due and not self._account.has_faults:
                filling.commit(self._account.to_json())
                committed = time.monotonic()

    def _taken(self, done: Done) -> Columns:
        """The examples of a chunk, counted."""
        self._account.add(done)
        self._on_rows(self._account.rows)
        columns = done.encoded.columns
        return {**columns, "file_indices": np.full_like(columns["file_indices"], done.source)}

    def _check_unchanged(self) -> None:
        for source, digest in zip(self._sources, self._digests, strict=True):
            if content_sha256(source.path) != digest:
                raise DataError(
                    f"{source.path} was changed while it was read.\n"
                    "  Repeat the command when it is written. Training has not started."
                )

    def _dataset(self, columns: Columns) -> Dataset:
        return dataset_of(
            self._encoder,
            _examples(columns, self._sources),
            self._account.tally,
            notes=self._account.notes(self._sources, self._forms),
            content_hash=content_hash(self._digests),
        )


def _results(
    job: EncodeChunk, tasks: Iterable[Task], number: int, remarks: list[str]
) -> Generator[Done]:
    """What the tasks become, in their order; a remark is added if it takes longer than it might."""
    if number > 1:
        try:
            workers = Workers(number, job, lambda task: f"a part of {task.path.name}")
        except CannotStart as error:
            remarks.append(f"rows were encoded by one process: {error}")
        else:
            with workers:
                yield from workers.map(tasks)
            return
    yield from map(job, tasks)


def _tasks(sources: Sequence[Source], forms: Sequence[Format | None]) -> Iterator[Task]:
    for number, chunk in read_sources(sources):
        yield Task(number, sources[number].path, forms[number], chunk)


def _form_of(source: Source) -> Format | None:
    """The format of a file; None where no row can be read.

    Raises:
        DataError: the file cannot be read, has no rows, or is of no format that is known.
    """
    rows = (row for chunk in look_at(source.path).chunks() for row in chunk.records())
    has_rows, records = False, list[Record]()
    for row in rows:
        has_rows = True
        if isinstance(row, Record):
            records.append(row)
            if len(records) == RECOGNISED_BY:
                break
    if not has_rows:
        raise DataError(
            f"{source.path.name} holds no rows; expected at least one.\n  Training has not started."
        )
    return recognise(records, source.columns) if records else None


def _examples(columns: Columns, sources: Sequence[Source]) -> Examples:
    return Examples(
        columns,
        [source.path for source in sources],
        file_weights=[source.weight for source in sources],
    )


def _noted(dataset: Dataset, account: _Account) -> dict[str, Any]:
    """What the cache keeps of a dataset beside its examples."""
    return {
        "accounting": dataset.accounting.to_json(),
        "notes": dataset.notes,
        "tally": account.tally.to_json(),
    }


def _cached(
    entry: Entry, encoder: Encoder, sources: Sequence[Source], digests: Sequence[str]
) -> Dataset | None:
    found = entry.open()
    if found is None:
        return None
    columns, noted = found
    tally = Tally.from_json(noted["tally"])
    return Dataset(
        _examples(columns, sources),
        Accounting(**noted["accounting"]),
        tuple(noted["notes"]),
        content_hash(digests),
        encoder.template.with_thinking(True) if tally.thinking else encoder.template,
        encoder.tokenizer,
        tally.row_lengths,
        faults_from_json(tally.refusals),
    )


def _key(
    encoder: Encoder,
    sources: Sequence[Source],
    digests: Sequence[str],
    tokenizer_hash: str,
    on_bad_row: OnBadRow,
) -> str:
    """A hash of everything that decides the examples and what is said about them."""
    folder = Path(__file__).parent
    source_code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        source_code.update(path.read_bytes())
    parts = {
        "myna": __version__,
        "code": source_code.hexdigest(),
        "packages": {
            name: importlib.metadata.version(name)
            for name in ("tokenizers", "transformers", "jinja2")
        },
        "tokenizer": tokenizer_hash,
        "encoder": {
            name: described(value) for name, value in vars(encoder).items() if name != "tokenizer"
        },
        "on_bad_row": on_bad_row,
        # Notes have the names of the files in them.
        "files": [
            [source.path.name, digest, source.rows, source.entry, dict(source.columns)]
            for source, digest in zip(sources, digests, strict=True)
        ],
    }
    if "strftime_now" in encoder.template.source:
        parts["date"] = datetime.date.today().isoformat()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def described(value: Any) -> Any:
    """`value` as JSON, equal for equal settings; TypeError for what has no such form."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return sorted([described(key), described(each)] for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(described, value))
    if isinstance(value, re.Pattern):
        return value.pattern
    if is_dataclass(value) and not isinstance(value, type):
        # What does not count where two of them are compared is no setting.
        return {
            each.name: described(getattr(value, each.name))
            for each in fields(value)
            if each.compare
        }
    if type(value).__name__ == "AddedToken":
        return repr(value)
    raise TypeError(f"{type(value).__name__} has no fixed description")
