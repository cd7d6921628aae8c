"""sample.json: a few rows of a run as they were trained, token by token.

Owns the file, so that a report shows what was trained even where the data has moved or changed
since. Which tokens have a label is `encode.py`'s; colours are `web_page.py`'s.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from myna.data.preview import pieces, place_of
from myna.data.store import Example
from myna.errors import StorageError
from myna.run_dir import write_file

SAMPLE_ROWS = 3
"""Rows in the file, the first that are trained."""


@dataclass(frozen=True)
class TokenRow:
    """One trained answer with its context, cut into tokens."""

    place: str
    """File and line of its row."""
    answer: int
    """Number of the answer in its row, from 1; 0 for a plain text."""
    context_tokens: int
    trained_tokens: int
    context: Sequence[str]
    """Texts of the tokens without a label; those within one character are joined."""
    trained: Sequence[str]
    """Texts of those with one."""


def token_row_of(example: Example, tokenizer: Any) -> TokenRow:
    """The tokens of an example; see `preview.pieces`."""
    context, trained = pieces(example, tokenizer)
    return TokenRow(
        place_of(example),
        example.turn,
        len(example.prompt_ids),
        len(example.completion_ids),
        context,
        trained,
    )


def write_sample(path: Path, examples: Sequence[Example], tokenizer: Any) -> None:
    """Write the first of the trained examples; StorageError where that fails."""
    rows = [token_row_of(examples[at], tokenizer) for at in range(min(SAMPLE_ROWS, len(examples)))]
    # Escaped to ASCII: the name of a file may have bytes that are no UTF-8.
    write_file(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_sample(path: Path) -> list[TokenRow]:
    """The rows of the file; StorageError where it holds something else."""
    try:
        return [_read_row(found) for found in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path}: is no sample of trained rows: {error}.") from None


def _read_row(found: Any) -> TokenRow:
    row = TokenRow(**found)
    texts = [row.place, *row.context, *row.trained]
    numbers = [row.answer, row.context_tokens, row.trained_tokens]
    if {*map(type, texts)} != {str} or {*map(type, numbers)} != {int}:
        raise TypeError("a field is of a wrong type")
    return row
