"""Examples: what is trained, millions of answers in a few large arrays.

Owns what an example is and how many of them are kept: token ids, texts, places and hashes as
columns, in memory or mapped from files, so that no Python object stands for a row until it is asked
for. How examples are made is `encode.py`'s; which files hold the columns is `cache.py`'s.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from myna.data.conversation import Place

Array = NDArray[Any]
Columns = dict[str, Array]
"""Arrays by the names of `COLUMNS` and `HEAPS`."""

TRUNCATED: tuple[str | None, ...] = (None, "turns_dropped", "text_shortened")
"""What may have been taken out of a prompt; the column `truncated` has the place in this list."""

COLUMNS: Mapping[str, str] = {
    "prompt_lengths": "int32",
    "completion_lengths": "int32",
    "prompt_hashes": "uint64",
    "completion_hashes": "uint64",
    "weights": "float32",
    "file_indices": "int32",
    "lines": "int32",
    "rows": "int32",
    "turns": "int32",
    "truncated": "uint8",
    "id_starts": "int64",
    "text_starts": "int64",
    "prompt_bytes": "int32",
    "completion_bytes": "int32",
}
"""Name and dtype of the columns with one entry per example, shape (N,)."""

HEAPS: Mapping[str, str] = {"ids": "uint32", "texts": "uint8"}
"""What the columns point into: all token ids and all UTF-8 texts, one example after the other, its
prompt before its completion. On disk, ids of a small vocabulary are uint16."""

_TEXTS_AT_ONCE = 1 << 16
"""Places of texts that are Python objects at a time."""


@dataclass(frozen=True, slots=True)
class Example:
    """One trained answer: context without labels, then a completion of which every id is one."""

    prompt_text: str
    completion_text: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    place: Place
    turn: int
    """Number of the answer in its row, counted from 1; 0 for a plain text."""
    truncated: str | None = None
    """What was taken out of the prompt to fit `max_length`: `turns_dropped`, `text_shortened`."""
    weight: float = 1.0
    """Of its trained tokens in the loss."""


class Examples(Sequence[Example]):
    """N examples as columns; an `Example` is made when one is asked for by its number.

    Args:
        columns: in memory or mapped from files.
        files: the data files; `file_indices` are places in this list.
        chosen: numbers of the examples in `columns` that these are, in their order. None: all.
        file_weights: how often the rows of each file come in an epoch. None: all once.
    """

    def __init__(
        self,
        columns: Columns,
        files: Sequence[Path],
        chosen: NDArray[np.int64] | None = None,
        *,
        file_weights: Sequence[float] | None = None,
    ) -> None:
        self.files = tuple(files)
        self.file_weights = (1.0,) * len(self.files) if file_weights is None else (*file_weights,)
        self._columns = columns
        self._chosen = chosen

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """`examples` as columns in memory; what has columns already is returned as it is."""
        if isinstance(examples, Examples):
            return examples
        rows = list(examples)
        files = list(dict.fromkeys(row.place.file for row in rows))
        return cls(columns_of(rows, files), files)

    def __len__(self) -> int:
        """N."""
        if self._chosen is None:
            return len(self._columns["prompt_lengths"])
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        """One example, or some without making them."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        number = range(len(self))[index]
        at = number if self._chosen is None else int(self._chosen[number])

        def entry(name: str) -> int:
            return int(self._columns[name][at])

        start, border = entry("id_starts"), entry("prompt_lengths")
        ids = self._columns["ids"][start : start + border + entry("completion_lengths")].tolist()
        start, size = entry("text_starts"), entry("prompt_bytes")
        text = self._columns["texts"][start : start + size + entry("completion_bytes")].tobytes()
        return Example(
            _text(text[:size]),
            _text(text[size:]),
            tuple(ids[:border]),
            tuple(ids[border:]),
            Place(self.files[entry("file_indices")], entry("lines"), entry("rows")),
            entry("turns"),
            TRUNCATED[entry("truncated")],
            float(self._columns["weights"][at]),
        )

    def select(self, indices: ArrayLike) -> "Examples":
        """Those with these numbers, in this order, over the same arrays."""
        numbers = np.asarray(indices, dtype=np.int64)
        chosen = numbers if self._chosen is None else self._chosen[numbers]
        return Examples(self._columns, self.files, chosen, file_weights=self.file_weights)

    def _column(self, name: str) -> Array:
        column = self._columns[name]
        return column if self._chosen is None else column[self._chosen]

    @property
    def prompt_lengths(self) -> NDArray[np.int32]:
        """(N,) tokens of each prompt."""
        return self._column("prompt_lengths")

    @property
    def completion_lengths(self) -> NDArray[np.int32]:
        """(N,) tokens of each completion."""
        return self._column("completion_lengths")

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(N,) tokens of each example, prompt and completion."""
        total: NDArray[np.int32] = self.prompt_lengths + self.completion_lengths
        return total

    @property
    def prompt_hashes(self) -> NDArray[np.uint64]:
        """(N,) equal where the prompt's ids are equal; else different, but for one in 2^64."""
        return self._column("prompt_hashes")

    @property
    def completion_hashes(self) -> NDArray[np.uint64]:
        """(N,) the same of the completion's ids."""
        return self._column("completion_hashes")

    @property
    def weights(self) -> NDArray[np.float32]:
        """(N,) of the trained tokens in the loss."""
        return self._column("weights")

    @property
    def file_indices(self) -> NDArray[np.int32]:
        """(N,) places in `files`."""
        return self._column("file_indices")

    @property
    def lines(self) -> NDArray[np.int32]:
        """(N,) line of each example's row in its file, from 1."""
        return self._column("lines")

    @property
    def rows(self) -> NDArray[np.int32]:
        """(N,) number of each example's row in its file, from 1."""
        return self._column("rows")

    @property
    def turns(self) -> NDArray[np.int32]:
        """(N,) number of the answer in its row, from 1."""
        return self._column("turns")

    @property
    def truncated(self) -> NDArray[np.uint8]:
        """(N,) places in `TRUNCATED`."""
        return self._column("truncated")

    def id_blocks(self, max_tokens: int = 1 << 22) -> Iterator[tuple[int, int, Array]]:
        """(first, last, ids) of runs of examples: the ids of each run, one example after the other.

        A run is as many examples as have `max_tokens` ids together, but at least one.
        """
        starts, lengths = self._column("id_starts"), self.lengths.astype(np.int64)
        ends = np.cumsum(lengths)
        first = 0
        while first < len(self):
            done = int(ends[first] - lengths[first])
            last = max(int(np.searchsorted(ends, done + max_tokens, side="right")), first + 1)
            run = slice(first, last)
            # From where an id stands in the run to where it stands in the heap.
            moves = np.repeat(starts[run] - (ends[run] - lengths[run] - done), lengths[run])
            yield first, last, self._columns["ids"][moves + np.arange(len(moves))]
            first = last

    def texts(self) -> Iterator[tuple[str, str]]:
        """(prompt, completion) text of each example in order, cheaper than asking for each."""
        heap = np.asarray(self._columns["texts"]).data
        names = ("text_starts", "prompt_bytes", "completion_bytes")
        columns = [self._column(name) for name in names]
        for first in range(0, len(self), _TEXTS_AT_ONCE):
            some = [column[first : first + _TEXTS_AT_ONCE].tolist() for column in columns]
            for start, prompt, completion in zip(*some, strict=True):
                border = start + prompt
                yield _text(heap[start:border]), _text(heap[border : border + completion])


def columns_of(examples: Sequence[Example], files: Sequence[Path]) -> Columns:
    """`examples` as columns; their files are among `files`."""
    numbers = {file: number for number, file in enumerate(files)}
    ids: list[int] = []
    texts: list[bytes] = []
    for example in examples:
        ids += example.prompt_ids
        ids += example.completion_ids
        texts += (_bytes(example.prompt_text), _bytes(example.completion_text))
    found: dict[str, Any] = {
        "prompt_lengths": [len(example.prompt_ids) for example in examples],
        "completion_lengths": [len(example.completion_ids) for example in examples],
        "weights": [example.weight for example in examples],
        "file_indices": [numbers[example.place.file] for example in examples],
        "lines": [example.place.line for example in examples],
        "rows": [example.place.row for example in examples],
        "turns": [example.turn for example in examples],
        "truncated": [TRUNCATED.index(example.truncated) for example in examples],
        "prompt_bytes": [len(text) for text in texts[0::2]],
        "completion_bytes": [len(text) for text in texts[1::2]],
    }
    columns: Columns = {name: np.array(column, COLUMNS[name]) for name, column in found.items()}
    heap = np.array(ids, np.uint32)
    columns["ids"] = heap
    columns["texts"] = np.frombuffer(b"".join(texts), np.uint8)
    columns["id_starts"], borders, ends = _cuts(columns, "prompt_lengths", "completion_lengths")
    columns["text_starts"], *_ = _cuts(columns, "prompt_bytes", "completion_bytes")
    columns["prompt_hashes"] = hash_runs(heap, columns["id_starts"], borders)
    columns["completion_hashes"] = hash_runs(heap, borders, ends)
    return columns


def joined(parts: Sequence[Columns]) -> Columns:
    """The examples of all parts, one after the other."""
    moved, ids, texts = [], 0, 0
    for part in parts:
        moved.append(behind(part, ids, texts))
        ids, texts = ids + len(part["ids"]), texts + len(part["texts"])
    return {name: np.concatenate([part[name] for part in moved]) for name in moved[0]}


def behind(part: Columns, ids: int, texts: int) -> Columns:
    """`part` as it stands behind so many ids and bytes of text of other parts."""
    starts = {"id_starts": part["id_starts"] + ids, "text_starts": part["text_starts"] + texts}
    return {**part, **starts}


def _cuts(
    columns: Columns, first: str, second: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where each example's prompt begins, its completion begins and ends."""
    lengths = columns[first].astype(np.int64) + columns[second]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    return starts, starts + columns[first], ends


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of the 64-bit numbers under which near ones go far apart.

    The finalizer of splitmix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators", figure 15. A part of saved runs: it must stay as it is.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def changes(values: Array) -> NDArray[np.bool_]:
    """(N,) whether a value differs from the one before it; the first does."""
    found = np.ones(len(values), np.bool_)
    found[1:] = values[1:] != values[:-1]
    return found


def hash_runs(
    ids: NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """(N,) hashes of the runs `ids[starts[i]:ends[i]]`, a function of their ids alone.

    The sum of `mix` over (place in the run, id), mixed with the length.
    """
    lengths = ends - starts
    inside = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(inside[-1], dtype=np.int64) - np.repeat(inside[:-1], lengths)
    chosen = ids[np.repeat(starts, lengths) + place].astype(np.uint64)
    mixed = mix((place.astype(np.uint64) << np.uint64(32)) | chosen)
    # Differences of a running sum, modulo 2^64: exact, whatever overflowed on the way.
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return mix(running[inside[1:]] - running[inside[:-1]] + lengths.astype(np.uint64))


def _bytes(text: str) -> bytes:
    # A lone surrogate, which no file can hold but a caller can, survives.
    return text.encode("utf-8", "surrogatepass")


def _text(content: bytes | memoryview) -> str:
    return str(content, "utf-8", "surrogatepass")
