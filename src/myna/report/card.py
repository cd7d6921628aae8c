"""The model card: what an adapter says of itself to people who find it (`adapter/README.md`).

Owns the text, and its front matter as model hubs read it. All of it is read from the files of the
run, so that it is written again when more is known: after `myna eval`, and by `myna push` with the
base's name on the hub. What a person has written into the card stays. No row of the data, no path
and no name of a user of this machine stands in it.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from myna.config import DATASET_INFO, Config
from myna.config_file import load_config
from myna.errors import ConfigError
from myna.lora.adapter_file import METADATA_FILE, AdapterInfo, AdapterMetadata, read_adapter
from myna.models.source import read_json
from myna.report.amounts import duration
from myna.run_dir import RunDir, write_file
from myna.training.events import read_events

NAME = "README.md"
"""The card's file in an adapter folder: hubs show it."""
BEGIN = "<!-- Written by myna, which replaces what stands between this line and the last one. -->"
END = "<!-- What you write below this line, or above the first, stays. -->"

LICENCE = ("license", "license_name", "license_link")
"""Keys of the front matter that say it."""
_OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag")
"""Keys that follow the run; all others are left as a person has set them."""
_FRONT = re.compile(r"---\n(.*?)^---\n?(.*)", re.DOTALL | re.MULTILINE)
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_AVERAGED_STEPS = 10
"""Steps over which the first and the last loss are averaged."""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `--max-lora-rank`."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Base:
    """The base model, as somebody who has only the adapter may know it."""

    name: str
    """Hub id, or the name of a folder."""
    is_hub_id: bool
    model_type: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    """What its card or config says, under the keys `LICENCE`."""


def known_base(model: str) -> Base:
    """What is known here of the base that a run names, without asking the network.

    A folder is called by its last name: where it lies is nobody else's business.
    """
    folder = Path(model).expanduser()
    is_hub_id = not (folder.is_absolute() or folder.is_dir())
    settings = read_json(_file_of(model, "config.json"))
    licence = {key: str(settings[key]) for key in LICENCE if settings.get(key)}
    licence |= _licence_in(_file_of(model, NAME))
    name = model if is_hub_id else folder.name
    return Base(name, is_hub_id, settings.get("model_type"), licence)


def write_card(run: RunDir) -> None:
    """Write the card of a finished run again, from what its files say now.

    Raises StorageError where it cannot be written.
    """
    base = known_base(load_config(run.config).config.model)
    write_file(run.adapter / NAME, refreshed_card(run, base))


def refreshed_card(run: RunDir, base: Base, *, repo: str | None = None) -> str:
    """The card of a finished run as it is to be now, with what a person has written into it."""
    path = run.adapter / NAME
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    theirs, _ = _split(old)
    named = {key: str(theirs[key]) for key in LICENCE if key in theirs}
    base = replace(base, licence={**base.licence, **named})
    return with_own_words(model_card(run, run.adapter, base, repo=repo), old)


def model_card(run: RunDir, adapter: Path, base: Base, *, repo: str | None = None) -> str:
    """The card of the adapter in the folder `adapter`, which `run` made.

    `repo` is the hub id under which it is published; not given, it lies in a folder. Raises
    ConfigError for a folder that is no adapter of a run, StorageError for one that is broken.
    """
    config = load_config(run.config).config
    info = read_adapter(adapter)
    trained = info.metadata
    if trained is None:
        raise ConfigError(
            f"{adapter} has no {METADATA_FILE}, in which a run says what it was trained with."
            "\n  Copy it there again."
        )
    events = list(read_events(run.events))
    parts = [
        BEGIN,
        _introduction(run.path.name, config, base, events),
        _data(config, read_json(run.data), events),
        _training(config, events, read_json(run.plan)),
        _judgement(read_json(run.evaluation)),
        _settings(config, info),
        _expectations(trained),
        _use(run.path.name, base, info, trained, repo),
        END,
    ]
    return _front(_metadata(config, base)) + "\n\n".join(filter(None, parts)) + "\n"


def with_own_words(card: str, old: str) -> str:
    """`card` with what a person has changed in `old`, an earlier one.

    That is the text outside of our two lines and the keys of the front matter that are not ours. A
    card without the two lines is a person's altogether, and keeps its text.
    """
    ours, body = _split(card)
    theirs, old_body = _split(old)
    if not old_body.strip():
        return card
    merged = ours | {key: value for key, value in theirs.items() if key not in _OURS}
    before, begun, rest = old_body.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        return _front(merged) + old_body
    return _front(merged) + before + body.strip("\n") + after


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    found = _FRONT.match(card)
    if found is None:
        return {}, card
    fault = "are no `key: value` lines"
    try:
        metadata = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        metadata, fault = None, f"are no YAML: {str(error).splitlines()[0]}"
    if not isinstance(metadata, dict):
        raise ConfigError(
            f"{NAME} of the adapter: the lines between --- at its head {fault}.\n"
            "  Mend them, or delete the file: it is written anew."
        )
    return metadata, found[2]


def _front(metadata: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def _metadata(config: Config, base: Base) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "base_model": base.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **{key: base.licence[key] for key in LICENCE if key in base.licence},
    }
    if published := [path.partition("@")[0] for path in _paths(config) if _is_hub_id(path)]:
        metadata["datasets"] = published
    return metadata | {"tags": ["lora", "myna"]}


def _file_of(model: str, name: str) -> Path:
    """A small file of a model as far as it is on this machine; a path that is none otherwise."""
    folder = Path(model).expanduser()
    if folder.is_absolute() or folder.is_dir():
        return folder / name
    cached = try_to_load_from_cache(model, name)
    return Path(cached) if isinstance(cached, str) else folder / name


def _licence_in(card: Path) -> dict[str, str]:
    """What the front matter of a base's card says of its licence."""
    if not card.is_file():
        return {}
    try:
        metadata, _ = _split(card.read_text(encoding="utf-8", errors="replace"))
    except ConfigError:  # somebody else's card says nothing that can be read
        return {}
    return {key: metadata[key] for key in LICENCE if isinstance(metadata.get(key), str)}


def _paths(config: Config) -> list[str]:
    return [entry if isinstance(entry, str) else entry.path for entry in config.data]


def _is_hub_id(path: str) -> bool:
    """Whether an entry of `data` is a hub id: the settings of a run name local files absolutely."""
    return _DATASET.fullmatch(path) is not None


def _data_names(config: Config) -> list[str]:
    """What the data are called, without the folders they lie in."""
    names = []
    for path in _paths(config):
        _, is_registered, name = path.rpartition(f"{DATASET_INFO}:")
        names.append(name if is_registered else path if _is_hub_id(path) else Path(path).name)
    return names


def _introduction(name: str, config: Config, base: Base, events: Sequence[Event]) -> str:
    version = next((event["version"] for event in events if event["event"] == "start"), "")
    data = ", ".join(f"`{data}`" for data in _data_names(config))
    lines = [f"# {name}", "", f"A LoRA adapter for `{base.name}`, trained with myna {version}"]
    lines[-1] += f" on {data}."
    if not base.is_hub_id:
        lines += [
            "",
            f"`{base.name}` is the name of a folder on the machine of the training. "
            "`myna push` asks for the base's name on the hub.",
        ]
    if "license" in base.licence:
        licence = base.licence.get("license_name", base.licence["license"])
        lines += ["", f"Licence: {licence}."]
    else:
        lines += [
            "",
            "Licence: none was found with the base. Name one above (`license: …`) before you "
            "publish the adapter.",
        ]
    return "\n".join(lines)


def _data(config: Config, accounting: Mapping[str, Any], events: Sequence[Event]) -> str:
    rows = [("rows in", f"{accounting['rows_in']:,}"), ("trained", f"{accounting['trained']:,}")]
    for kind in ("truncated", "refused"):
        rows.append((kind, f"{sum(accounting[kind].values()):,}"))
        rows += [(f"{kind}: {why}", f"{count:,}") for why, count in accounting[kind].items()]
    held_out = [event["rows"] for event in events if event["event"] == "eval"]
    rows += [
        ("answers held out", f"{held_out[-1]:,}" if config.held_out and held_out else "0"),
        ("tokens", f"{accounting['tokens']:,}"),
        ("trained tokens (of answers)", f"{accounting['trained_tokens']:,}"),
    ]
    return "## Data\n\n" + _table(("what", "count"), rows)


def _training(config: Config, events: Sequence[Event], plan: Mapping[str, Any]) -> str:
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        return ""
    evaluations = [event for event in events if event["event"] == "eval"]
    first, last = steps[:_AVERAGED_STEPS], steps[-_AVERAGED_STEPS:]
    epochs = f"{steps[-1]['epoch']:.2f} epochs"
    rows = [
        ("steps", f"{len(steps):,} of {config.train.batch_size} rows, {epochs}"),
        (f"loss of the first {len(first)} steps", f"{_mean_loss(first):.4f}"),
        (f"loss of the last {len(last)} steps", f"{_mean_loss(last):.4f}"),
    ]
    if evaluations:
        best = min(evaluations, key=lambda event: float(event["loss"]))
        rows += [
            ("held-out loss at the end", f"{evaluations[-1]['loss']:.4f}"),
            ("best held-out loss", f"{best['loss']:.4f}, step {best['step']:,}"),
        ]
        if config.train.keep_best:
            rows.append(("the adapter is that of step", f"{best['step']:,}"))
    rows += [
        ("time of the steps", duration(sum(step["seconds"] for step in steps))),
        ("computed on", f"{plan['device']} in {plan['dtype']}"),
        ("peak memory", f"{max(step['peak_memory_bytes'] for step in steps) / 1e9:.1f} GB"),
    ]
    return "## Training\n\nLosses are means over trained tokens.\n\n" + _table(("what", ""), rows)


def _mean_loss(steps: Sequence[Event]) -> float:
    trained = sum(step["trained_tokens"] for step in steps)
    return float(sum(step["loss"] * step["trained_tokens"] for step in steps) / trained)


def _judgement(found: Mapping[str, Any]) -> str:
    """What `myna eval` found, if it was run: base and adapter on the same rows."""
    if not found:
        return ""
    rows = [(name, *_both(found[name])) for name in ("loss", "perplexity") if found[name]]
    for name, values in found["metrics"].items():
        rows.append((f"{name} (of {found['scale'][name]})", *_both(values)))
    if probe := found["forgetting"]:
        rows.append((f"loss on {Path(probe['text']).name}", *_both(probe)))
    for task, metrics in found.get("tasks", {}).items():
        rows += [(f"{task}: {name}", *_both(values)) for name, values in metrics.items()]
    if not rows:
        return ""
    return f"## Evaluation\n\n`myna eval` on {found['rows_judged']:,} rows.\n\n" + _table(
        ("measure", "base", "adapter"), rows
    )


def _both(values: Mapping[str, float | None]) -> tuple[str, str]:
    base, adapter = values["base"], values["adapter"]
    return ("" if base is None else f"{base:.4g}", "" if adapter is None else f"{adapter:.4g}")


def _settings(config: Config, info: AdapterInfo) -> str:
    lora, train = config.lora, config.train
    targets = info.target_modules
    rows = [
        ("rank, alpha, dropout", f"{info.rank}, {info.alpha:g}, {lora.dropout:g}"),
        ("target modules", targets if isinstance(targets, str) else ", ".join(sorted(targets))),
        ("epochs, rows per step", f"{train.epochs:g}, {train.batch_size}"),
        ("learning rate, schedule", f"{train.learning_rate:g}, {train.schedule}"),
        ("seed", f"{train.seed}"),
    ]
    variants = [name for name, on in (("rsLoRA", info.use_rslora), ("DoRA", info.use_dora)) if on]
    if lora.init != "default":
        variants.append(f"started as {lora.init} of rank {lora.rank}")
    if lora.start_from is not None:
        variants.append("went on from another adapter")
    if variants:
        rows.append(("variants", ", ".join(variants)))
    return "## Settings\n\n" + _table(("setting", "value"), rows)


def _expectations(trained: AdapterMetadata) -> str:
    ends = " or ".join(f"`{token}`" for token in trained.stop_tokens)
    lines = [
        "## What it expects",
        "",
        f"The chat template in `chat_template.jinja`: {trained.template_origin}. It and the "
        f"tokenizer beside it are those of the training. Answers end with {ends or 'no token'}.",
    ]
    lines += [
        f"`{name}` is {json.dumps(value)} in the template."
        for name, value in trained.template_options.items()
    ]
    if trained.system:
        place = (
            " (the template has no system role: it stands before the first question, with a blank "
            "line between)"
            if trained.folds_system
            else ""
        )
        lines += ["", f"It was trained with this system text{place}:", ""]
        lines += [f"> {line}".rstrip() for line in trained.system.splitlines()]
    return "\n".join(lines)


def _use(
    name: str, base: Base, info: AdapterInfo, trained: AdapterMetadata, repo: str | None
) -> str:
    """How to load it in myna, peft and transformers, vLLM and Ollama."""
    folder = shlex.quote(name)
    fetch = f"hf download {repo} --local-dir {folder}\n" if repo else ""
    return "\n\n".join(
        [
            f"## How to use it\n\nBelow, `{name}` is this folder.",
            f"myna:\n\n```\n{fetch}myna chat {folder}\nmyna serve {folder}\n```",
            f"peft and transformers:\n\n```python\n{_python(name, base, trained)}```",
            f"vLLM:\n\n```\n{_vllm(folder, base, info)}\n```",
            f"Ollama:\n\n```\nmyna export {folder} {folder}-ollama --to ollama\n```",
        ]
    )


def _python(name: str, base: Base, trained: AdapterMetadata) -> str:
    messages = [{"role": "user", "content": "Hello!"}]
    if trained.system and trained.folds_system:
        messages[0]["content"] = f"{trained.system}\n\nHello!"
    elif trained.system:
        messages.insert(0, {"role": "system", "content": trained.system})
    listed = "".join(f"    {json.dumps(entry, ensure_ascii=False)},\n" for entry in messages)
    ends = f", eos_token_id={list(trained.stop_ids)}" if trained.stop_ids else ""
    register = ""
    if _is_bluelm(base):
        register = "\nfrom myna.models.bluelm import register\n\nregister()  # no remote code\n"
    return f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{register}
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
base = AutoModelForCausalLM.from_pretrained({json.dumps(base.name)}, dtype="auto")
model = PeftModel.from_pretrained(base, {json.dumps(name)})
messages = [
{listed}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=200, do_sample=False{ends})
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _vllm(folder: str, base: Base, info: AdapterInfo) -> str:
    rank = next((rank for rank in _VLLM_RANKS if rank >= info.rank), None)
    if rank is not None and not info.use_dora and not _is_bluelm(base):
        return (
            f"vllm serve {shlex.quote(base.name)} --enable-lora --max-lora-rank {rank} \\\n"
            f"    --lora-modules {folder}={folder} --tokenizer {folder} \\\n"
            f"    --chat-template {folder}/chat_template.jinja"
        )
    why = f"no adapters of rank {info.rank}"
    if _is_bluelm(base):
        why = "BlueLM by remote code only"
    elif info.use_dora:
        why = "no DoRA adapters"
    return f"# it loads {why}, so merged\nmyna merge {folder} {folder}-merged\n" + (
        f"vllm serve {folder}-merged"
    )


def _is_bluelm(base: Base) -> bool:
    return (base.model_type or "").lower() == "bluelm"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
