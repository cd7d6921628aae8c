"""dataset_info.json: LLaMA-Factory's list of data sets, read so that it need not be written anew.

Owns what the keys of an entry mean here: a file or a hub id, the names of its columns, how many
rows. What cannot be trained (images, KTO labels, loading scripts) is refused with its key. The keys
and their defaults are those of `DatasetAttr` in LLaMA-Factory's data/parser.py.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import ConfigError

_KEYS = (
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "revision",
    "num_samples",
    "columns",
    "tags",
)
_PAIR_COLUMNS = {
    "prompt": "prompt",
    "query": "input",
    "response": "completion",
    "history": "history",
}
_MESSAGES_COLUMNS = {"messages": "messages"}
_SHARED_COLUMNS = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"}
_TAGS = {"role_tag": "role", "content_tag": "content"} | {
    tag: tag
    for tag in ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
}
_MEDIA = ("images", "videos", "audios")
_ELSEWHERE = {
    "ms_hub_url": "ModelScope",
    "om_hub_url": "Modelers",
    "cloud_file_name": "cloud storage",
    "script_url": "a loading script",
}


@dataclass(frozen=True, slots=True)
class Registered:
    """One entry, in the words of `data`."""

    file: Path | None
    """A file or a folder; None: a hub id."""
    hub_id: str | None
    revision: str | None
    subset: str | None
    split: str | None
    folder: str | None
    """Of a hub id: the folder in it that holds the files."""
    rows: int | None
    columns: Mapping[str, str]
    """Role -> column, as in `columns` of an entry of `data`."""


def look_up(registry: Path, name: str) -> Registered:
    """The entry `name` of a dataset_info.json.

    Raises:
        ConfigError: the file, the name, or a key or value of the entry is wrong.
    """
    try:
        entries = json.loads(registry.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{registry} could not be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{registry} is not JSON: {error}.") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{registry} holds no object; expected names with their entries.")
    if name not in entries:
        raise ConfigError(
            f'{registry}: there is no "{name}".{_did_you_mean(name, entries)}\n'
            f"  It has: {', '.join(list(entries)[:20]) or 'nothing'}."
        )
    entry, where = entries[name], f'{registry}, "{name}"'
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected an object with file_name or hf_hub_url.")
    _check_keys(entry, _KEYS, where)
    columns = _texts(entry, "columns", where)
    tags = _texts(entry, "tags", where)
    roles = _roles(entry, columns, tags, where)
    file_name, hub_id = _text(entry, "file_name", where), _text(entry, "hf_hub_url", where)
    if hub_id is None and file_name is None:
        key = next((key for key in _ELSEWHERE if key in entry), None)
        found = f"lies in {_ELSEWHERE[key]} ({key})" if key else "has no file_name"
        raise ConfigError(
            f"{where}: it {found}; expected file_name or hf_hub_url.\n"
            "  Fetch the data and give its file."
        )
    rows = entry.get("num_samples")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ConfigError(f"{where}: num_samples is {rows!r}; expected a whole number from 1.")
    return Registered(
        None if hub_id else registry.parent / str(file_name),
        hub_id,
        _text(entry, "revision", where),
        _text(entry, "subset", where),
        _text(entry, "split", where),
        _text(entry, "folder", where),
        rows,
        roles,
    )


def _roles(
    entry: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str], where: str
) -> dict[str, str]:
    """Role -> column. Nothing where the entry leaves the names as they usually are."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(
            f"{where}: formatting is {formatting!r}; expected alpaca, sharegpt or openai."
        )
    for key in (*_MEDIA, "kto_tag"):
        if key in columns:
            why = "only text can be trained" if key in _MEDIA else "KTO is not SFT"
            raise ConfigError(f"{where}: columns has {key}; {why}.\n  Choose another data set.")
    if formatting == "alpaca":
        names = _PAIR_COLUMNS | _SHARED_COLUMNS
        if tags:
            raise ConfigError(f"{where}: tags belong to formatting sharegpt; this one is alpaca.")
    else:
        names = _MESSAGES_COLUMNS | _SHARED_COLUMNS
    _check_keys(columns, names, f"{where}, columns")
    _check_keys(tags, _TAGS, f"{where}, tags")
    is_ranking = entry.get("ranking", False)
    if is_ranking and not columns.keys() >= {"chosen", "rejected"}:
        raise ConfigError(f"{where}: ranking needs the columns chosen and rejected.")
    dropped = ("response",) if is_ranking else ("chosen", "rejected")
    roles = {names[key]: column for key, column in columns.items() if key not in dropped}
    if roles.keys() == {"prompt"}:  # LLaMA-Factory's way to write plain text
        return {"text": roles["prompt"]}
    return roles | {_TAGS[key]: spelling for key, spelling in tags.items()}


def _text(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{where}: {key} is {value!r}; expected a text.")
    return value


def _texts(entry: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, dict) or not all(
        name is None or isinstance(name, str) for name in value.values()
    ):
        raise ConfigError(f"{where}: {key} is {value!r}; expected names with texts.")
    return {name: text for name, text in value.items() if text is not None}


def _check_keys(found: Iterable[str], known: Iterable[str], where: str) -> None:
    for key in found:
        if key not in tuple(known):
            raise ConfigError(
                f'{where}: unknown key "{key}".{_did_you_mean(key, known)}\n'
                f"  Known keys: {', '.join(known)}."
            )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
