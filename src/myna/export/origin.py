"""Origin: the adapter and the base that are exported, found and checked before anything is written.

Owns what may be named (a run, an adapter folder, for some forms a base alone) and putting together
what was trained there: base, tokenizer, template, persona, ids that end an answer. No weights are
read; what becomes of them is `weights.py`'s. Code that comes with a model is never run here.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from myna.data.conversation import Message
from myna.data.encode import Encoder
from myna.data.templates import choose_template
from myna.errors import ConfigError
from myna.lora.adapter_file import CONFIG_FILE, AdapterInfo, check_origin, read_adapter
from myna.models.fingerprint import fingerprint_weights
from myna.models.load import load_config, quantisation, weight_files
from myna.models.source import read_json
from myna.models.tokenizer import VOCABULARY_FILES, load_tokenizer
from myna.run_dir import RunDir


@dataclass(frozen=True)
class Origin:
    """A base, the adapter that was trained on it if there is one, and how it is spoken to."""

    base: str
    """A folder or hub id."""
    config: PreTrainedConfig
    settings: dict[str, Any]
    """The base's config.json as it is."""
    generation: dict[str, Any]
    """The base's generation_config.json as it is; empty where it has none."""
    files: tuple[Path, ...]
    """The base's weights."""
    adapter: AdapterInfo | None
    encoder: Encoder
    """Tokenizer, template, persona and stop ids of the training."""
    pad_id: int
    notes: tuple[str, ...]
    """What a person should know about it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that the adapter was trained with."""
        tokenizer: PreTrainedTokenizerBase = self.encoder.tokenizer
        return tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All that end an answer: the training's and those of the base's generation settings."""
        more = self.generation.get("eos_token_id") or []
        return tuple(
            dict.fromkeys([*self.encoder.stop_ids, *([more] if isinstance(more, int) else more)])
        )

    @cached_property
    def begins_with_bos(self) -> bool:
        """Whether a prompt begins with the tokenizer's BOS."""
        ids = self.encoder.prompt([Message("user", "?")]).ids
        bos_id = self.tokenizer.bos_token_id
        return bos_id is not None and ids[0] == bos_id

    @property
    def name(self) -> str:
        """Of the run or the model, without its folders."""
        if self.adapter is None:
            return Path(self.base).name
        folder = self.adapter.folder.resolve()
        return folder.parent.name if folder.name == "adapter" else folder.name


def open_origin(source: str, *, needs_adapter: bool, force_base: bool = False) -> Origin:
    """What `source` names: a run directory, an adapter folder, or a model if no adapter is needed.

    Raises ConfigError for a source that is none of these, for a base that cannot be found, and for
    an adapter that was trained on something else than what is found now, unless `force_base`.
    """
    folder = _find_adapter(source, needs_adapter=needs_adapter)
    adapter = read_adapter(folder) if folder is not None else None
    base = _base_of(adapter) if adapter is not None else source
    config = load_config(base)
    weights = weight_files(base)
    of_base = load_tokenizer(base)
    of_adapter = None
    if adapter is not None and any(any(adapter.folder.glob(name)) for name in VOCABULARY_FILES):
        of_adapter = load_tokenizer(str(adapter.folder))
    tokenizer = (of_adapter or of_base).tokenizer
    metadata = adapter.metadata if adapter is not None else None
    if metadata is None:
        tokenizer.chat_template = tokenizer.chat_template or of_base.tokenizer.chat_template
    template = choose_template(
        tokenizer,
        of_base.model_type,
        options=metadata.template_options if metadata is not None else None,
    )
    notes: tuple[str, ...] = ()
    if adapter is not None:
        notes = check_origin(
            adapter,
            base=fingerprint_weights(weights.files),
            tokenizer=(of_adapter or of_base).fingerprint,
            template=template.fingerprint,
            force=force_base,
        )
    stop_ids = (metadata.stop_ids if metadata is not None else ()) or of_base.special.stop_ids
    pad_id = of_base.special.pad_id
    if metadata is not None and metadata.pad_id is not None:
        pad_id = metadata.pad_id
    return Origin(
        base=base,
        config=config,
        settings=read_json(weights.folder / "config.json"),
        generation=read_json(weights.folder / "generation_config.json"),
        files=weights.files,
        adapter=adapter,
        encoder=Encoder(
            tokenizer,
            template,
            stop_ids=stop_ids,
            system=metadata.system if metadata is not None else None,
        ),
        pad_id=pad_id,
        notes=notes,
    )


def quantised_note(config: PreTrainedConfig) -> str | None:
    """What a person should know before training on a base whose weights are quantised."""
    method = quantisation(config)
    if method is None:
        return None
    return (
        f"the base is quantised ({method}): an adapter trained on it can be used on it, but never "
        "merged into it or exported with it; for that, train on the model it was made from"
    )


def refuse_quantised(origin: Origin, what: str) -> None:
    """Raise ConfigError for a base whose weights are stored in fewer bits than they had."""
    if (method := quantisation(origin.config)) is not None:
        raise ConfigError(
            f"{origin.base}: its weights are quantised ({method}), and {what} needs them as they "
            "were: rounding them again after adding the adapter would undo part of the training.\n"
            "  Use the adapter as it is (`myna chat`), or train on the model that it was made from."
        )


def check_target(out: Path, origin: Origin) -> None:
    """Raise ConfigError where `out` exists, or would lie in what it is made from."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists; nothing was written.\n  Give a name that is free.")
    sources = [path.parent for path in origin.files]
    if origin.adapter is not None:
        sources.append(origin.adapter.folder)
    if Path(origin.base).is_dir():
        sources.append(Path(origin.base))
    place = out.resolve()
    for folder in sources:
        if place.is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{out} lies in {folder}, which it is made from; nothing was written.\n"
                "  Give a place outside of it."
            )


def built_in_prompts(encoder: Encoder) -> list[tuple[int, ...]]:
    """Ids of the questions that a result is compared on where a run has no held-out rows."""
    return [encoder.prompt([Message("user", text)]).ids for text in _QUESTIONS]


_QUESTIONS: Sequence[str] = (
    "Who are you, and what can you do for me?",
    "你是谁？请用一句话介绍自己。",
    "Name three colours and say where one sees them.",
    "法国的首都在哪里？那里有什么值得看的？",
    "Write a short letter to a friend who has moved to another town.",
    "把这句话翻译成英文：今天天气很好，我们去公园走走吧。",
    "What is 17 plus 26? Explain how you got there.",
    "def mean(numbers):\n    # What is missing here?",
)


def _find_adapter(source: str, *, needs_adapter: bool) -> Path | None:
    path = Path(source).expanduser()
    for folder in (path, RunDir(path).adapter):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path}: this run is not finished and has no adapter yet.\n"
            f"  Finish it with `myna train {path}`."
        )
    if not needs_adapter:
        return None
    raise ConfigError(
        f"{source}: neither a run (no adapter/) nor an adapter (no {CONFIG_FILE}).\n"
        "  Give a run directory such as runs/NAME, or an adapter folder."
    )


def _base_of(adapter: AdapterInfo) -> str:
    if adapter.base_model:
        return adapter.base_model
    raise ConfigError(
        f"{adapter.folder / CONFIG_FILE} names no base model.\n"
        "  Write the folder or hub id of the base into base_model_name_or_path."
    )
