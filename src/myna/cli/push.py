"""`myna push`: a finished adapter into a repository of the Hugging Face hub.

Owns which files go (those that make the adapter usable, by name), what is changed in them on the
way (the base's name, where here it is a folder), the refusal to publish paths of this machine, and
the words for what the hub refuses. The token and the transfer are `huggingface_hub`'s, the card is
`report.card`'s.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported
from rich.console import Console

from myna import __version__
from myna.config_file import load_config
from myna.errors import ConfigError
from myna.lora.adapter_file import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, read_adapter
from myna.models.source import read_json
from myna.models.tokenizer import VOCABULARY_FILES
from myna.report.card import LICENCE, NAME, Base, known_base, refreshed_card, write_card
from myna.run_dir import RunDir

_SETTINGS = {
    CONFIG_FILE: "base_model_name_or_path",
    METADATA_FILE: "base_model",
    "tokenizer_config.json": None,
}
"""Files of settings, in which paths might stand, and the key of each that names the base."""
_FILES = (
    *_SETTINGS,
    NAME,
    WEIGHTS_FILE,
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""All that is ever published, by name; patterns are those of the vocabularies."""
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def run(source: Path, repo: str, *, private: bool, base_id: str | None, console: Console) -> str:
    """Publish the adapter of the run `source` as `repo`, in one commit; returns its address.

    `base_id` is the hub id of the base, needed where the run names a folder. Raises ConfigError for
    what cannot be published and for everything that the hub refuses; nothing was published then.
    """
    directory = _finished_run(source)
    _check_id(repo, "the repository")
    info = read_adapter(directory.adapter)
    base_name = load_config(directory.config).config.model
    base = known_base(base_name)
    if base_id is not None:
        _check_id(base_id, "--base-id")
        base = replace(base, name=base_id, is_hub_id=True)
    if not base.is_hub_id:
        raise ConfigError(
            f"{directory.path}: its base is the folder {base_name}, which nobody else has, and "
            "which would be published as it stands here.\n"
            "  Say what the base is called on the hub: --base-id OWNER/NAME."
        )
    if get_token() is None:
        raise ConfigError(
            "push: there is no hub token on this machine.\n"
            "  Log in with `hf auth login`, or set HF_TOKEN to one that may write."
        )
    api = HfApi(library_name="myna", library_version=__version__)
    with _hub_errors(repo):
        base = replace(base, licence={**base.licence, **_licence_on_hub(api, base)})
        _check_visibility(api, repo, private=private)
        write_card(directory)
        contents = _contents(directory, base, repo)
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        _commit(api, url.repo_id, contents, console)
    left = sorted({path.name for path in directory.adapter.iterdir()} - contents.keys())
    console.print(f"{len(contents)} files: {', '.join(contents)}", markup=False, soft_wrap=True)
    if left:
        console.print(f"not published: {', '.join(left)}", markup=False, soft_wrap=True)
    if info.metadata is not None and info.metadata.system:
        console.print(f"with the persona: {info.metadata.system}", markup=False, soft_wrap=True)
    console.print(str(url), markup=False, soft_wrap=True)
    return str(url)


def _finished_run(source: Path) -> RunDir:
    run = RunDir(source)
    if (run.adapter / CONFIG_FILE).is_file():
        return run
    if run.config.is_file():
        raise ConfigError(
            f"{source}: this run is not finished and has no adapter yet.\n"
            f"  Finish it with `myna train {source}`."
        )
    raise ConfigError(
        f"{source} is no run: expected a folder with config.yaml and adapter/, as `myna train` "
        "leaves it.\n  `myna runs` lists runs."
    )


def _check_id(name: str, what: str) -> None:
    try:
        validate_repo_id(name)
    except hub.HFValidationError as error:
        raise ConfigError(f'{what} is "{name}"; expected OWNER/NAME. {error}') from None
    if "/" not in name:
        raise ConfigError(f'{what} is "{name}"; expected OWNER/NAME, your name on the hub first.')


def _licence_on_hub(api: HfApi, base: Base) -> dict[str, str]:
    """What the hub knows of the base's licence; ConfigError for a base that it does not have."""
    try:
        found = api.model_info(base.name)
    except hub.RepositoryNotFoundError:
        raise ConfigError(
            f"the hub has no model {base.name}, which would be published as the base.\n"
            "  Say what the base is called there: --base-id OWNER/NAME."
        ) from None
    named = {key: getattr(found.card_data, key, None) for key in LICENCE}
    return {key: str(value) for key, value in named.items() if value}


def _check_visibility(api: HfApi, repo: str, *, private: bool) -> None:
    """Raise ConfigError where a private repository is asked for and a public one is there."""
    try:
        found = api.model_info(repo)
    except hub.RepositoryNotFoundError:
        return
    if private and not found.private:
        raise ConfigError(
            f"{repo} is on the hub already, and public; --private does not change that.\n"
            "  Take another name, or make it private in its settings first."
        )


def _commit(api: HfApi, repo: str, contents: Mapping[str, Path | bytes], console: Console) -> None:
    """Send the files in one commit, and say what the hub has to say of the card."""
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            api.create_commit(
                repo, operations, commit_message=f"Adapter trained with myna {__version__}"
            )
        except ValueError as error:  # what the hub finds wrong with the front matter of the card
            raise ConfigError(
                f"push: the hub does not take the adapter: {error}\n"
                f"  Mend {NAME} in the adapter's folder. Nothing was published."
            ) from error
    for warning in caught:
        if warning.category is UserWarning:  # others are between libraries
            console.print(f"note: {warning.message}", markup=False, soft_wrap=True)


def _contents(run: RunDir, base: Base, repo: str) -> dict[str, Path | bytes]:
    """What is published: name to a file, or to bytes that stand for it.

    Raises ConfigError for settings with a path of this machine, and for a token in them.
    """
    folder = run.adapter
    found: dict[str, Path | bytes] = {
        path.name: path
        for pattern in _FILES
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.is_symlink()
    }
    for name, key in _SETTINGS.items():
        if name not in found:
            continue
        settings = read_json(folder / name)
        if key is not None:
            settings[key] = base.name
            text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
            found[name] = f"{text}\n".encode()
        settings.pop("system", None)  # the user's words, to be published as they are
        if paths := list(_paths_in(settings)):
            raise ConfigError(
                f"{folder / name} holds paths of this machine, which are not published: "
                f"{', '.join(paths)}.\n  Take them out; they mean nothing elsewhere."
            )
    found[NAME] = refreshed_card(run, base, repo=repo).encode()
    for name in (*_SETTINGS, NAME):
        content = found.get(name, b"")
        raw = content if isinstance(content, bytes) else content.read_bytes()
        if _TOKEN.search(raw):
            raise ConfigError(f"{folder / name} holds a hub token.\n  Take it out and revoke it.")
    return dict(sorted(found.items()))


def _paths_in(value: Any, place: str = "") -> Iterator[str]:
    """Places and values of the strings in `value` that are absolute paths; `/think` is none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths_in(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner, place)
    elif isinstance(value, str):
        is_long = Path(value).is_absolute() and len(Path(value).parts) > 2
        if is_long or value.startswith("~/") or _DRIVE.match(value):
            yield f"{place} ({value})"


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """The hub's refusals, and a network that is not there, as ConfigError."""
    try:
        yield
    except hub.OfflineModeIsEnabled:
        raise ConfigError(
            "push: HF_HUB_OFFLINE is set, so nothing is sent.\n  Unset it to publish."
        ) from None
    except hub.HfHubHTTPError as error:
        raise ConfigError(_refusal(repo, error)) from error
    except hub.HTTPError as error:  # type: ignore[attr-defined]  # not in its list of names
        raise ConfigError(
            f"push: the hub cannot be reached: {error}.\n"
            "  Nothing was published. The same command tries again."
        ) from error


def _refusal(repo: str, error: hub.HfHubHTTPError) -> str:
    status = error.response.status_code
    said = error.server_message or str(error).strip().splitlines()[0]
    if status == 401:
        mend = "The token is not known to the hub: log in again with `hf auth login`."
    elif status in (403, 404):
        mend = "The token must have the right to write there; see it with `hf auth whoami`."
    else:
        mend = "The same command tries again."
    return (
        f"push: the hub refuses {repo} (status {status}): {said}\n  Nothing was published. {mend}"
    )
