"""Where settings come from: YAML, `key=value`, flags, and the names that other tools use for ours.

Owns reading, aliases, and errors that name file, line and nearest key; the settings themselves are
in `config.py`. A value comes from default, file or command line, the later winning, and each is
saved with where it came from.
"""

import difflib
import glob
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from myna.config import (
    DATASET_INFO,
    Config,
    DataEntry,
    flatten,
    is_glob,
    leaves,
    resolve_path,
)
from myna.errors import ConfigError

ALIASES: dict[str, str] = {
    "model_name_or_path": "model",
    "base_model": "model",
    "model_id": "model",
    "model_name": "model",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "train_file": "data",
    "output_dir": "output",
    "default_system": "system",
    "system_prompt": "system",
    "chat_template": "template",
    "val_size": "held_out",
    "val_set_size": "held_out",
    "split_dataset_ratio": "held_out",
    "torch_dtype": "dtype",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "init_lora_weights": "lora.init",
    "init_weights": "lora.init",
    "peft_use_rslora": "lora.use_rslora",
    "peft_use_dora": "lora.use_dora",
    "adapter_name_or_path": "lora.start_from",
    "lora_model_dir": "lora.start_from",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "max_seq_len": "train.max_length",
    "save_total_limit": "train.keep_checkpoints",
    "max_norm": "train.max_grad_norm",
    "torch_compile": "train.compile",
}
"""Name in the tutorial, transformers, trl, peft, LLaMA-Factory, Axolotl, ms-swift … -> our name."""

LAST_ONLY = ("mask_history", "train_on_last", "last_response_only")
"""Names that, where they are true, mean `train_on: last`."""
PROMPT_TRAINED = {
    "train_on_prompt": True,
    "train_on_inputs": True,
    "train_on_all": True,
    "mask_prompt": False,
    "assistant_only_loss": False,
    "completion_only_loss": False,
    "train_on_completions": False,
    "train_on_responses_only": False,
}
"""Name -> the value with which another tool trains prompts too, which myna does not."""

PER_DEVICE_NAMES = ("per_device_train_batch_size", "micro_batch_size")
COMPOUND = (
    *PER_DEVICE_NAMES,
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    *LAST_ONLY,
    *PROMPT_TRAINED,
    "loss_scale",
)
"""Names whose meaning is spread over several of our settings; see `_expand_compound`."""


@dataclass(frozen=True)
class ResolvedConfig:
    """Settings, the place that each came from, and the YAML that was read (None: only flags)."""

    config: Config
    sources: dict[str, str]
    path: Path | None

    def with_output(self, path: Path) -> "ResolvedConfig":
        """The same settings with the run directory settled."""
        config = self.config.model_copy(update={"output": str(path)})
        return ResolvedConfig(config, self.sources, self.path)

    def to_yaml(self) -> str:
        """The settings as YAML that can be read again, each line ending with where it came from."""
        lines: list[str] = []
        section = ""
        for name, value in flatten(self.config).items():
            head, _, leaf = name.rpartition(".")
            if head != section:
                lines.append(f"{head}:")
                section = head
            indent = "  " if head else ""
            # A JSON value is a YAML value on one line, whatever line breaks the text has.
            text = json.dumps(value, ensure_ascii=False)
            lines.append(f"{indent}{leaf}: {text}  # {self.sources.get(name, 'default')}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class StoredSetting:
    """One line of a stored config.yaml."""

    name: str
    """Dotted, as in `leaves`."""
    value: Any
    source: str
    """Where it came from: `default`, a file and its line, the command line."""


def stored_settings(path: Path) -> list[StoredSetting]:
    """The lines that `ResolvedConfig.to_yaml` wrote; ConfigError where one is something else."""
    found: list[StoredSetting] = []
    section = ""
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        key, _, rest = line.partition(":")
        text, _, source = rest.strip().rpartition("  # ")
        if not key.strip():
            continue
        if not rest.strip():
            section = f"{key}."
            continue
        try:
            value = json.loads(text)
        except ValueError:
            raise ConfigError(
                f"{path} line {number}: found {line.strip()!r:.80}; expected a name, a JSON value "
                "and where it came from, as myna wrote them."
            ) from None
        name = f"{section}{key.strip()}" if line.startswith(" ") else key
        found.append(StoredSetting(name, value, source))
    return found


@dataclass(frozen=True)
class _Entry:
    value: Any
    source: str
    node: yaml.Node | None = None
    """Where it stands in the YAML, for places within it."""


def load_config(
    path: Path | None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Settings from `path` (a YAML or a run directory), then what the caller says, then flags.

    That is `key=value` texts of a command line, or `arguments`: settings by name, sections as
    mappings. Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest
    one), a value that cannot be, or a missing `model` or `data`.
    """
    path = _yaml_path(path) if path is not None else None
    from_file = _canonical({} if path is None else _read_yaml(path))
    said = dict(_read_override(text) for text in overrides) | _read_arguments(arguments or {})
    entries = _merge(from_file, _canonical(said))
    for name, value in (flags or {}).items():
        if value is not None:
            entries[name] = _Entry(value, f"command line (--{name})")
    nested: dict[str, Any] = {}
    for name, entry in entries.items():
        section, _, leaf = name.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[leaf] = entry.value
    try:
        config = Config.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_explain(error, entries, path)) from None
    sources = {name: entry.source for name, entry in entries.items()}
    return ResolvedConfig(_with_resolved_paths(config, path), sources, path)


def _yaml_path(path: Path) -> Path:
    if path.is_dir():
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        raise ConfigError(
            f"{path} is a folder without config.yaml, so it is not a run of myna.\n"
            "  Give a YAML file or a run directory such as runs/NAME."
        )
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()])
        hint = f' Did you mean "{folder / near[0]}"?' if near else ""
        raise ConfigError(f"{path}: no such file (looked from {Path.cwd()}).{hint}")
    return path


def _read_yaml(path: Path) -> dict[str, _Entry]:
    """Dotted key -> value with `file line N`; nested mappings flattened one level."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8."
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: not YAML: {error.problem or error.context}.\n"
            "  Expected lines such as `learning_rate: 1e-4`."
        ) from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path} line {root.start_mark.line + 1}: found a {_kind(root)}, "
            "expected `key: value` lines."
        )
    entries: dict[str, _Entry] = {}
    sections = {name.split(".")[0] for name in leaves() if "." in name}
    for key_node, value_node in root.value:
        key = _scalar(path, key_node)
        if key in sections and isinstance(value_node, yaml.MappingNode):
            for inner_key, inner_value in value_node.value:
                name = f"{key}.{_scalar(path, inner_key)}"
                _add(entries, name, inner_key, inner_value, path)
        elif key in sections and value_node.value == "":
            continue  # a section with nothing under it
        else:
            _add(entries, key, key_node, value_node, path)
    return entries


def _kind(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _scalar(path: Path, node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{path} line {node.start_mark.line + 1}: a key must be plain text.")
    return str(node.value)


def _add(entries: dict[str, _Entry], name: str, key: Any, value: Any, path: Path) -> None:
    place = f"{path} line {key.start_mark.line + 1}"
    if name in entries:
        raise ConfigError(
            f'{place}: "{name}" is set a second time (first: {entries[name].source}).'
        )
    _refuse_doubled_keys(value, path, set())
    loader = yaml.SafeLoader("")
    try:
        entries[name] = _Entry(loader.construct_object(value, deep=True), place, value)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{place}: {name}: {error.problem}.") from None
    finally:
        loader.dispose()


def _refuse_doubled_keys(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """Raise ConfigError where a mapping within a value has a key twice: YAML takes the last."""
    if id(node) in seen:  # under an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _refuse_doubled_keys(inner, path, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key_node, inner in node.value:
            key, line = _scalar(path, key_node), key_node.start_mark.line + 1
            if key in lines:
                raise ConfigError(
                    f'{path} line {line}: "{key}" is set a second time '
                    f"(first: {path} line {lines[key]})."
                )
            lines[key] = line
            _refuse_doubled_keys(inner, path, seen)


def _read_override(text: str) -> tuple[str, _Entry]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(
            f'"{text}" on the command line: expected key=value, '
            "for example train.learning_rate=1e-4."
        )
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        parsed = value
    return name, _Entry(parsed, "command line")


def _read_arguments(arguments: Mapping[str, Any]) -> dict[str, _Entry]:
    sections = {name.split(".")[0] for name in leaves() if "." in name}
    found: dict[str, _Entry] = {}
    for name, value in arguments.items():
        inner = (
            {f"{name}.{key}": entry for key, entry in value.items()}
            if (name in sections and isinstance(value, Mapping))
            else {name: value}
        )
        for key, entry in inner.items():
            plain = str(entry) if isinstance(entry, Path) else entry
            found[key] = _Entry(plain, f"argument {key}")
    return found


@dataclass(frozen=True)
class _Canonical:
    """The entries of one source: those under our names, and those with a combined meaning."""

    found: dict[str, _Entry]
    compound: dict[str, _Entry]


def _canonical(entries: dict[str, _Entry]) -> _Canonical:
    """The same entries under our names; ConfigError for unknown and doubled ones."""
    known = leaves()
    by_leaf: dict[str, str] = {}
    for name in known:
        by_leaf.setdefault(name.rpartition(".")[2], name)
    found: dict[str, _Entry] = {}
    compound: dict[str, _Entry] = {}
    # Axolotl's micro_batch_size is ours, but for the accumulation that may stand beside it.
    accumulates = any(name.endswith("gradient_accumulation_steps") for name in entries)
    for name, entry in entries.items():
        leaf = name.rpartition(".")[2]
        if leaf in COMPOUND and (accumulates or leaf != "micro_batch_size"):
            compound[leaf] = entry
            continue
        canonical = name if name in known else None
        if canonical is None and leaf in ALIASES:
            canonical = ALIASES[leaf]
        elif canonical is None and "." not in name:
            canonical = by_leaf.get(name)
        if canonical is None or (
            "." in name and name.split(".")[0] != canonical.rpartition(".")[0]
        ):
            raise ConfigError(_unknown_key(name, entry))
        alias_note = "" if leaf == canonical.rpartition(".")[2] else f" ({leaf})"
        if canonical in found:
            raise ConfigError(
                f'{entry.source}: "{name}" sets {canonical} a second time '
                f"(first: {found[canonical].source}). Keep one of them."
            )
        found[canonical] = _Entry(
            _translate(canonical, entry.value), entry.source + alias_note, entry.node
        )
    return _Canonical(found, compound)


def _merge(from_file: _Canonical, from_line: _Canonical) -> dict[str, _Entry]:
    """All entries under our names, those of the command line winning.

    Names with a combined meaning are put together first: `per_device_train_batch_size=4` on the
    command line goes with the `gradient_accumulation_steps` of the file.
    """
    entries = dict(from_file.found)
    _expand_compound(from_file.compound | from_line.compound, entries)
    parts = from_line.compound.keys() & {*PER_DEVICE_NAMES, "gradient_accumulation_steps"}
    if parts and "train.batch_size" in from_line.found:
        raise ConfigError(_contradiction(from_line.found["train.batch_size"], min(parts)))
    return entries | from_line.found


def _contradiction(batch_size: _Entry, other: str) -> str:
    return (
        f"{batch_size.source}: batch_size contradicts {other}: batch_size is the number of rows "
        "per step.\n  Keep it alone, or keep per_device_train_batch_size with "
        "gradient_accumulation_steps."
    )


def _unknown_key(name: str, entry: _Entry) -> str:
    known = leaves()
    section, _, leaf = name.rpartition(".")
    pool = [key for key in known if not section or key.startswith(section + ".")] or list(known)
    spellings = {key: key for key in pool}
    spellings |= {key.rpartition(".")[2]: key for key in pool}
    if not section:
        spellings |= {alias: alias for alias in (*ALIASES, *COMPOUND)}
    near = difflib.get_close_matches(name, spellings, n=1, cutoff=0.5) or difflib.get_close_matches(
        leaf, spellings, n=1, cutoff=0.5
    )
    hint = f' Did you mean "{spellings[near[0]]}"?' if near else ""
    return f'{entry.source}: unknown key "{name}".{hint}\n  Known keys: {", ".join(pool)}.'


def _translate(canonical: str, value: Any) -> Any:
    """Values that other tools write differently."""
    if canonical == "lora.init":
        return "default" if value is True else value
    if canonical == "lora.target_modules" and isinstance(value, str):
        if value == "all":  # LLaMA-Factory's word
            return "all-linear"
        if "," in value and not set(value) & set("()[]|*\\^$"):
            return [part.strip() for part in value.split(",")]
    if canonical == "train.schedule" and value == "constant_with_warmup":
        return "constant"
    return value


def _expand_compound(compound: dict[str, _Entry], found: dict[str, _Entry]) -> None:
    """Spread names with a combined meaning over our settings, in place.

    `per_device_train_batch_size` 8 with `gradient_accumulation_steps` 2 means 16 rows per step,
    computed 8 at a time.
    """
    per_device = [name for name in PER_DEVICE_NAMES if name in compound]
    accumulation = compound.get("gradient_accumulation_steps")
    if len(per_device) > 1:
        raise ConfigError(
            f"{compound[per_device[1]].source}: {per_device[1]} and {per_device[0]} mean the same; "
            "keep one of them."
        )
    if accumulation is not None and not per_device:
        raise ConfigError(
            f"{accumulation.source}: gradient_accumulation_steps without "
            "per_device_train_batch_size says nothing: in myna batch_size is the number of rows "
            "per optimizer step.\n  Set batch_size alone, or both of the other two."
        )
    if per_device:
        micro = compound[per_device[0]]
        rows = _whole_number(per_device[0], micro)
        found["train.micro_batch_size"] = _Entry(rows, f"{micro.source} ({per_device[0]})")
        times = _whole_number("gradient_accumulation_steps", accumulation) if accumulation else 1
        if "train.batch_size" in found:
            raise ConfigError(_contradiction(found["train.batch_size"], per_device[0]))
        found["train.batch_size"] = _Entry(
            rows * times, f"{micro.source} ({per_device[0]} {rows} x accumulation {times})"
        )
    if "gradient_checkpointing" in compound:
        entry = compound["gradient_checkpointing"]
        recompute = _true_or_false("gradient_checkpointing", entry)
        found["train.checkpointing"] = _Entry(
            "all" if recompute else "none", f"{entry.source} (gradient_checkpointing)"
        )
    _expand_masking(compound, found)
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if name in compound and compound[name].value is True:
            if "dtype" in found:
                raise ConfigError(
                    f"{compound[name].source}: {name} contradicts dtype "
                    f"({found['dtype'].source}). Keep one of them."
                )
            found["dtype"] = _Entry(dtype, f"{compound[name].source} ({name})")


def _expand_masking(compound: dict[str, _Entry], found: dict[str, _Entry]) -> None:
    """What other tools say of the tokens that are trained, in place."""
    for name in PROMPT_TRAINED:
        if name in compound and _true_or_false(name, compound[name]) is PROMPT_TRAINED[name]:
            raise ConfigError(_trains_prompts(name, compound[name]))
    says = {name: _true_or_false(name, compound[name]) for name in LAST_ONLY if name in compound}
    if "loss_scale" in compound:  # ms-swift
        entry = compound["loss_scale"]
        if entry.value == "all":
            raise ConfigError(_trains_prompts("loss_scale", entry))
        if entry.value not in ("default", "last_round"):
            raise ConfigError(
                f"{entry.source}: loss_scale is {entry.value!r}; expected default or last_round.\n"
                "  Single messages may have a weight: {role: …, content: …, weight: 0.5}."
            )
        says["loss_scale"] = entry.value == "last_round"
    for name, last_only in says.items():
        entry = compound[name]
        value = "last" if last_only else "assistant"
        before = found.get("train.train_on")
        if before is not None and before.value != value:
            raise ConfigError(
                f"{entry.source}: {name} contradicts train_on ({before.source}). Keep one of them."
            )
        found["train.train_on"] = _Entry(value, f"{entry.source} ({name})")


def _trains_prompts(name: str, entry: _Entry) -> str:
    value = str(entry.value).lower() if isinstance(entry.value, bool) else entry.value
    return (
        f"{entry.source}: {name}: {value} would train the prompts too, and myna trains answers "
        "only.\n  Leave it out. Rows to be trained whole can stand in a column `text`: plain text "
        "has no prompt."
    )


def _true_or_false(name: str, entry: _Entry) -> bool:
    if not isinstance(entry.value, bool):
        raise ConfigError(f"{entry.source}: {name} is {entry.value!r}; expected true or false.")
    return entry.value


def _whole_number(name: str, entry: _Entry) -> int:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int) or entry.value < 1:
        raise ConfigError(
            f"{entry.source}: {name} is {entry.value!r}; expected a whole number from 1."
        )
    return entry.value


def _explain(error: ValidationError, entries: Mapping[str, _Entry], path: Path | None) -> str:
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"] if not isinstance(part, int))
        name = next((key for key in entries if name.startswith(key)), name)
        if name == "data" and len(fault["loc"]) > 2:
            lines.append(_explain_data(fault, entries[name]))
            continue
        if fault["type"] == "missing":
            lines.append(
                f'{path or "command line"}: "{name}" is not set. '
                f"Give it in the YAML or with --{name}."
            )
        elif fault["type"] == "value_error":
            lines.append(f"{path or 'command line'}: {fault['ctx']['error']}.")
        else:
            place = entries[name].source if name in entries else str(path)
            message = fault["msg"].replace("Input should", "expected to")
            lines.append(f"{place}: {name} is {fault['input']!r}; {message}.")
    return "\n".join(dict.fromkeys(lines))


def _explain_data(fault: Any, entry: _Entry) -> str:
    """A fault within one entry of `data`: `loc` is (data, index, shape, key …)."""
    _, index, _, *inside = fault["loc"]
    place = _place_within(entry, (index, *inside))
    name = f"data[{index}]" + "".join(f".{key}" for key in inside)
    if fault["type"] == "extra_forbidden":
        known = list(DataEntry.model_fields)
        near = difflib.get_close_matches(str(inside[0]), known, n=1, cutoff=0.5)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        return f'{place}: unknown key "{name}".{hint}\n  Known keys: {", ".join(known)}.'
    if fault["type"] == "missing":
        return f'{place}: "{name}" is not set.'
    message = fault["msg"].replace("Input should", "expected to")
    if not inside:
        message = "expected a path, or a mapping with `path`"
    return f"{place}: {name} is {fault['input']!r}; {message}."


def _place_within(entry: _Entry, keys: tuple[Any, ...]) -> str:
    """The place of an entry's value under `keys`, or as near to it as it is known."""
    node, line = entry.node, None
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            node = node.value[key]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            for key_node, inner in node.value:
                if key_node.value == key:
                    node, line = inner, key_node.start_mark.line + 1
                    break
    file, separator, _ = entry.source.partition(" line ")
    return entry.source if line is None or not separator else f"{file} line {line}"


def _with_resolved_paths(config: Config, path: Path | None) -> Config:
    """Local paths made absolute: beside the YAML first, then in the working directory."""
    beside = ((path.parent,) if path is not None else ()) + (Path.cwd(),)

    def absolute(text: str) -> str:
        found = resolve_path(text, *beside)
        return str(found) if found is not None else text

    def metric(text: str) -> str:
        file, separator, function = text.rpartition(":")
        is_file = file.endswith(".py") and not text.startswith("regex:")
        return absolute(file) + separator + function if is_file else text

    start_from, template = config.lora.start_from, config.template
    return config.model_copy(
        update={
            "model": absolute(config.model),
            "data": _resolve_data(config.data, beside),
            "template": absolute(template) if template and _is_path(template) else template,
            "lora": config.lora.model_copy(
                update={"start_from": None if start_from is None else absolute(start_from)}
            ),
            "train": config.train.model_copy(
                update={
                    "metrics": [metric(text) for text in config.train.metrics],
                    "best_by": metric(config.train.best_by),
                }
            ),
        }
    )


def _resolve_data(data: list[str | DataEntry], beside: tuple[Path, ...]) -> list[str | DataEntry]:
    """The entries with absolute paths; names in LLaMA-Factory's dataset_info.json made explicit."""
    resolved: list[str | DataEntry] = []
    for entry in data:
        if isinstance(entry, DataEntry):
            path = _resolve_data_path(entry.path, beside) or entry.path
            resolved.append(entry.model_copy(update={"path": path}))
        elif found := _resolve_data_path(entry, beside):
            resolved.append(found)
        else:
            # LLaMA-Factory separates names by commas.
            parts = [_resolve_data_path(part.strip(), beside) for part in entry.split(",")]
            names = [part for part in parts if part is not None]
            resolved += names if len(names) == len(parts) else [entry]
    return resolved


def _resolve_data_path(text: str, beside: tuple[Path, ...]) -> str | None:
    """What a text in `data` means, if something is there: a path, a glob or a registered name."""
    if not text:
        return None
    if (found := resolve_path(text, *beside)) is not None:
        return str(found)
    head, separator, name = text.rpartition(f"{DATASET_INFO}:")
    if separator:
        registry = resolve_path(head + DATASET_INFO, *beside)
        return f"{registry}:{name}" if registry is not None else None
    if is_glob(text):
        for folder in beside:
            if any(glob.iglob(text, root_dir=folder, recursive=True)):
                return str(folder.resolve() / text)
        return None
    for folder in (place for near in beside for place in (near, near / "data")):
        if _is_registered(folder / DATASET_INFO, text):
            return f"{(folder / DATASET_INFO).resolve()}:{text}"
    return None


def _is_registered(registry: Path, name: str) -> bool:
    """Whether a dataset_info.json has the name; its faults are told when it is read."""
    try:
        found = json.loads(registry.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and name in found


def _is_path(template: str) -> bool:
    """Whether a template is a file, and not the name of a built-in one (`data/templates.py`)."""
    return any(mark in template for mark in "/\\.")
