"""The time and memory that planning takes: every step of an epoch cut into packs.

    python benchmarks/packing.py [--rows 1000000] [--small]

Seeded rows of 60 tokens, the first 15 of them common to all, 18 trained, 16 rows a step; on one
core. Three figures: all packs of the epoch with one pack a step, the same under a budget that cuts
every step in four, and the count that statistics need. Memory is the peak of the whole process,
rows and libraries included, over all three; as in training, a pack is dropped after use.
`results/packing.json` keeps them with versions, hardware and command; `--small` takes 20,000 rows
and writes nothing.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import overload

import numpy as np
import torch

from myna.data.conversation import Place
from myna.data.loader import rows_of_steps, steps_per_epoch
from myna.data.packing import pack_step, packed_tokens
from myna.data.store import Example
from myna.device import processor

RESULTS = Path(__file__).parent / "results" / "packing.json"
ROW, PREFIX, TRAINED, VOCABULARY, BATCH_SIZE, BUDGET = 60, 15, 18, 100_008, 16, 256
PLACE = Place(Path("synthetic"), 1, 1)


class SyntheticRows(Sequence[Example]):
    """Rows as one array of ids, 240 bytes each; an Example is made when it is asked for."""

    def __init__(self, num_rows: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.ids = random.integers(3, VOCABULARY, (num_rows, ROW), dtype=np.int32)
        self.ids[:, :PREFIX] = self.ids[0, :PREFIX]

    def __len__(self) -> int:
        """Rows of the epoch."""
        return len(self.ids)

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        """The row as the encoder would give it, without its texts."""
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        ids = tuple(self.ids[row].tolist())
        return Example("", "", ids[:-TRAINED], ids[-TRAINED:], PLACE, 1)


def measure(rows: SyntheticRows, token_budget: int | None) -> dict[str, object]:
    packs = tokens = 0
    started = time.perf_counter()
    for step_rows in steps(rows):
        for pack in pack_step(rows, step_rows, token_budget=token_budget):
            packs += 1
            tokens += pack.computed_tokens
    seconds = time.perf_counter() - started
    return {
        "token_budget": token_budget,
        "seconds": round(seconds, 2),
        "microseconds_per_row": round(1e6 * seconds / len(rows), 2),
        "packs": packs,
        "computed_tokens": tokens,
    }


def measure_count(rows: SyntheticRows) -> dict[str, object]:
    started = time.perf_counter()
    tokens = sum(packed_tokens(rows, step_rows) for step_rows in steps(rows))
    return {"seconds": round(time.perf_counter() - started, 2), "computed_tokens": tokens}


def steps(rows: SyntheticRows) -> Iterator[list[int]]:
    count = steps_per_epoch(len(rows), BATCH_SIZE)
    of_steps = rows_of_steps(len(rows), BATCH_SIZE, seed=0, first_step=1, last_step=count)
    return (step_rows for _, _, step_rows in of_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small", action="store_true", help="20,000 rows, no result written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = SyntheticRows(20_000 if options.small else options.rows, seed=0)
    results: dict[str, object] = {
        "command": " ".join(["python benchmarks/packing.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor().name,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "numpy")},
        },
        "rows": len(rows),
        "steps": steps_per_epoch(len(rows), BATCH_SIZE),
        "tokens": len(rows) * ROW,
        "one_pack_a_step": measure(rows, None),
        "cut": measure(rows, BUDGET),
        "count_only": measure_count(rows),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    if not options.small:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
