"""The settings of a run: one frozen class per part, each field's docstring being its help.

Owns names, types, defaults and the checks that values can fail. Where values come from (YAML,
command line, aliases of other tools) is `config_file.py`; what other parts derive from them is
theirs. Nothing changes a value afterwards: modules take plain arguments, not these classes.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

FREE = {"free": True}
"""Marks a field that may differ between a run and its resumption: it changes no trained number."""

DATASET_INFO = "dataset_info.json"
"""LLaMA-Factory's list of data sets; `data` may name an entry of one, `dataset_info.json:NAME`."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Mapping)) else value


def _shape_of_entry(value: Any) -> str:
    return "entry" if isinstance(value, (Mapping, DataEntry)) else "path"


def _trackers(value: Any) -> Any:
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


def _checkpointing(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:  # two errors, one for each half of the union
        raise PydanticCustomError(
            "checkpointing", "expected to be auto, none, all or a number of layers from 1"
        ) from None


COLUMNS = (
    "prompt",  # the question, a text or a list of messages
    "input",  # more of the question, on a new line behind it
    "completion",  # the answer, a text or a list of messages
    "system",  # the system text
    "history",  # earlier turns, a list of [question, answer]
    "reasoning",  # the thinking before the answer
    "tools",  # the tools offered, a list or its JSON text
    "messages",  # the conversation, a list of messages
    "chosen",  # the answer that is trained, of a preference row
    "rejected",  # the one that is not
    "text",  # a plain text, trained whole
    "role",  # in a message: the key of its role
    "content",  # in a message: the key of its text
    "system_tag",  # in a message: the role of a system text
    "user_tag",  # in a message: the role of a user
    "assistant_tag",  # in a message: the role of an assistant
    "observation_tag",  # in a message: the role of a tool's result
    "function_tag",  # in a message: the role of a call, whose text is JSON
)
"""What a column of the data may be said to hold, in `columns`."""

_COLUMN_ALIASES = {
    "instruction": "prompt",
    "question": "prompt",
    "response": "completion",
    "answer": "completion",
    "output": "completion",
    "system_prompt": "system",
    "conversations": "messages",
    "role_tag": "role",
    "content_tag": "content",
}


def _columns(value: dict[str, str]) -> dict[str, str]:
    """`value` under our names; an error names the one that nobody knows."""
    found: dict[str, str] = {}
    for key, column in value.items():
        role = key if key in COLUMNS else _COLUMN_ALIASES.get(key)
        if role is None and column in (*COLUMNS, *_COLUMN_ALIASES):
            raise PydanticCustomError(
                "columns",
                "write it the other way round: what myna reads first, then the column, "
                f"{{{column}: {key}}}",
            )
        if role is None:
            near = difflib.get_close_matches(key, [*COLUMNS, *_COLUMN_ALIASES], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise PydanticCustomError(
                "columns", f"expected keys among {', '.join(COLUMNS)}; found {key}{hint}"
            )
        if role in found:
            raise PydanticCustomError("columns", f"{role} and {key} mean the same; keep one")
        if column in found.values():
            raise PydanticCustomError("columns", f"the column {column} is named twice")
        found[role] = column
    return found


Columns = Annotated[dict[str, str], AfterValidator(_columns)]
"""What is read -> the column of the data that holds it; keys are those of `COLUMNS`."""


class Part(BaseModel):
    """Base of all parts: frozen, unknown keys refused, docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LoraConfig(Part):
    """Shape and placement of the adapter."""

    rank: int = Field(16, ge=1)
    """Inner size of A and B. Memory and capacity grow with it."""
    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank. Not set: twice the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is zeroed while training."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers that get an adapter: a list of names, one name, a regular expression over full
    module names, or `all-linear` (every linear layer but the output head)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, rsLoRA)."""
    use_dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, DoRA)."""
    init: str = "default"
    """How A and B start: `default`, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N`, `olora` or
    `mica`, all as in peft. PiSSA and OLoRA are saved as a plain LoRA on the untouched base."""
    start_from: str | None = None
    """A finished adapter to go on from, on new data. Its rank, alpha and targets are kept."""

    @property
    def resolved_alpha(self) -> float:
        """`alpha`, or twice the rank where it is not set."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class TrainConfig(Part):
    """How long, in what steps and how fast it learns."""

    epochs: float = Field(3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, whatever `epochs` says; the schedule ends there too."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step, on all devices together."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows computed at once. Changes memory and speed, never the result. Not set: as many as the
    memory allows."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps in which the learning rate rises from zero. Not set: `warmup_ratio` decides."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of all steps that warm up, rounded up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decay of the adapter's weights."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm (over the whole adapter) where they exceed it."""
    max_length: int | None = Field(None, ge=2)
    """Longest row in tokens. Not set: the model's own limit."""
    over_length: Literal["error", "drop", "truncate_prompt"] = "error"
    """What happens to a longer row."""
    control_tokens: Literal["error", "allow"] = "error"
    """What happens to a user text that spells a control token of the tokenizer."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to rows that cannot be read or trained on: `stop` lists them all and trains
    nothing, `skip` leaves them out, counted and said."""
    train_on: Literal["assistant", "last"] = "assistant"
    """Which answers are trained: every one that no flag of its message makes context, or only the
    last of a row."""
    checkpointing: Annotated[
        Literal["auto", "none", "all"] | Annotated[int, Field(ge=1, strict=True)],
        WrapValidator(_checkpointing),
    ] = "auto"
    """Layers that recompute their activations in the backward pass, which takes less memory and
    more time: `none`, `all`, a number of layers, or `auto`: as few as the memory allows."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: about a minute before the first step, then
    fewer and larger kernels. On a CPU it needs a C++ compiler."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens to a step whose loss or gradient is NaN or infinite. The weights never move with
    it: `stop` ends the run, `skip` leaves the step out, at most 3 in 100."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of row order, dropout, initial adapter and held-out split."""
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate on the held-out rows every so many steps. Not set: at the end of each epoch."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better one, by `best_by`. Needs `held_out`."""
    keep_best: bool = False
    """The result is the adapter of the best evaluation by `best_by`, not the last one. Needs
    `held_out`."""
    metrics: Annotated[list[str], BeforeValidator(_as_list)] = []
    """What generated answers to the held-out rows are judged by at every evaluation: exact_match,
    contains, json, bleu, chrf, rouge, regex:PATTERN or FILE.py:FUNCTION. Needs `held_out`."""
    best_by: str = "loss"
    """What the best evaluation is chosen by: the held-out loss, or one of `metrics`, of which more
    is better; the lower loss decides between equals."""
    logging_steps: Annotated[int, Field(ge=1, json_schema_extra=FREE)] = 10
    """Print a line every so many steps (events.jsonl has every step)."""
    save_steps: Annotated[int, Field(ge=1, json_schema_extra=FREE)] = 100
    """Write a checkpoint every so many steps."""
    keep_checkpoints: Annotated[int, Field(ge=2, json_schema_extra=FREE)] = 2
    """Checkpoints that stay on disk; never fewer than two."""
    save_on_each_node: Annotated[bool, Field(json_schema_extra=FREE)] = False
    """On several machines: each writes to its own disk (not only the first)."""


class DataEntry(Part):
    """One source of rows, where its path does not say enough."""

    path: str
    """A file, a folder, a glob, a hub id or a name in a dataset_info.json."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often its rows are taken per epoch: 2 is each twice, 0.5 is half of them."""
    columns: Columns = {}
    """What its columns are called: prompt, completion, messages … -> the name in the file."""
    split: str | None = None
    """Which split of a hub dataset or of a folder. Not set: train, or the only one."""
    subset: str | None = None
    """Which configuration of a hub dataset."""
    rows: int | None = Field(None, ge=1)
    """Take only so many rows, the first."""


class Config(Part):
    """Everything that decides a run."""

    model: str
    """Base model: a folder or a hub id."""
    data: Annotated[
        list[
            Annotated[
                Annotated[str, Tag("path")] | Annotated[DataEntry, Tag("entry")],
                Discriminator(_shape_of_entry),
            ]
        ],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ]
    """Training data, one source or a list: files (JSON, JSONL, CSV, TSV, Parquet, Arrow, text; gzip
    or zstd), folders, globs, hub ids (owner/name@revision), names in a dataset_info.json, or
    mappings {path, weight, columns, split, subset, rows}."""
    columns: Columns = {}
    """Which column of the data holds what, where its name is none that myna knows, for example
    `{prompt: frage, completion: antwort}`."""
    system: str | None = None
    """Persona or instruction in front of every conversation that has no system message of its own.
    It is saved with the adapter and used by `myna chat`."""
    template: str | None = None
    """A chat template in place of the tokenizer's own: the name of a built-in one (`chatml`,
    `alpaca`, `vicuna` …) or a Jinja file, whose name has a path separator or ends in .jinja."""
    output: str | None = None
    """Run directory. Not set: runs/<stem of the YAML or data file>."""
    held_out: Annotated[float, Field(ge=0)] = 0.0
    """Rows kept from training for evaluation: a share below 1 or a number of rows. Split by
    distinct prompt. 0 keeps none."""
    notify: Annotated[str | None, Field(json_schema_extra=FREE)] = None
    """Told when the run ends or fails, as JSON: a webhook (http or https) or a command line."""
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow"]],
        BeforeValidator(_trackers),
        Field(json_schema_extra=FREE),
    ] = []
    """Where else numbers and settings go while it runs: `tensorboard` (files in the run's folder
    `tensorboard`), `wandb`, `mlflow`, a list of these, or `none`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes CUDA, then mps, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen base. `auto` measures which is fast here."""
    lora: LoraConfig = LoraConfig()
    """Shape and placement of the adapter."""
    train: TrainConfig = TrainConfig()
    """How long, in what steps and how fast it learns."""

    @model_validator(mode="after")
    def _check_parts_together(self) -> "Config":
        wants_held_out = [
            name
            for name in ("early_stopping_patience", "keep_best", "eval_steps", "metrics")
            if getattr(self.train, name)
        ]
        if wants_held_out and self.held_out == 0:
            raise ValueError(
                f"train.{wants_held_out[0]} needs held-out rows and held_out is 0; "
                "set held_out, for example held_out: 0.05"
            )
        if self.train.best_by not in ("loss", *self.train.metrics):
            raise ValueError(
                f"train.best_by is {self.train.best_by!r}; expected loss or one of train.metrics "
                f"({', '.join(self.train.metrics) or 'none is set'})"
            )
        if self.held_out >= 1 and not self.held_out.is_integer():
            raise ValueError(
                f"held_out is {self.held_out}; expected a share below 1 or a whole number of rows"
            )
        return self


def leaves(part: type[Part] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> pydantic field of every setting, sections flattened, in order."""
    found: dict[str, Any] = {}
    for name, field in part.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Part):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def is_free(field: Any) -> bool:
    """Whether the setting may differ between a run and its resumption."""
    return bool((field.json_schema_extra or {}).get("free"))


def flatten(config: Part, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    values: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Part):
            values |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            values[prefix + name] = [
                item.model_dump(exclude_defaults=True) if isinstance(item, Part) else item
                for item in value
            ]
        else:
            values[prefix + name] = value
    return values


def resolve_path(text: str, *beside: Path) -> Path | None:
    """The existing path that `text` means: absolute, or under the first of `beside` that has it."""
    path = Path(text).expanduser()
    for folder in (Path(), *beside) if path.is_absolute() else beside:
        if (folder / path).exists():
            return (folder / path).resolve()
    return None


def is_glob(text: str) -> bool:
    """Whether a path is a pattern for several."""
    return any(sign in text for sign in "*?[")
