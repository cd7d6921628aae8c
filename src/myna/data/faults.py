"""Faults: what is wrong with single rows, and whether they stop a run or are counted.

Owns how findings are collected, grouped, listed and cut to a screenful, and what `on_bad_row`
means. What counts as a fault is decided where rows are read (`files.py`), mapped (`formats.py`) and
encoded (`encode.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from myna.data.conversation import Place
from myna.errors import DataError

SCREENFUL = 20
"""Different faults printed, and lines listed per fault, before the rest is only counted."""

_MAX_KINDS = 1_000
"""Kinds told apart. Where each of a million rows is bad in its own way, memory stays flat."""

OnBadRow = Literal["stop", "skip"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that cannot be trained on."""

    kind: str
    """Faults of one kind are printed once, with all their lines. The word before the first colon
    is the reason that the accounting gives."""
    place: Place
    finding: str
    """What was found and what was expected, a sentence."""
    mend: str = ""
    """How to repair it, a sentence."""
    column: int | None = None
    ends_file: bool = False
    """Where the next row begins cannot be told, so all behind it is lost too."""

    @property
    def reason(self) -> str:
        """The kind, as the accounting of rows calls it."""
        return self.kind.partition(":")[0]

    def __str__(self) -> str:
        """`train.jsonl line 4, column 7: <finding>` and the mend on a line of its own."""
        column = "" if self.column is None else f", column {self.column}"
        mend = f"\n  {self.mend}" if self.mend else ""
        return f"{self.place}{column}: {self.finding}{mend}"


@dataclass
class _Group:
    """Faults of one kind: a screenful of them, and how many there are."""

    listed: list[Fault]
    count: int


@dataclass
class Faults:
    """Bad rows as they are met: a screenful is kept, the rest is counted.

    With `skip`, rows are only counted. A fault that hides the rows behind it stops the run all the
    same: nobody could say how many rows were lost.
    """

    on_bad_row: OnBadRow = "stop"
    _stopping: dict[str, _Group] = field(default_factory=dict)
    _skipped: dict[str, _Group] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        """Note one bad row."""
        if self.on_bad_row == "stop" or fault.ends_file:
            groups, kind = self._stopping, fault.kind
            if self.on_bad_row == "skip":
                hint = "on_bad_row: skip does not help: where the next row begins cannot be told."
                fault = replace(fault, mend=f"{fault.mend}  {hint}".strip())
        else:
            groups, kind = self._skipped, fault.reason
        if kind not in groups and len(groups) >= _MAX_KINDS:
            kind = fault.reason
        group = groups.setdefault(kind, _Group([], 0))
        group.count += 1
        if len(group.listed) < SCREENFUL:
            group.listed.append(fault)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Rows skipped, by reason."""
        return Counter({reason: group.count for reason, group in self._skipped.items()})

    @property
    def skipped_first(self) -> list[Fault]:
        """Rows skipped, a screenful of each reason."""
        return [fault for group in self._skipped.values() for fault in group.listed]

    def notes(self) -> Iterator[str]:
        """One line for each reason of which rows are skipped, with the first of them."""
        for reason, group in self._skipped.items():
            rows = "row" if group.count == 1 else "rows"
            yield (
                f"{group.count:,} bad {rows} skipped ({reason}), the first: "
                + str(group.listed[0]).replace("\n ", "")
            )

    def mend(self, kind: str, mend: str) -> None:
        """Say how rows of this kind are mended, where it is known only after all of them."""
        for groups in (self._stopping, self._skipped):
            for group in groups.values():
                group.listed = [
                    replace(fault, mend=mend) if fault.kind == kind else fault
                    for fault in group.listed
                ]

    def raise_listed(self) -> None:
        """Raise one DataError that lists all rows that stop the run; return if there are none."""
        if not self._stopping:
            return
        groups = list(self._stopping.values())
        blocks = [_describe(group) for group in groups[:SCREENFUL]]
        if unlisted := groups[SCREENFUL:]:
            rows = sum(group.count for group in unlisted)
            blocks.append(f"and {rows:,} more {'rows' if rows > 1 else 'row'} with other faults.")
        separator = "\n"
        if len(blocks) == 1:
            separator = " " if "\n" in blocks[0] else "\n  "
        raise DataError("\n".join(blocks) + separator + "Training has not started.")


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise one DataError that lists all `faults`; return if there are none."""
    collected = Faults()
    for fault in faults:
        collected.add(fault)
    collected.raise_listed()


def _describe(group: _Group) -> str:
    first = group.listed[0]
    if group.count == 1:
        return str(first)
    if all(fault.place.file == first.place.file for fault in group.listed):
        unit = "lines" if first.place.line else "rows"
        numbers = [fault.place.line or fault.place.row for fault in group.listed]
        where = f"{unit} {', '.join(map(str, numbers))}"
    else:
        where = ", ".join(str(fault.place) for fault in group.listed)
    if group.count > SCREENFUL:
        where += f" and {group.count - SCREENFUL:,} more"
    gap = "  " if first.mend else "\n  "
    return f"{first}{gap}{group.count:,} rows have this fault: {where}."
