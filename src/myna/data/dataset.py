"""Datasets: encoded rows, and an account of what became of each.

Owns the accounting (rows in = trained + refused + truncated), how accounts of parts add up, and
what a person is told about all rows. What one row becomes is `encode.py`'s; how rows of large files
come here is `pipeline.py`'s.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from myna.data.conversation import Conversation, Place
from myna.data.encode import EncodedRow, Encoder, Ids, RowRefused
from myna.data.faults import Fault, Faults, OnBadRow
from myna.data.formats import Rows
from myna.data.lengths import RowLengths, suggest_lengths
from myna.data.store import Columns, Example, Examples, columns_of, joined, mix
from myna.data.templates import ChatTemplate
from myna.errors import DataError

REFUSALS_KEPT = 1000
"""Dropped rows that can be looked at; of more, the number is all that is kept."""

_BATCH = 512
"""Conversations tokenized by one call: enough to keep a fast tokenizer's threads busy."""


@dataclass(frozen=True)
class Accounting:
    """What became of every row: rows_in = trained + refused + truncated."""

    rows_in: int
    trained: int
    """Rows trained whole."""
    refused: Mapping[str, int]
    """Rows not trained, by reason."""
    truncated: Mapping[str, int]
    """Rows trained with a shortened prompt, by what was taken out."""
    tokens: int
    """Token positions of all examples, prompts and completions."""
    trained_tokens: int
    """Those with a label."""

    def __post_init__(self) -> None:
        """Refuse an account that does not add up."""
        total = self.trained + sum(self.refused.values()) + sum(self.truncated.values())
        assert self.rows_in == total, f"{self.rows_in} rows came in and {total} are accounted for"

    def to_json(self) -> dict[str, Any]:
        """The fields, as `myna data --json` and data.json have them."""
        return {
            "rows_in": self.rows_in,
            "trained": self.trained,
            "refused": dict(self.refused),
            "truncated": dict(self.truncated),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }


@dataclass(frozen=True)
class Dataset:
    """Everything a run trains on."""

    examples: Examples
    accounting: Accounting
    notes: tuple[str, ...]
    """What a person should know before step 1, one line each."""
    content_hash: str
    """sha256 of the data files."""
    template: ChatTemplate
    """The template to save and serve with: the encoder's, its thinking switch set as trained."""
    tokenizer: Any
    """The tokenizer of the ids, to show where tokens begin."""
    row_lengths: RowLengths
    """Of all rows, those refused or shortened for their length as they came in."""
    refusals: tuple[Fault, ...] = ()
    """Rows that were dropped or skipped, the first of each reason."""


@dataclass
class Tally:
    """Counts over some rows. Those of parts add up to those of the whole."""

    rows_in: int = 0
    trained: int = 0
    """Rows trained whole."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows that the settings allow to drop, by reason."""
    truncated: Counter[str] = field(default_factory=Counter)
    """Rows with a shortened prompt, by what was taken out."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What was done to answers beyond the template: how many of them."""
    rows_by_length: Counter[str] = field(default_factory=Counter)
    """Rows by the tokens of their longest answer, before anything was taken out."""
    tokens_by_length: Counter[str] = field(default_factory=Counter)
    """Tokens of all answers of these rows."""
    refusals: list[dict[str, Any]] = field(default_factory=list)
    """Dropped or skipped rows, as `_fault_to_json` writes them, the first `REFUSALS_KEPT`."""
    thinking: int = 0
    """Rows with trained reasoning."""
    own_system: int = 0
    """Rows with a system message of their own."""
    plain_texts: int = 0
    """Rows of plain text, which no system text is put before."""
    unknown: int = 0
    """Answers with characters that the tokenizer lacks."""

    def add(self, other: "Tally") -> None:
        """Count the rows of `other` too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        del self.refusals[REFUSALS_KEPT:]

    def count_length(self, row: EncodedRow | RowRefused) -> None:
        """Count a row under its length."""
        self.rows_by_length[str(row.length)] += 1
        self.tokens_by_length[str(row.length)] += row.tokens

    @property
    def row_lengths(self) -> RowLengths:
        """The lengths counted so far."""
        rows = {int(length): count for length, count in self.rows_by_length.items()}
        tokens = {int(length): count for length, count in self.tokens_by_length.items()}
        return RowLengths.of(rows, tokens)

    def to_json(self) -> dict[str, Any]:
        """The fields; `from_json` reads them."""
        return {
            name: dict(value) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        fields: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value
            for name, value in found.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class Encoded:
    """What some conversations became."""

    columns: Columns
    tally: Tally
    faults: list[Fault]
    """Of refused rows that no setting allows to drop."""


def encode_conversations(
    encoder: Encoder,
    conversations: Sequence[Conversation],
    files: Sequence[Path],
    ids: Ids | None = None,
) -> Encoded:
    """Encode and count; a fault is given back, not raised. See `Encoder.encode_batch` on `ids`.

    The rows are from some of `files`.
    """
    tally = Tally(rows_in=len(conversations))
    faults: list[Fault] = []
    examples: list[Example] = []
    unknown, spelt = encoder.tokenizer.unk_token_id, encoder.tokenizer.unk_token
    if unknown in encoder.stop_ids:
        unknown = None
    for conversation, outcome in zip(
        conversations, encoder.encode_batch(conversations, ids), strict=True
    ):
        tally.own_system += [each.role for each in conversation.messages[:1]] == ["system"]
        tally.plain_texts += conversation.text is not None
        tally.thinking += any(
            message.reasoning is not None and message.trained for message in conversation.messages
        )
        if isinstance(outcome, RowRefused):
            if outcome.reason == "over_length":
                tally.count_length(outcome)
            if outcome.reason == "over_length" and encoder.over_length != "error":
                tally.refused[outcome.reason] += 1
                tally.refusals.append(_fault_to_json(outcome.fault))
            else:
                faults.append(outcome.fault)
            continue
        tally.count_length(outcome)
        kinds = {example.truncated for example, _ in outcome.examples} - {None}
        if kinds:
            tally.truncated["text_shortened" if "text_shortened" in kinds else "turns_dropped"] += 1
        else:
            tally.trained += 1
        for example, remark in outcome.examples:
            examples.append(example)
            if remark:
                tally.remarks[remark] += 1
            if unknown is not None and unknown in example.completion_ids:
                tally.unknown += spelt not in example.completion_text
    return Encoded(columns_of(examples, files), tally, faults)


def encode_dataset(encoder: Encoder, rows: Rows, on_bad_row: OnBadRow = "stop") -> Dataset:
    """Encode rows in memory and account for each.

    Raises:
        DataError: all refused rows at once, unless their length is the reason and `over_length`
            allows to drop them, or `on_bad_row` is `skip`; or no row is left.
    """
    tally, faults = Tally(), Faults(on_bad_row)
    tally.refused.update(rows.refused)
    tally.rows_in = sum(rows.refused.values())
    parts: list[Columns] = []
    files = list(dict.fromkeys(row.place.file for row in rows.conversations))
    for start in range(0, len(rows.conversations), _BATCH):
        batch = rows.conversations[start : start + _BATCH]
        encoded = encode_conversations(encoder, batch, files)
        tally.add(encoded.tally)
        parts.append(encoded.columns)
        for fault in encoded.faults:
            faults.add(fault)
    refuse(encoder, tally, faults)
    examples = Examples(joined(parts), files)
    notes = (*rows.notes, *faults.notes())
    return dataset_of(encoder, examples, tally, notes=notes, content_hash=rows.content_hash)


def refuse(encoder: Encoder, tally: Tally, faults: Faults) -> None:
    """Raise DataError where rows stop the run or none is left; count those that are skipped."""
    rows, limit = tally.row_lengths, encoder.max_length
    longest = max(rows.lengths.tolist(), default=0)
    if limit is not None and longest > limit:
        faults.mend("over_length", suggest_lengths(rows, limit, is_models=encoder.limit_is_models))
    faults.raise_listed()
    tally.refused.update(faults.skipped)
    tally.refusals += map(_fault_to_json, faults.skipped_first)
    if tally.trained or tally.truncated:
        return
    if set(tally.refused) == {"over_length"}:
        raise DataError(
            f"No row is left to train on: all {tally.rows_in} are longer than max_length "
            f"({encoder.max_length}); the longest has {longest} tokens.\n"
            "  Raise max_length. Training has not started."
        )
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally.refused.items())
    raise DataError(
        f"No row is left to train on: all were refused ({reasons}).\n"
        "  With on_bad_row: stop they are listed. Training has not started."
    )


def dataset_of(
    encoder: Encoder,
    examples: Examples,
    tally: Tally,
    *,
    notes: Iterable[str],
    content_hash: str,
) -> Dataset:
    """The dataset of these examples; `notes` are about the files."""
    accounting = Accounting(
        tally.rows_in,
        tally.trained,
        dict(tally.refused),
        dict(tally.truncated),
        int(examples.lengths.sum(dtype=np.int64)),
        int(examples.completion_lengths.sum(dtype=np.int64)),
    )
    template = encoder.template.with_thinking(True) if tally.thinking else encoder.template
    all_notes = (*notes, *encoder.notes, *_notes(encoder, examples, tally))
    return Dataset(
        examples,
        accounting,
        all_notes,
        content_hash,
        template,
        encoder.tokenizer,
        tally.row_lengths,
        faults_from_json(tally.refusals),
    )


def _notes(encoder: Encoder, examples: Examples, tally: Tally) -> Iterator[str]:
    for remark, count in tally.remarks.items():
        yield f"{remark} ({count:,} answers)"
    if encoder.template.has_thinking_switch:
        yield (
            "answers with reasoning are trained with thinking on, others with it off; chat thinks"
            if tally.thinking
            else "no row has reasoning: trained with thinking off, and served so"
        )
    if encoder.system and tally.own_system:
        yield (
            f"{tally.own_system:,} rows have a system message of their own and keep it in place of "
            "`system`"
        )
    if encoder.system and tally.plain_texts:
        yield f"{tally.plain_texts:,} rows are plain text and get no `system`"
    pairs = mix(examples.prompt_hashes) ^ examples.completion_hashes
    if repeated := len(examples) - len(np.unique(pairs)):
        yield f"{repeated:,} of {len(examples):,} examples repeat another exactly, and are kept"
    if tally.unknown:
        spelt = encoder.tokenizer.unk_token
        yield (
            f'{tally.unknown:,} answers have characters the tokenizer lacks; "{spelt}" is trained'
        )


def faults_from_json(found: Sequence[Mapping[str, Any]]) -> tuple[Fault, ...]:
    """The faults that a tally keeps."""
    return tuple(
        Fault(
            each["kind"],
            Place(Path(each["file"]), each["line"], each["row"]),
            each["finding"],
            each["mend"],
        )
        for each in found
    )


def _fault_to_json(fault: Fault) -> dict[str, Any]:
    return {
        "kind": fault.kind,
        "file": str(fault.place.file),
        "line": fault.place.line,
        "row": fault.place.row,
        "finding": fault.finding,
        "mend": fault.mend,
    }
