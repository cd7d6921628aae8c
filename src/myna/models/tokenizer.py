"""Tokenizers: the one of a model, with its special ids settled once.

Owns loading (tokenizer.json, sentencepiece, tiktoken, BlueLM's converted), saving so that other
engines can load the copy, the fingerprint, and which ids begin, end, stop and pad. Chat templates
and encoding belong to `data`; which turn-ending token a template writes is added there.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from myna.errors import ConfigError
from myna.models.bluelm import register
from myna.models.bluelm_tokenizer import convert_bluelm_tokenizer
from myna.models.load import load_config, quiet_transformers
from myna.models.source import SMALL_FILES, find_folder, list_files, read_json

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Names, in the order of preference, under which tokenizers ship their vocabulary."""


@dataclass(frozen=True)
class SpecialIds:
    """The ids with a function; every one of them is a row of the embedding table.

    `stop_ids` end a generated answer and hold `eos_id` where there is one. `notes` says, in
    sentences, what was chosen or left out for want of a clear statement in the files.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what was settled about it.

    `model_type` is that of config.json, None where the folder has none. `fingerprint` is a SHA-256
    over everything that turns text into ids, equal wherever the same text gets the same ids.
    """

    tokenizer: PreTrainedTokenizerBase
    model_type: str | None
    special: SpecialIds
    folder: Path
    fingerprint: str


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> LoadedTokenizer:
    """Tokenizer of `model`, a local folder or a hub id.

    A BlueLM folder with a sentencepiece model only is converted (`bluelm_tokenizer.py`); all else
    is read by transformers. Remote code runs only with `trust_remote_code`; a tokenizer.json does
    not need it.

    Raises ConfigError if there is no such model, no vocabulary in it, or it cannot be read.
    """
    register()
    patterns = (*SMALL_FILES, "*.py") if trust_remote_code else SMALL_FILES
    folder = find_folder(model, revision=revision, patterns=patterns)
    found = {path.name for pattern in VOCABULARY_FILES for path in folder.glob(pattern)}
    if not found and not trust_remote_code:
        raise ConfigError(
            f"{folder}: no tokenizer. Looked for {', '.join(VOCABULARY_FILES)}; the folder holds "
            f"{list_files(folder)}.\n  Copy the tokenizer files of the model into it."
        )
    config = None
    if (folder / "config.json").is_file():
        config = load_config(str(folder), trust_remote_code=trust_remote_code)
    tokenizer = _read(folder, found, config, trust_remote_code=trust_remote_code)
    generation = read_json(folder / "generation_config.json")
    return LoadedTokenizer(
        tokenizer=tokenizer,
        model_type=config.model_type if config is not None else None,
        special=settle_special_ids(tokenizer, config, generation),
        folder=folder,
        fingerprint=fingerprint(tokenizer),
    )


def _read(
    folder: Path, found: set[str], config: PreTrainedConfig | None, *, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    settings = read_json(folder / "tokenizer_config.json")
    is_bluelm = settings.get("tokenizer_class") == "BlueLMTokenizer" or (
        config is not None and config.model_type == "BlueLM"
    )
    if is_bluelm and "tokenizer.json" not in found and "tokenizer.model" in found:
        return convert_bluelm_tokenizer(folder)
    # tokenizer.json is complete in itself, so a class in remote code is not needed to read it.
    plain = "tokenizer.json" in found and "auto_map" in settings and not trust_remote_code
    reader: Any = PreTrainedTokenizerFast if plain else AutoTokenizer
    try:
        with quiet_transformers():
            tokenizer = reader.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        names = ", ".join(sorted(found))
        raise ConfigError(
            f"{folder}: its tokenizer ({names}) cannot be read.\n  {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            + (
                "\n  It points at code in the model folder, which is not run unless you ask for it "
                "with --trust-remote-code."
                if "auto_map" in settings and not trust_remote_code
                else ""
            )
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{folder}: transformers reads its tokenizer as a {type(tokenizer).__name__}; expected "
            "a tokenizer for text."
        )
    return tokenizer


def settle_special_ids(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig | None,
    generation_config: dict[str, Any],
) -> SpecialIds:
    """The ids that begin, end, stop and pad, from all files that name them.

    Stop ids are those of generation_config, config and tokenizer together. Padding is the
    tokenizer's, else the config's, else `<unk>`, else the end-of-text id.

    Raises ConfigError if the begin or end id has no row in the model, or nothing can pad.
    """
    text_config = config.get_text_config() if config is not None else None
    rows = getattr(text_config, "vocab_size", None) or len(tokenizer)
    notes: list[str] = []

    def has_row(index: int) -> bool:
        return 0 <= index < rows

    def of_config(name: str) -> list[int]:
        return _as_list(getattr(text_config, name, None))

    bos_id = tokenizer.bos_token_id
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        eos_id = next(iter(of_config("eos_token_id")), None)
    for role, index in (("begins", bos_id), ("ends", eos_id)):
        if index is not None and not has_row(index):
            raise ConfigError(
                f"tokenizer: the token that {role} a text, {_name(tokenizer, index)}, has id "
                f"{index}, but the model has {rows} rows (ids 0 to {rows - 1}).\n  Tokenizer and "
                "model do not belong together."
            )

    stop_ids: list[int] = []
    for index in (
        *([eos_id] if eos_id is not None else []),
        *_as_list(generation_config.get("eos_token_id")),
        *of_config("eos_token_id"),
    ):
        if index in stop_ids:
            continue
        if has_row(index):
            stop_ids.append(index)
        else:
            notes.append(f"Stop id {index} has no row in the model ({rows} rows); left out.")
    if not stop_ids:
        notes.append("No file names a token that ends an answer; answers end at the length limit.")

    candidates: list[tuple[str, int | None]] = [
        ("the tokenizer's pad token", tokenizer.pad_token_id),
        *(("config.json's pad_token_id", index) for index in of_config("pad_token_id")),
        ("the unknown token", tokenizer.unk_token_id),
        ("the end-of-text token", eos_id),
    ]
    pad_id = None
    for rank, (origin, index) in enumerate(candidates):
        if index is None or index < 0:
            continue
        if not has_row(index):
            notes.append(f"Not padding with {origin}: id {index} has no row ({rows} rows).")
            continue
        pad_id = index
        if rank > 0:
            notes.append(f"Padding with {origin}, {_name(tokenizer, index)} (id {index}).")
        break
    if pad_id is None:
        raise ConfigError(
            "tokenizer: it has neither a pad, an unknown nor an end-of-text token with a row in "
            'the model.\n  Name one in tokenizer_config.json, such as "pad_token": "<pad>".'
        )
    if len(tokenizer) > rows:
        notes.append(
            f"The tokenizer has {len(tokenizer)} tokens, the model {rows} rows: text that needs an "
            f"id from {rows} on cannot be used."
        )
    return SpecialIds(bos_id, eos_id, pad_id, tuple(stop_ids), tuple(notes))


def _as_list(ids: int | Iterable[int] | None) -> list[int]:
    """Ids as files write them: absent, one, or several."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _name(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else "(no token)")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 in hex over vocabulary, rules and special tokens, without padding state or paths."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for changing in ("version", "padding", "truncation"):
            state.pop(changing, None)
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    state["special"] = {
        name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token")
    }
    digest.update(json.dumps(state, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`save_pretrained` into `folder`, in words that transformers 4 understands as well.

    Version 5 writes a class name and a list of extra special tokens that version 4, on which
    serving engines still stand, refuses; both versions read the older words.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # tokenizers has no class for what the system refuses
        if "os error" in str(error):
            raise OSError(str(error)) from error
        raise
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.pop("auto_map", None)
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
