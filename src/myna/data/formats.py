"""Formats: what the columns of a row mean, and the conversation they make.

Owns the table of shapes that are recognised by their column names, the overriding of names by
`columns` of the settings, and what is said of a file's mapping. How a shape is read is in
`pairs.py`, `dialogues.py` and `preferences.py`; reading files is `files.py`; control tokens,
templates and lengths need a tokenizer and are left to `encode.py`.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from myna.data.conversation import Conversation
from myna.data.dialogues import ENTRY_COLUMNS, MEDIA, TAGS, from_messages
from myna.data.faults import Fault, Faults, OnBadRow
from myna.data.fields import Fields, Parsed, Unfit, is_blank, list_keys, nearest
from myna.data.files import BadRow, Record, content_hash, content_sha256, look_at
from myna.data.pairs import from_inputs, from_pair
from myna.data.preferences import from_preference
from myna.data.sources import Source, read_sources
from myna.errors import ConfigError, DataError

RECOGNISED_BY = 20
"""Rows at the beginning of a file that decide its format."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The conversations of all files, and what there is to say about them."""

    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...]
    """Lines per file that say how its fields are understood, and what is not used."""
    content_hash: str
    """sha256 of the bytes read."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Rows that were skipped, by reason."""


@dataclass(frozen=True)
class Format:
    """One shape of rows."""

    name: str
    columns: Mapping[str, tuple[str, ...]]
    """Role -> columns that may hold it; `role`, `content` and tags are keys of single messages."""
    needed: tuple[str, ...]
    """Roles without which a row is not of this shape."""
    template: str
    """How the fields become turns, with the roles of columns in braces."""
    read: Callable[[Fields], Parsed]
    rivals: frozenset[str] = frozenset()
    """Columns beside which nobody can tell what a row means."""
    given: frozenset[str] = frozenset()
    """Columns that the settings name: no slip of another name."""

    @property
    def mapping(self) -> str:
        """How the fields become turns, for the person who reads along."""
        return self.template.format(**{role: names[0] for role, names in self.columns.items()})

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The columns that every row has."""
        return tuple(self.columns[role][0] for role in self.needed)

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """The columns that rows may have, one for each role."""
        return tuple(
            names[0]
            for role, names in self.columns.items()
            if role not in self.needed and role not in _IN_MESSAGES
        )

    @cached_property
    def used(self) -> frozenset[str]:
        """All columns that are read where they are there."""
        return frozenset(
            name
            for role, names in self.columns.items()
            if role not in _IN_MESSAGES
            for name in names
        )


def read_conversations(
    sources: Sequence[Path | Source],
    columns: Mapping[str, str] | None = None,
    *,
    on_bad_row: OnBadRow = "stop",
) -> Rows:
    """Read all files and map every row to a conversation that has an answer to train on.

    Args:
        sources: the files.
        columns: role -> column, where names are not those of the table; see `config.COLUMNS`.

    Raises:
        DataError: files that cannot be read, or all rows that do not fit, listed at once; with
            `skip`, such rows are left out and counted.
        ConfigError: `columns` names roles of different formats.
    """
    conversations: list[Conversation] = []
    notes: list[str] = []
    faults = Faults(on_bad_row)
    named = [
        item if isinstance(item, Source) else Source(item, entry=number)
        for number, item in enumerate(sources)
    ]
    digests = [content_sha256(source.path) for source in named]
    for source, records in zip(named, _read_records(named, faults), strict=True):
        name = source.path.name
        if note := look_at(source.path).note:
            notes.append(f"{name}: {note}")
        if not records:
            continue
        given = {**(columns or {}), **source.columns}
        form = recognise(records, given)
        seen = FieldsSeen()
        for record in records:
            try:
                parsed = convert(record.value, form)
            except Unfit as error:
                faults.add(Fault(error.kind, record.place, error.finding, error.mend))
                continue
            seen.add(record.value, parsed, form)
            conversations.append(
                Conversation(tuple(parsed.messages), record.place, parsed.tools, parsed.text)
            )
        seen.check_columns(given, name)
        notes += seen.notes(name, form)
    faults.raise_listed()
    notes += faults.notes()
    return Rows(tuple(conversations), tuple(notes), content_hash(digests), faults.skipped)


def _read_records(sources: Sequence[Source], faults: Faults) -> list[list[Record]]:
    """The rows of each file that can be used."""
    records: list[list[Record]] = [[] for _ in sources]
    rows = [0] * len(sources)
    for number, chunk in read_sources(sources):
        rows[number] += chunk.num_rows
        for row in chunk.records():
            if isinstance(row, BadRow):
                faults.add(row.fault)
            else:
                records[number].append(row)
    for number, source in enumerate(sources):
        if source.columns:
            raise ConfigError(
                f"{source.path}: columns are not read yet; expected the usual names.\n"
                "  Rename the columns in the file."
            )
        if not rows[number] and source.rows is None:
            raise DataError(
                f"{source.path.name} holds no rows; expected at least one.\n"
                "  Training has not started."
            )
    return records


def recognise(records: Sequence[Record], columns: Mapping[str, str] | None = None) -> Format:
    """The format whose required columns one of the first rows has, or else shares a column with.

    Args:
        records: the first rows of a file, in order.
        columns: role -> column of the settings; where given, only formats that have all its roles.

    Raises:
        DataError: no format fits; names the columns found and those expected.
        ConfigError: no format has all the roles of `columns`.
    """
    forms = _with_columns(columns) if columns else FORMATS
    first = records[:RECOGNISED_BY]
    for wanted in (all, any):
        for record in first:
            for form in forms:
                if wanted(key in record.value for key in form.required):
                    return form
    row, place = first[0].value, first[0].place
    raise DataError(
        f"{place}: the row has {list_keys(row)}; expected {_expected_of(forms, columns)}.\n"
        f"  {_hints(row, forms)}{_advice(row, columns)} Training has not started."
    )


def convert(row: Mapping[str, Any], form: Format) -> Parsed:
    """Map one row.

    Raises:
        Unfit: it makes no conversation; `read_conversations` collects these.
    """
    missing = [key for key in form.required if key not in row]
    if missing:
        meant = [key for key in row if nearest(key, tuple(missing), 0.75)]
        raise Unfit(
            f"keys:{','.join(sorted(row))[:200]}",
            f"the row has {list_keys(row)} and no {list_keys(missing)}; expected {_shape(form)}.",
            f'Is "{meant[0]}" meant?' if meant else "",
        )
    for key, value in row.items():
        if key not in form.used:
            _check_unused(key, value, row, form)
    return form.read(Fields(row, form.columns))


@dataclass
class FieldsSeen:
    """What is to be said of the rows of one file, or of a part of it."""

    rows: int = 0
    """Rows that were converted."""
    there: Counter[str] = field(default_factory=Counter)
    """Columns that are read."""
    also: Counter[str] = field(default_factory=Counter)
    """Those of them that not every row has."""
    remarks: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    """Columns that no format reads."""

    def add(self, row: Mapping[str, Any], parsed: Parsed, form: Format) -> None:
        """Count a row that was converted by `form`."""
        self.rows += 1
        self.remarks.update(dict.fromkeys(parsed.remarks, 1))
        for key, value in row.items():
            if key not in form.used:
                self.unused[key] += 1
            else:
                self.there[key] += 1
                if key not in form.required and not is_blank(value):
                    self.also[key] += 1

    def merge(self, other: "FieldsSeen") -> None:
        """Count what was seen in another part of the same file, behind what this one has."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "FieldsSeen":
        """What `vars` gave, read from JSON."""
        counts = {name: Counter(value) for name, value in found.items() if name != "rows"}
        return cls(found["rows"], **counts)

    def check_columns(self, columns: Mapping[str, str], file: str) -> None:
        """Refuse a name in `columns` that no row has.

        Raises:
            DataError: it names the column and those that were found.
        """
        found = sorted(self.there.keys() | self.unused.keys())
        for role, name in columns.items():
            if role in _IN_MESSAGES or name in found or not self.rows:
                continue
            near = difflib.get_close_matches(name, found, n=1)
            hint = f'  Did you mean "{near[0]}"?' if near else "  Mend the name."
            raise DataError(
                f'{file}: columns.{role} is "{name}", which no row has; the rows have '
                f"{list_keys(found)}.\n{hint} Training has not started."
            )

    def notes(self, file: str, form: Format) -> list[str]:
        """The mapping, what else is read, the remarks with their rows, what is not used."""
        notes = [f"{file}: {self.rows:,} rows of {form.name}: {form.mapping}"]
        if self.also:
            notes.append(f"{file}: also read: {_counted(self.also)}")
        notes += [f"{file}: {text} ({rows:,} rows)" for text, rows in self.remarks.items()]
        if self.unused:
            notes.append(f"{file}: fields that are not used: {_counted(self.unused)}")
        return notes


def _counted(columns: Counter[str]) -> str:
    return ", ".join(f"{name} ({rows:,} rows)" for name, rows in columns.items())


def _check_unused(key: str, value: Any, row: Mapping[str, Any], form: Format) -> None:
    """Refuse a field that is not used where something is meant by it."""
    absent = tuple(name for name in form.optional if name not in row and name not in form.given)
    if near := nearest(key, absent):
        raise Unfit(
            f"misspelt:{key}",
            f'the row has a field "{key}", which would not be used.',
            f'Did you mean "{near}"?',
        )
    if is_blank(value):
        return
    if key in MEDIA:
        raise Unfit(
            f"media:{key}",
            f'the row has "{key}"; only text can be trained.',
            "Delete the row, or the field if the text can do without it.",
        )
    if key in form.rivals:
        one = list_keys(form.required).replace(", ", " and ")
        question, answer = form.required[0], form.required[-1]
        example = f"{{prompt: {key}, completion: {answer}}}"
        if key in _ANSWERS:
            example = f"{{prompt: {question}, completion: {key}}}"
        if key == "context":
            example = f"{{prompt: {question}, input: context, completion: {answer}}}"
        if form.needed == ("text",):
            example += "` or `columns: {text: text}"
        raise Unfit(
            f"rival:{key}",
            f'the row has "{key}" beside {one}, and nobody can tell which of them is meant.',
            f"Say which, for example `columns: {example}`.",
        )


def _shape(form: Format) -> str:
    optional = f" (and, if wanted, {', '.join(form.optional)})" if form.optional else ""
    return ", ".join(form.required) + optional


def _expected_of(forms: Sequence[Format], columns: Mapping[str, str] | None) -> str:
    if columns:
        given = ", ".join(f"{role}: {name}" for role, name in columns.items())
        return f"{_shape(forms[0])}, as `columns: {{{given}}}` says"
    return (
        "messages or conversations (lists of messages), a question and its answer ("
        f"{', '.join('/'.join(pair) for pair in PAIRS[:4])} …), chosen and rejected, or text"
    )


def _hints(row: Mapping[str, Any], forms: Sequence[Format]) -> str:
    known = tuple(dict.fromkeys(key for form in forms for key in form.required))
    return "".join(
        f'"{key}" looks like "{near}". ' for key in row if (near := nearest(key, known, 0.75))
    )


def _advice(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> str:
    if columns:
        return "Mend `columns`."
    texts = [key for key, value in row.items() if isinstance(value, str)]
    questions, answers = ({pair[side] for pair in PAIRS} for side in (0, 1))
    question = _alike(texts, questions) or next(iter(texts), "COLUMN")
    rest = [key for key in texts if key != question]
    answer = _alike(rest, answers) or next(iter(rest), "COLUMN")
    return (
        "Rename the fields, or say which is which, for example "
        f"`columns: {{prompt: {question}, completion: {answer}}}`."
    )


def _alike(keys: Sequence[str], names: Iterable[str]) -> str | None:
    """The first of `keys` that is nearly one of `names`."""
    return next((key for key in keys if nearest(key, tuple(sorted(names)))), None)


def _with_columns(columns: Mapping[str, str]) -> tuple[Format, ...]:
    """The formats that have all roles of `columns`, under its names."""
    forms: dict[tuple[str, ...], Format] = {}
    for form in FORMATS:
        if columns.keys() <= form.columns.keys() | (TAGS if "role" in form.columns else {}).keys():
            named = _named(form, columns)
            forms.setdefault(named.required, named)
    if not forms:
        raise ConfigError(
            f"columns has {', '.join(columns)}, which no format has together; expected the columns "
            "of one: prompt and completion, messages, chosen, or text.\n"
            "  Give each data file its own `columns`, or take out those that are not meant."
        )
    return tuple(forms.values())


def _named(form: Format, columns: Mapping[str, str]) -> Format:
    """`form` with its columns called as `columns` says."""
    roles: dict[str, tuple[str, ...]] = dict(form.columns)
    if "chosen" in roles and not columns.keys().isdisjoint({"prompt", "messages"}):
        # Of the two places of a prompt, the one that was not named is none.
        for role in {"prompt", "messages"} - columns.keys():
            roles.pop(role)
    roles |= {role: (name,) for role, name in columns.items()}
    needed = form.needed
    if "chosen" in columns and "rejected" not in columns:
        needed = ("chosen",)
    decided = not columns.keys().isdisjoint({"prompt", "completion", "text"})
    named = replace(
        form,
        columns=roles,
        needed=needed,
        rivals=frozenset() if decided else form.rivals,
        given=frozenset(columns.values()),
    )
    if named.required == form.required:
        return named
    return replace(named, name="/".join(named.required))


_IN_MESSAGES = {*ENTRY_COLUMNS, *TAGS}

_QUESTIONS = ("instruction", "prompt", "question", "query", "input")
_COMMON_ANSWERS = ("output", "completion", "response", "answer")
PAIRS: tuple[tuple[str, str], ...] = (
    ("instruction", "output"),
    ("inputs", "targets"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    *((question, answer) for question in _QUESTIONS for answer in _COMMON_ANSWERS),
    ("problem", "solution"),
    ("user", "assistant"),
    ("human", "assistant"),
)
"""Names of a question and its answer that are recognised, the commonest first: where only one of
the two is there, the other is what its first pair says. Nothing beyond them is guessed."""
_ANSWERS = frozenset({*(answer for _, answer in PAIRS), "label", "labels", "summary", "target"})
_SEVERAL = frozenset({"context", *(name for pair in PAIRS for name in pair)}) - {
    "input",  # stands beside a question
    "user",  # may be a person's name
    "human",
    "assistant",
}
_LABELS = _SEVERAL | _ANSWERS | {"input"}

_AROUND: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "reasoning": ("reasoning", "reasoning_content", "thinking", "think"),
    "tools": ("tools", "functions"),
}
"""Columns that rows of a question and its answer may have beside it."""


def _pair(question: str, answer: str) -> Format:
    columns: dict[str, tuple[str, ...]] = {"prompt": (question,), "completion": (answer,)}
    template = "user = {prompt}; assistant, trained = {completion}"
    if question not in ("input", "inputs"):
        # Dolly's context follows the instruction as Alpaca's input does.
        columns["input"] = ("input", "context") if question == "instruction" else ("input",)
        template = template.replace(";", ", newline, {input} (if any);")
    return Format(
        f"{question}/{'input/' if (question, answer) == PAIRS[0] else ''}{answer}",
        columns | _AROUND | ENTRY_COLUMNS,
        ("prompt", "completion"),
        template,
        from_inputs if question == "inputs" else from_pair,
        _SEVERAL - {question, answer},
    )


def _dialogue(column: str, spellings: str = "") -> Format:
    return Format(
        column,
        {"messages": (column,), "system": _AROUND["system"], "tools": _AROUND["tools"]}
        | ENTRY_COLUMNS,
        ("messages",),
        f"{spellings}every assistant message is trained, everything else is context",
        from_messages,
    )


def _from_text(fields: Fields) -> Parsed:
    return Parsed([], text=fields.text("text", required=True))


FORMATS: tuple[Format, ...] = (
    Format(
        "preferences",
        {
            "chosen": ("chosen",),
            "rejected": ("rejected",),
            "prompt": ("prompt", "instruction", "question", "query"),
            "input": ("input",),
            "messages": ("conversations", "conversation", "messages"),
            **{role: _AROUND[role] for role in ("system", "history", "tools")},
            **ENTRY_COLUMNS,
        },
        ("chosen", "rejected"),
        "assistant, trained = {chosen}; its prompt is context; {rejected} is not used",
        from_preference,
    ),
    _dialogue("messages"),
    _dialogue("conversations", "human = user, gpt = assistant; "),
    _dialogue("conversation", "human = user, gpt = assistant; "),
    *(_pair(*pair) for pair in dict.fromkeys(PAIRS)),
    Format(
        "plain text",
        {"text": ("text",)},
        ("text",),
        "the whole of {text} is trained, nothing is context",
        _from_text,
        _LABELS,
    ),
)
"""Tried in this order; the first whose required columns are there is taken."""
