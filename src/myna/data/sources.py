"""Sources: what the entries of `data` mean, as a list of files to read.

Owns folders, globs, hub ids, names in LLaMA-Factory's dataset_info.json, and which files of a
folder are data. Nothing is taken or left out silently: each entry that is more than a file gets a
note. What is in a file is left to `files.py`.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myna.config import DATASET_INFO, DataEntry, is_glob
from myna.data.byte_source import SUFFIXES, data_suffix
from myna.data.dataset_info import look_up
from myna.data.files import read_chunks
from myna.data.hub_datasets import fetch_dataset, saved_dataset
from myna.data.records import Chunk, Head
from myna.errors import ConfigError, DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_ABOUT = {"readme", "license", "licence", "notice", "changelog", "requirements"}
"""Stems of files that stand beside data and are none."""
_METADATA = {DATASET_INFO, "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
}
"""Words in a file's name -> the split it is of."""
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read, and how its rows are used."""

    path: Path
    weight: float = 1.0
    """How often each row is taken per epoch."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Role -> column, where the names are not the usual ones."""
    rows: int | None = None
    """Only so many rows are taken, over all sources with the same `entry`."""
    entry: int = 0
    """Number of the entry of `data` that it came from."""


def find_sources(data: Sequence[str | DataEntry]) -> tuple[list[Source], list[str]]:
    """The files of all entries in order, and notes on what was chosen.

    Raises:
        ConfigError: an entry means several things, or nothing that can be read.
        DataError: a folder or pattern without data files.
    """
    sources: list[Source] = []
    notes: list[str] = []
    for number, item in enumerate(data):
        entry = DataEntry(path=item) if isinstance(item, str) else item
        files, entry, said = _files_of(entry)
        notes += said
        if entry.weight != 1:
            notes.append(f"{entry.path}: each row counts {entry.weight:g} times per epoch")
        if entry.rows is not None:
            notes.append(f"{entry.path}: only the first {entry.rows:,} rows are taken")
        sources += [Source(file, entry.weight, entry.columns, entry.rows, number) for file in files]
    seen: set[Path] = set()
    for source in sources:
        if (real := source.path.resolve()) in seen:
            raise ConfigError(
                f"{source.path} is given twice in data.\n"
                "  Name it once; {path: …, weight: 2} takes its rows twice per epoch."
            )
        seen.add(real)
    return sources, notes


def read_sources(sources: Sequence[Source]) -> Iterator[tuple[int, Chunk]]:
    """The rows of all files in order, each chunk with the number of its source, from 0.

    Raises:
        DataError: as `files.read_chunks`.
    """
    left: dict[int, int] = {}  # rows that an entry may still give
    for number, source in enumerate(sources):
        for chunk in read_chunks(source.path):
            if source.rows is not None:
                left.setdefault(source.entry, source.rows)
                if not left[source.entry]:
                    break
                if chunk.num_rows > left[source.entry]:
                    chunk = Head(chunk, left[source.entry])
                left[source.entry] -= chunk.num_rows
            yield number, chunk


def source_name(item: str | DataEntry) -> str:
    """A short name for an entry of `data`: the file's stem, the folder's, the data set's name."""
    path = item if isinstance(item, str) else item.path
    _, separator, name = path.rpartition(f"{DATASET_INFO}:")
    if separator:
        return name
    if is_glob(path) and not Path(path).exists():
        named = [part for part in Path(path).parts[:-1] if not is_glob(part)]
        return Path(named[-1]).stem if named else "data"
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        return path.partition("@")[0].partition("/")[2]
    stem = Path(path).stem
    return Path(stem).stem if data_suffix(Path(path)) != Path(path).suffix.lower() else stem


def _files_of(entry: DataEntry) -> tuple[list[Path], DataEntry, list[str]]:
    """The files of an entry, the entry with what a registry adds to it, and notes."""
    path = Path(entry.path).expanduser()
    head, separator, name = entry.path.rpartition(f"{DATASET_INFO}:")
    if separator and not path.exists():
        return _registered(Path(head + DATASET_INFO), name, entry)
    if path.is_dir():
        files, notes = _folder(path, entry)
        return files, entry, notes
    if path.exists():
        if path.name == DATASET_INFO:
            raise ConfigError(
                f"{path} lists data sets and holds no rows.\n  Name one of them: {path}:NAME."
            )
        _refuse_parts(entry, "a file")
        return [path], entry, []
    if is_glob(entry.path):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files, notes = _choose([file for file in found if file.is_file()], entry)
        return files, entry, notes
    if _HUB_ID.fullmatch(entry.path) and data_suffix(path) not in SUFFIXES:
        name, _, revision = entry.path.partition("@")
        files, note = fetch_dataset(
            name, revision=revision or None, subset=entry.subset, split=entry.split
        )
        return files, entry, [note]
    return [path], entry, []  # not there: reading it says what is near


def _registered(
    registry: Path, name: str, entry: DataEntry
) -> tuple[list[Path], DataEntry, list[str]]:
    found = look_up(registry, name)
    columns = {**found.columns, **entry.columns}
    own_split = entry.split
    update: dict[str, Any] = {
        "columns": columns,
        "rows": entry.rows or found.rows,
        "split": entry.split or found.split,
        "subset": entry.subset or found.subset,
    }
    entry = entry.model_copy(update=update)
    if found.hub_id is not None:
        files, note = fetch_dataset(
            found.hub_id,
            revision=found.revision,
            subset=entry.subset,
            split=entry.split or "train",  # as in LLaMA-Factory
            folder=found.folder,
        )
        notes = [note]
    else:
        assert found.file is not None, "an entry has a file or a hub id"
        # LLaMA-Factory knows one split of a file, train, and lets entries name it.
        of_file = found.file.is_file() and own_split is None
        update = {"path": str(found.file), "subset": None}
        update |= {"split": None} if of_file else {}
        files, _, notes = _files_of(entry.model_copy(update=update))
    said = f"{registry.name}, {name}: {', '.join(file.name for file in files[:_LISTED])}"
    if columns:
        said += "; columns " + ", ".join(f"{role}: {column}" for role, column in columns.items())
    return files, entry, [said, *notes]


def _folder(folder: Path, entry: DataEntry) -> tuple[list[Path], list[str]]:
    if entry.subset is not None:
        raise ConfigError(f"{entry.path} is a folder; `subset` is for hub ids. Leave it out.")
    if (saved := saved_dataset(folder, entry.split)) is not None:
        files, note = saved
        return files, [note]
    return _choose(sorted(inside for inside in folder.iterdir() if inside.is_file()), entry)


def _choose(found: Sequence[Path], entry: DataEntry) -> tuple[list[Path], list[str]]:
    """Those of the files that are data, and a note that names them and the others."""
    files = [file for file in found if _is_data(file)]
    if any(data_suffix(file) != ".txt" for file in files):
        files = [file for file in files if data_suffix(file) != ".txt"]
    if not files:
        raise DataError(_no_data(found, entry))
    chosen = _of_split(files, entry)
    others = [file for file in found if file not in chosen]
    note = f"{entry.path}: {len(chosen)} {'file' if len(chosen) == 1 else 'files'}: "
    note += _names(chosen)
    if others:
        note += f"; not read: {_names(others)}"
    return chosen, [note]


def _is_data(file: Path) -> bool:
    return (
        not file.name.startswith((".", "_"))
        and data_suffix(file) in SUFFIXES
        and file.name not in _METADATA
        and file.name.split(".")[0].lower() not in _ABOUT
    )


def _of_split(files: Sequence[Path], entry: DataEntry) -> list[Path]:
    """The files of the entry's split; ConfigError where it has none and there are several."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        by_split.setdefault(split, []).append(file)
    if entry.split is not None:
        wanted = _SPLITS.get(entry.split.lower(), entry.split)
        if wanted not in by_split:
            raise ConfigError(
                f"{entry.path} has no files of split {entry.split}; it has {_names(files)}."
            )
        return by_split[wanted]
    if len(by_split) > 1 and by_split.keys() & {"test", "validation"}:
        listed = "; ".join(
            f"{split or 'none'}: {_names(of_split)}" for split, of_split in by_split.items()
        )
        example = "train" if "train" in by_split else next(iter(by_split.keys() - {None}))
        raise ConfigError(
            f"{entry.path} has files of several splits by their names ({listed}), and not all of "
            "them may be meant for training.\n"
            f"  Say which: {{path: {entry.path}, split: {example}}}, or list the files."
        )
    return list(files)


def _no_data(found: Sequence[Path], entry: DataEntry) -> str:
    path = Path(entry.path)
    lines = [f"{entry.path}: no data files ({', '.join(SUFFIXES)}) here."]
    if found:
        lines.append(f"It has {_names(found)}.")
    if path.is_dir():
        deeper = sorted(
            str(file.relative_to(path))
            for inner in path.iterdir()
            if inner.is_dir() and not inner.name.startswith(".")
            for file in inner.iterdir()
            if _is_data(file)
        )
        if deeper:
            lines.append(
                f"Folders in it have {', '.join(deeper[:_LISTED])}: give such a folder, or "
                f"{path}/**/* for all."
            )
    return "\n  ".join([*lines, "Training has not started."])


def _names(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _refuse_parts(entry: DataEntry, what: str) -> None:
    for key in ("split", "subset"):
        if getattr(entry, key) is not None:
            raise ConfigError(
                f"{entry.path} is {what}; `{key}` is for hub ids"
                f"{' and folders' if key == 'split' else ''}.\n  Leave it out."
            )
