"""Hub datasets: an id to the Arrow files that `datasets` has fetched and keeps in its cache.

Owns the call of `datasets.load_dataset`, the choice of a split, and the folder that `save_to_disk`
writes. The files are read like any other (`arrow_tables.py`); they are not copied.
"""

import json
from pathlib import Path
from typing import Any

from myna.errors import ConfigError, DataError


def fetch_dataset(
    name: str,
    *,
    revision: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    folder: str | None = None,
) -> tuple[list[Path], str]:
    """The Arrow files of one split, and a note that says which.

    Args:
        name: `owner/name`, or a folder of the same layout.
        revision: branch, tag or commit.
        subset: configuration, where the dataset has several.
        split: None: `train`, or the only one there is.
        folder: where in the dataset the files are.

    Raises:
        ConfigError: the hub, the dataset, the subset or the split is not there.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    asked = f"{name}@{revision}" if revision else name
    try:
        loaded = datasets.load_dataset(
            name, subset, revision=revision, split=split, data_dir=folder
        )
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ConfigError(
            f"{asked}: no such file or folder, and as a hub id it could not be loaded: {reason}.\n"
            "  Check the name and the network; `subset` and `split` of the entry choose a part."
        ) from error
    if split is None:
        split = _choose_split(asked, list(loaded))
        loaded = loaded[split]
    files = [Path(entry["filename"]) for entry in loaded.cache_files]
    if not files:
        raise DataError(
            f"{asked}: `datasets` keeps no files of split {split}; expected Arrow files."
        )
    return files, f"{asked}: split {split}, {len(loaded):,} rows"


def saved_dataset(folder: Path, split: str | None) -> tuple[list[Path], str] | None:
    """The Arrow files of a folder that `save_to_disk` wrote; None for any other folder.

    Raises:
        ConfigError: the split is not there, or there are several and none is named.
        DataError: the folder's own list of files cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits", [])
        chosen = split or _choose_split(str(folder), splits)
        if chosen not in splits:
            raise ConfigError(f"{folder} has no split {chosen}; it has {', '.join(splits)}.")
        files = _listed_files(folder / chosen)
        return files, f"{folder.name}: saved by datasets, split {chosen}"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if split is not None:
            raise ConfigError(f"{folder} holds one split without a name; leave `split` out.")
        return _listed_files(folder), f"{folder.name}: saved by datasets"
    return None


def _choose_split(name: str, splits: list[str]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise ConfigError(
        f"{name} has the splits {', '.join(splits)} and no train.\n"
        "  Name one: {path: …, split: NAME}."
    )


def _listed_files(folder: Path) -> list[Path]:
    state = _read_json(folder / "state.json")
    try:
        return [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(
            f"{folder / 'state.json'} lists no data files; expected the folder that save_to_disk "
            "wrote.\n  Save it again. Training has not started."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} could not be read: {error}.\n  Save the dataset again. "
            "Training has not started."
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no object; expected what save_to_disk writes.")
    return found
