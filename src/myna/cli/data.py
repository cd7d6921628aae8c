"""`myna data`: shows what would be trained, without training.

Owns what the command prints. Options and config are read in `main.py`; the drawing is in
`myna.data.preview`.
"""

import json

from rich.console import Console

from myna.data.dataset import Dataset
from myna.data.preview import preview, to_json


def show(dataset: Dataset, *, as_json: bool, rows: int | None, console: Console) -> None:
    """Print the data set for a person, or as one JSON object on one line.

    Args:
        dataset: what would be trained.
        as_json: print the object that other programs read, and nothing else.
        rows: how many trained answers to show. Not set: one, or none in the JSON object.
        console: where to print.
    """
    if as_json:
        # Escaped to ASCII, and past rich, which would wrap lines and colour numbers.
        print(json.dumps(to_json(dataset, rows)), file=console.file)
    else:
        console.print(preview(dataset, examples=1 if rows is None else rows))
