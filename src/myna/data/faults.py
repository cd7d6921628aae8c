"""Faults: what is wrong with single rows, collected and raised as one error.

Owns how findings are grouped, listed and cut to a screenful. What counts as a fault is decided
where rows are read (`files.py`), mapped (`formats.py`) and encoded (`encode.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from myna.data.conversation import Place
from myna.errors import DataError

SCREENFUL = 20
"""Different faults printed, and lines listed per fault, before the rest is only counted."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that cannot be trained on."""

    kind: str
    """Faults of one kind are printed once, with all their lines."""
    place: Place
    finding: str
    """What was found and what was expected, a sentence."""
    mend: str = ""
    """How to repair it, a sentence."""
    column: int | None = None

    def __str__(self) -> str:
        """`train.jsonl line 4, column 7: <finding>` and the mend on a line of its own."""
        column = "" if self.column is None else f", column {self.column}"
        mend = f"\n  {self.mend}" if self.mend else ""
        return f"{self.place}{column}: {self.finding}{mend}"


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise one DataError that lists all `faults`; return if there are none."""
    if not faults:
        return
    groups: dict[str, list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.kind, []).append(fault)
    blocks = [_describe(group) for group in list(groups.values())[:SCREENFUL]]
    unlisted = list(groups.values())[SCREENFUL:]
    if unlisted:
        rows = sum(len(group) for group in unlisted)
        blocks.append(f"and {rows} more {'rows' if rows > 1 else 'row'} with other faults.")
    separator = "\n"
    if len(blocks) == 1:
        separator = " " if "\n" in blocks[0] else "\n  "
    raise DataError("\n".join(blocks) + separator + "Training has not started.")


def _describe(group: Sequence[Fault]) -> str:
    first = group[0]
    if len(group) == 1:
        return str(first)
    listed = group[:SCREENFUL]
    if all(fault.place.file == first.place.file for fault in group):
        where = "lines " + ", ".join(str(fault.place.line) for fault in listed)
    else:
        where = ", ".join(str(fault.place) for fault in listed)
    if len(group) > SCREENFUL:
        where += f" and {len(group) - SCREENFUL} more"
    gap = "  " if first.mend else "\n  "
    return f"{first}{gap}{len(group)} rows have this fault: {where}."
