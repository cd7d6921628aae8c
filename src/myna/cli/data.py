"""`myna data`: shows what would be trained, without training.

Owns which rows are shown and in what form: on the terminal, as the object that other programs read,
or as a page. Options and config are read in `main.py`; the counts are `myna.data.statistics`',
the drawing is in `myna.data.preview` and `myna.data.page`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from myna.cli.pager import paged
from myna.cli.preparation import Prepared
from myna.config import Config
from myna.data.conversation import Place
from myna.data.dataset import Dataset
from myna.data.faults import Fault
from myna.data.page import page
from myna.data.preview import coloured_example, overview, row_remarks, visible
from myna.data.statistics import Repeats, Statistics, count_everything, find_repeats
from myna.data.store import Example, Examples
from myna.errors import ConfigError, StorageError

Kind = Literal["trained", "refused", "truncated", "duplicate", "conflict"]

PAGE_ROWS = 20
"""Rows on the page that `--html` writes, where `--rows` does not say."""


@dataclass(frozen=True)
class Wanted:
    """Which rows a person asked to see; all of the conditions hold."""

    row: str | None = None
    """The number of a row in its file, or FILE:LINE."""
    find: str | None = None
    """Text in the prompt or in the answer, in any case."""
    only: Kind | None = None

    def __bool__(self) -> bool:
        """Whether anything was asked for."""
        return self != Wanted()


def run(
    prepared: Prepared,
    config: Config,
    *,
    as_json: bool,
    html: Path | None,
    rows: int | None,
    wanted: Wanted,
    console: Console,
) -> None:
    """Show the data set: all of it in numbers, or the rows that are wanted.

    Args:
        prepared: what would be trained.
        config: the settings of the run that would train it.
        as_json: print the object that other programs read, and nothing else.
        html: write a page there, and print only where it is.
        rows: how many answers to show at most. Not set: one after the numbers, all that are wanted,
            none in the JSON object, `PAGE_ROWS` on the page.
        wanted: which answers; all if nothing is asked for.
        console: where to print.

    Raises:
        ConfigError: there is no such row.
        StorageError: the page cannot be written.
    """
    dataset = prepared.dataset
    if not as_json and html is None and wanted:
        _show_rows(dataset, rows, wanted, console)
        return
    statistics = count_everything(
        dataset,
        held_out=config.held_out,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        max_length=prepared.encoder.max_length,
    )
    if html is not None:
        _write_page(dataset, statistics, html, PAGE_ROWS if rows is None else rows, wanted)
    if as_json:
        # Escaped to ASCII, and past rich, which would wrap lines and colour numbers.
        print(json.dumps(_to_json(dataset, statistics, rows, wanted)), file=console.file)
    elif html is not None:
        console.print(f"The page is {html}", soft_wrap=True)
    else:
        console.print(overview(dataset, statistics, examples=1 if rows is None else rows))


def choose(dataset: Dataset, wanted: Wanted, repeats: Repeats) -> Iterator[int]:
    """Numbers of the examples that are wanted, in order, found as they are asked for.

    Raises ConfigError where `row` names no row, refused ones included.
    """
    examples = dataset.examples
    chosen = np.ones(len(examples), np.bool_)
    if wanted.row is not None:
        chosen &= _find_row(dataset, wanted.row).of(examples)
    if wanted.only is not None:
        chosen &= _is_kind(examples, wanted.only, repeats)
    numbers = np.flatnonzero(chosen)
    if wanted.find is None:
        return iter(numbers.tolist())
    needle = wanted.find.casefold()
    return (
        number
        for number, texts in zip(numbers.tolist(), examples.select(numbers).texts(), strict=True)
        if any(needle in text.casefold() for text in texts)
    )


def choose_refused(dataset: Dataset, wanted: Wanted) -> Iterator[Fault]:
    """The refused rows that are wanted: asked for by their kind, or by their place."""
    if wanted.only != "refused" and (wanted.only is not None or wanted.row is None):
        return
    row = None if wanted.row is None else _find_row(dataset, wanted.row)
    for fault in dataset.refusals:
        if row is not None and not row.has(fault.place):
            continue
        if wanted.find is None or wanted.find.casefold() in str(fault).casefold():
            yield fault


def _show_rows(dataset: Dataset, rows: int | None, wanted: Wanted, console: Console) -> None:
    repeats = find_repeats(dataset.examples)
    numbers = islice(choose(dataset, wanted, repeats), rows)
    shown = 0
    with paged(console) as output:
        # Lines that a program reads are not broken at the width of a screen that is not there.
        wraps = output.is_terminal
        for fault in islice(choose_refused(dataset, wanted), rows):
            output.print(Text(visible(f"refused: {fault}").rstrip()), soft_wrap=not wraps)
            shown += 1
        if wanted.only == "refused" and (more := _not_kept(dataset)):
            output.print(f"and {more:,} refused rows more, of which only the number is kept")
        for number in numbers:
            text = coloured_example(
                dataset.examples[number],
                dataset.tokenizer,
                whole=wanted.row is not None,
                remarks=row_remarks(repeats, dataset.examples, number),
            )
            if wanted.find is not None:
                text.highlight_words([visible(wanted.find)], "reverse", case_sensitive=False)
            output.print(text, soft_wrap=not wraps)
            shown += 1
    if not shown:
        console.print("No row fits.")


def _not_kept(dataset: Dataset) -> int:
    return sum(dataset.accounting.refused.values()) - len(dataset.refusals)


def _to_json(
    dataset: Dataset, statistics: Statistics, rows: int | None, wanted: Wanted
) -> dict[str, Any]:
    """The contract of `myna data --json`, see the design; keys are only ever added."""
    result = statistics.to_json()
    if rows is not None or wanted:
        numbers = islice(choose(dataset, wanted, statistics.repeats), rows)
        result["rows"] = [_row_to_json(dataset.examples[number]) for number in numbers]
    if wanted.only == "refused":
        result["refused_rows"] = [
            {
                "file": str(fault.place.file),
                "line": fault.place.line,
                "row": fault.place.row,
                "finding": fault.finding,
            }
            for fault in islice(choose_refused(dataset, wanted), rows)
        ]
    return result


def _row_to_json(example: Example) -> dict[str, Any]:
    return {
        "prompt_text": example.prompt_text,
        "completion_text": example.completion_text,
        "prompt_ids": list(example.prompt_ids),
        "completion_ids": list(example.completion_ids),
        "file": str(example.place.file),
        "line": example.place.line,
        "row": example.place.row,
        "answer": example.turn,
        "weight": example.weight,
    }


def _write_page(
    dataset: Dataset, statistics: Statistics, path: Path, rows: int, wanted: Wanted
) -> None:
    numbers = list(islice(choose(dataset, wanted, statistics.repeats), rows))
    names = [file.name for file in dataset.examples.files]
    title = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    try:
        path.write_text(page(dataset, statistics, numbers, title=title), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"--html: {path} cannot be written ({error.strerror}).\n  Name a file in a folder that "
            "is there and may be written to."
        ) from error


@dataclass(frozen=True)
class _Row:
    """One row, or the rows of several files with one number."""

    number: int | None = None
    """In its file; None where the line is known."""
    files: frozenset[Path] = frozenset()
    """Empty: in any file."""
    line: int | None = None

    def of(self, examples: Examples) -> NDArray[np.bool_]:
        """(N,) whether an example is of this row."""
        numbers = examples.rows if self.line is None else examples.lines
        found: NDArray[np.bool_] = numbers == (self.number if self.line is None else self.line)
        if self.files:
            inside = [index for index, file in enumerate(examples.files) if file in self.files]
            found &= np.isin(examples.file_indices, inside)
        return found

    def has(self, place: Place) -> bool:
        """Whether a place is of this row."""
        if self.files and place.file not in self.files:
            return False
        return place.row == self.number if self.line is None else place.line == self.line


def _find_row(dataset: Dataset, text: str) -> _Row:
    """The row that `--row` names: by its number, or by a file and a line that it stands on."""
    examples, refused = dataset.examples, [fault.place for fault in dataset.refusals]
    name, colon, digits = text.rpartition(":")
    if not digits.isdecimal() or (colon and not name):
        raise ConfigError(
            f"--row is {text!r}; expected the number of a row, such as 84, or a file and a line, "
            "such as rows.jsonl:418."
        )
    number = int(digits)
    if not colon:
        last = max([int(examples.rows.max()), *(place.row for place in refused)])
        if not 1 <= number <= last:
            raise ConfigError(f"--row is {number}; the rows have numbers from 1 to {last:,}.")
        return _Row(number=number)
    known = {*examples.files, *(place.file for place in refused)}
    files = frozenset(file for file in known if name in (file.name, str(file)))
    if not files:
        listed = ", ".join(sorted(file.name for file in known)[:10])
        raise ConfigError(f"--row names the file {name}; the data files are {listed}.")
    inside = [index for index, file in enumerate(examples.files) if file in files]
    lines = examples.lines[np.isin(examples.file_indices, inside)].tolist()
    lines += [place.line for place in refused if place.file in files]
    if not any(lines):  # Parquet and the like have rows only
        return _Row(number=number, files=files)
    # A row begins on its line and may go on over the next ones.
    begun = max((line for line in lines if line <= number), default=None)
    if begun is None:
        raise ConfigError(f"--row is {text}; the first row there begins on line {min(lines)}.")
    return _Row(files=files, line=begun)


def _is_kind(examples: Examples, kind: Kind, repeats: Repeats) -> NDArray[np.bool_]:
    if kind == "duplicate":
        return repeats.is_duplicate
    if kind == "conflict":
        return repeats.in_conflict
    if kind == "refused":
        return np.zeros(len(examples), np.bool_)
    is_whole: NDArray[np.bool_] = examples.truncated == 0
    return is_whole if kind == "trained" else ~is_whole
