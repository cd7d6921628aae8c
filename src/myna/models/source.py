"""Source: where a model's files are, as one local folder.

Owns turning the `model` of a run (a folder or a hub id) into a folder, and saying what is in it
when something is missing. Downloads only what it is asked for, by file name pattern, into the hub's
own cache. What the files mean is left to `load.py` and `tokenizer.py`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from myna.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.tiktoken", "*.txt")
"""Everything but the weights: configuration, tokenizer, chat template."""


def find_folder(
    model: str, *, revision: str | None = None, patterns: Sequence[str] = SMALL_FILES
) -> Path:
    """Folder that holds the files of `model` matching `patterns`.

    A folder is returned as it is, whatever it holds; a hub id is brought into the hub's cache, or
    taken from there if the hub cannot be reached.

    Raises ConfigError if there is no such folder and no such hub id, or the hub refuses it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(
            f"model: {model} is a file; expected a folder with config.json and weights, or a hub "
            f"id.\n  Give its folder: {folder.parent}"
        )
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"model: there is no folder {model}, and it cannot be a hub id, which looks like "
            "name/model."
        )
    here = f"model: {model} is no folder here (looked in {Path.cwd()}), and as a hub id"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ConfigError(
            f"{here} it is gated: its owner asks for consent.\n  Accept the terms on its hub page, "
            "then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{here} it has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{here} it does not exist, or is private.\n  Check the name, or log in with "
            "`hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise ConfigError(
            f"{here} it is not in the local cache and the hub cannot be reached.\n  Connect, or "
            "download it elsewhere with `hf download` and give the folder.\n  "
            f"({str(error).splitlines()[0]})"
        ) from error


def list_files(folder: Path) -> str:
    """Names in `folder` for an error message, cut after twenty."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) + more) or "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file.

    Raises ConfigError with line and column if it is not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} line {error.lineno}, column {error.colno}: not JSON ({error.msg}).\n  The "
            "file may be cut short; fetch it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text; fetch the file again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; expected an object {{...}}.")
    return content
