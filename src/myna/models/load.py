"""Loading: a folder or a hub id into a transformers model whose every weight came from the files.

Owns configuration, weights and the errors about them: missing or surplus tensors, shards, row
counts, remote code that is not run. Weights that exist as pickles only are converted by
`pickled_weights.py` first. Adapters are `lora`'s, dtype and device the caller's choice.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from myna.errors import ConfigError
from myna.models.bluelm import BlueLMConfig, register
from myna.models.fingerprint import fingerprint_weights
from myna.models.pickled_weights import convert_pickled_weights
from myna.models.source import SMALL_FILES, find_folder, list_files, read_json

_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")
_INDEX = {_SAFETENSORS: "model.safetensors.index.json", _PICKLES: "pytorch_model.bin.index.json"}


IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".cos_cached", ".sin_cached", "decoder.version")
"""Of tensors that are recomputed from the config, or left by fairseq: no model of transformers has
a place for them."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and, in sentences, what loading it had to decide."""

    model: PreTrainedModel
    notes: tuple[str, ...]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and bars inside the block; what matters is checked by us."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Configuration of `model`, a local folder or a hub id.

    Raises ConfigError if there is none, it is broken, or its architecture is not known without
    running code from the model folder.
    """
    register()
    patterns = (*SMALL_FILES, "*.py") if trust_remote_code else SMALL_FILES
    folder = find_folder(model, revision=revision, patterns=patterns)
    content = read_json(folder / "config.json")
    if not content:
        hint = ""
        if (
            base := read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        ) is not None:
            hint = f"\n  This is an adapter; its base model is {base}."
        raise ConfigError(
            f"{folder}: no config.json, so this is no model folder; it holds {list_files(folder)}."
            f"{hint}"
        )
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder}: adapter_config.json lies beside config.json. transformers would load that "
            "adapter, and the base that it names, in place of this model.\n  Move the adapter_* "
            "files to a folder of their own; to go on from them, set lora.start_from to it."
        )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    except Exception as error:  # remote code and strict dataclasses raise classes of their own
        raise ConfigError(
            f"{folder}/config.json: transformers cannot use it (model_type "
            f"{content.get('model_type')!r}).\n  {_first_line(error)}"
            + _remote_code_hint(content, trust_remote_code)
        ) from error
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"{folder}/config.json: not the configuration of a transformers model.")
    config.name_or_path = _recorded_name(model)
    return config


def context_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that prompt and answer may have together; None where the config does not say."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    if isinstance(config, BlueLMConfig) and config.rotary["rope_type"] == "ntkmixed":
        return limit * int(config.rotary["factor"])  # it counts positions before the scaling
    return limit


def load_model(
    model: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Causal language model of a local folder or hub id, in eval mode, on `device` in `dtype`.

    `attn_implementation` is transformers' name; not given, torch's sdpa where the architecture has
    it, else eager. Reads safetensors; `.bin` shards are scanned and converted once. Parameters
    require gradients as transformers leaves them: freezing is the caller's.

    Raises ConfigError if configuration or weights are missing, incomplete, of other shapes, or hold
    tensors the architecture has no place for: nothing is ever filled with random numbers.
    """
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    folder, weights = _find_weights(model, revision, trust_remote_code)
    notes: list[str] = []
    if isinstance(config, BlueLMConfig):
        notes += _take_rows_from_table(config, weights)
    options: dict[str, Any] = {}
    if device.type != "cpu":
        # Straight to the device, without a copy of the whole model in the machine's memory.
        options["device_map"] = {"": device}
    try:
        with quiet_transformers():
            if weights != folder:
                options |= _beside_converted(folder, config)
            result: Any = AutoModelForCausalLM.from_pretrained(
                str(weights),
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation or _attention(config),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (ValueError, ImportError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"{folder}: transformers cannot load this model (model_type {config.model_type!r}).\n"
            f"  {_first_line(error)}"
        ) from error
    loaded: PreTrainedModel = result[0]
    _check_complete(folder, loaded, info=result[1])
    loaded.config.name_or_path = loaded.name_or_path = _recorded_name(model)
    loaded.eval()
    return LoadedModel(loaded, tuple(notes))


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of a model are, as its publisher stored them."""

    folder: Path
    """The model's own."""
    files: tuple[Path, ...]
    """safetensors; in another folder where the model has pickles only, which were converted."""


def weight_files(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> WeightFiles:
    """The files of a local folder or hub id that hold its weights.

    Raises ConfigError where some are missing.
    """
    folder, weights = _find_weights(model, revision, trust_remote_code)
    index = read_json(weights / _INDEX[_SAFETENSORS])
    names = sorted(set(index.get("weight_map", {}).values())) or [_SAFETENSORS[0]]
    return WeightFiles(folder, tuple(weights / name for name in names))


def fingerprint_of(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """Which weights a local folder or hub id has, without loading them; see `fingerprint.py`.

    Raises ConfigError where its weights are missing or incomplete.
    """
    found = weight_files(model, revision=revision, trust_remote_code=trust_remote_code)
    return fingerprint_weights(found.files)


def quantisation(config: PreTrainedConfig) -> str | None:
    """Name of the method by which the model's stored weights are quantised (`gptq`, `awq` …)."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    of = settings.get if isinstance(settings, dict) else lambda name: getattr(settings, name, None)
    method = of("quant_method")
    return str(getattr(method, "value", method) or "an unnamed method")


def _attention(config: PreTrainedConfig) -> str:
    """sdpa, but for architectures that transformers refuses it to, such as Gemma 2."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(known, "_supports_sdpa", True) else "eager"


def meta_model(config_or_model: PreTrainedConfig | str) -> PreTrainedModel:
    """The model's shape without its weights (meta device), for counting; no remote code is run."""
    register()
    config = load_config(config_or_model) if isinstance(config_or_model, str) else config_or_model
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model_type {config.model_type!r}: not a transformers model.")
    return model


def _find_weights(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Path, Path]:
    """The model's folder, and the folder to load safetensors from (another after a conversion)."""
    code = ("*.py",) if trust_remote_code else ()
    for patterns in (_SAFETENSORS, _PICKLES):
        folder = find_folder(model, revision=revision, patterns=(*SMALL_FILES, *patterns, *code))
        present = {path.name for pattern in patterns for path in folder.glob(pattern)}
        if not present:
            continue
        index = read_json(folder / _INDEX[patterns])
        needed = set(index.get("weight_map", {}).values())
        if missing := sorted(needed - present):
            raise ConfigError(
                f"{folder}: {len(missing)} of {len(needed)} weight files of {_INDEX[patterns]} are "
                f"missing: {', '.join(missing[:10])}.\n  Fetch them; a download may have been cut."
            )
        if not needed and patterns[0] not in present:
            raise ConfigError(
                f"{folder}: weight shards without {_INDEX[patterns]}, which says what they hold; "
                "fetch that file too."
            )
        if patterns is _SAFETENSORS:
            return folder, folder
        shards = sorted(needed) if needed else [patterns[0]]
        return folder, convert_pickled_weights(folder, shards)
    raise ConfigError(
        f"{folder}: no weights. Looked for model.safetensors, pytorch_model.bin and their shards; "
        f"the folder holds {list_files(folder)}."
    )


def _beside_converted(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Options that point transformers at `folder` for what is not with the converted weights."""
    if auto_map := getattr(config, "auto_map", None):
        config.auto_map = {name: f"{folder}--{place}" for name, place in auto_map.items()}
    name = "generation_config.json"
    if not (folder / name).is_file():
        name = "config.json"
    return {"generation_config": GenerationConfig.from_pretrained(folder, config_file_name=name)}


def _take_rows_from_table(config: BlueLMConfig, weights: Path) -> list[str]:
    """Set `vocab_size` to the rows of the embedding table; early snapshots of BlueLM disagree."""
    key = "model.embed_tokens.weight"
    index = read_json(weights / "model.safetensors.index.json")
    name = index.get("weight_map", {}).get(key, "model.safetensors")
    if not (weights / name).is_file():
        return []
    with safe_open(weights / name, framework="pt") as shard:
        if key not in shard.keys():  # noqa: SIM118  (safe_open is no dict)
            return []
        rows = int(shard.get_slice(key).get_shape()[0])
    if rows == config.vocab_size:
        return []
    note = (
        f"config.json says vocab_size {config.vocab_size}, the embedding table has {rows} rows; "
        f"using {rows}."
    )
    config.vocab_size = rows
    return [note]


def _check_complete(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise one ConfigError for all tensors that are missing, of another shape, or surplus."""
    missing = sorted(info["missing_keys"])
    surplus = [k for k in sorted(info["unexpected_keys"]) if not k.endswith(IGNORED_SUFFIXES)]
    shapes = [
        f"{key} is {tuple(found)} in the file, {tuple(expected)} in the model"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for names, what in (
            (missing, "missing from the files"),
            (shapes, "of another shape"),
            (surplus, "in the files that the architecture has no place for"),
        )
        if names
    ]
    if faults:
        listed = "\n  ".join(faults)
        raise ConfigError(
            f"{folder}: the weights do not fit {type(model).__name__}. Tensors\n  {listed}\n  "
            "Nothing was filled with random numbers. Fetch the files again, or correct model_type "
            "in config.json."
        )


def _recorded_name(model: str) -> str:
    """What adapters record as their base: the hub id, or the folder from anywhere, no cache."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _remote_code_hint(content: dict[str, Any], trust_remote_code: bool) -> str:
    if "auto_map" not in content or trust_remote_code:
        return ""
    return (
        "\n  It points at code in the model folder, which is not run unless you ask for it with "
        "--trust-remote-code. Read that code first."
    )
