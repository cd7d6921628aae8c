"""What a run left behind, read into typed values: the numbers that a report stands on.

Owns reading the files of a run directory for people, and what is counted over its steps. A file
that is not there is None (a run that failed early has few); one that holds something else is an
error that names it, for run directories travel. Nothing is drawn here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from myna.config_file import StoredSetting, stored_settings
from myna.data.dataset import Accounting
from myna.data.sample import TokenRow, read_sample
from myna.errors import ConfigError, StorageError
from myna.run_dir import RunDir
from myna.training.events import read_events

Seconds = Annotated[float, Field(ge=0, le=32_503_680_000)]
"""Since 1970, up to the year 3000."""


class _Read(BaseModel):
    """What is read from a file: of its fields those that are needed."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Moment(_Read):
    """When something happened."""

    time: Seconds


class Start(Moment):
    """A process began to train."""

    version: str
    torch: str
    model: str
    trainable: int
    parameters: int
    total_steps: int
    processes: int
    model_type: str | None = None
    """Architecture, as the config of the base says it."""
    train_rows: int | None = None
    """Examples that are trained."""
    held_out_rows: int | None = None
    notes: tuple[str, ...] = ()
    """What a person was told before step 1."""
    environment: Mapping[str, str | int | float | None] = {}


class Step(Moment):
    """An optimizer step."""

    step: int
    epoch: Annotated[float, Field(ge=0, le=1e9)]
    loss: float
    learning_rate: float
    grad_norm: float | None
    rows: int
    tokens: int
    computed_tokens: int
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int


class HeldOut(Moment):
    """The loss on the held-out rows after a step."""

    step: int
    loss: float
    rows: int


class Incident(Moment):
    """Something that a person should know of: a warning, a resumption, what ended the run."""

    event: Literal["warning", "resume", "stop", "error"]
    step: int | None = None
    message: str = ""


class Memory(_Read):
    """How steps were computed, as far as memory decides it."""

    unit: Literal["tokens", "rows"]
    limit: int
    layers_recomputed: int
    num_layers: int
    expected_peak_bytes: int | None = None
    budget_bytes: int | None = None


class Prepacked(_Read):
    """Whether weights were laid out anew for speed."""

    use: bool
    reason: str


class Plan(_Read):
    """Choices that were measured before step 1."""

    device: str
    dtype: str
    reason: str
    computation: str
    memory: Memory | None = None
    prepacked: Prepacked | None = None


class SavedAdapter(_Read):
    """What other programs have to know of the adapter."""

    rank: int = Field(alias="r")
    """As it is saved; PiSSA and OLoRA are saved at twice the rank they were trained at."""
    use_dora: bool = False
    stop_ids: tuple[int, ...] = ()
    system: str | None = None


class Pair(_Read):
    """One number of the base and of the adapter."""

    base: float | None = None
    adapter: float | None = None


class Forgetting(_Read):
    """Loss on a text that has nothing to do with the training."""

    text: str
    base: float | None = None
    adapter: float | None = None


class AnsweredRow(_Read):
    """A row that both answered."""

    place: str
    question: str
    reference: str | None = None
    base: str | None = None
    adapter: str | None = None
    loss: Pair | None = None


class Evaluation(_Read):
    """Base against adapter, as `myna eval` found them."""

    data: str | None = None
    rows_judged: int
    loss: Pair | None = None
    perplexity: Pair | None = None
    metrics: Mapping[str, Pair] = {}
    scale: Mapping[str, float] = {}
    """What is the best of a metric: 1 or 100."""
    forgetting: Forgetting | None = None
    tasks: Mapping[str, Mapping[str, Pair]] = {}
    """Of the public benchmarks that were asked for, the metrics of each."""
    rows: tuple[AnsweredRow, ...] = ()


@dataclass(frozen=True)
class Epoch:
    """Steps of one pass over the rows."""

    number: int
    steps: int
    loss: float
    """Mean over its trained tokens."""
    held_out: float | None
    """At the last evaluation in it."""
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What the steps that count took together."""

    steps: int
    rows: int
    tokens: int
    computed_tokens: int
    trained_tokens: int
    seconds: float
    """In steps; loading, evaluations and checkpoints are not in it."""
    peak_memory_bytes: int


@dataclass(frozen=True)
class RunRecord:
    """One run directory, read."""

    name: str
    settings: Sequence[StoredSetting] = ()
    accounting: Accounting | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of data, tokenizer, template and base, and versions of packages."""
    plan: Plan | None = None
    starts: Sequence[Start] = ()
    """One for each process that worked on it."""
    steps: Sequence[Step] = ()
    held_out: Sequence[HeldOut] = ()
    incidents: Sequence[Incident] = ()
    last_time: float | None = None
    """Of the last event."""
    sample: Sequence[TokenRow] = ()
    evaluation: Evaluation | None = None
    adapter: SavedAdapter | None = None

    def setting(self, name: str) -> Any:
        """The value of a setting; None where it is not set or not stored."""
        return next((setting.value for setting in self.settings if setting.name == name), None)

    @property
    def epochs(self) -> list[Epoch]:
        """The run by epochs, the last of which may have been broken off."""
        found = []
        for number, group in groupby(self.steps, key=lambda step: math.ceil(step.epoch - 1e-6)):
            steps = list(group)
            trained = sum(step.trained_tokens for step in steps)
            judged = [e.loss for e in self.held_out if steps[0].step <= e.step <= steps[-1].step]
            found.append(
                Epoch(
                    number,
                    len(steps),
                    math.fsum(step.loss * step.trained_tokens for step in steps) / max(trained, 1),
                    judged[-1] if judged else None,
                    sum(step.tokens for step in steps),
                    math.fsum(step.seconds for step in steps),
                )
            )
        return found

    @property
    def cost(self) -> Cost:
        """The sums over all steps that count."""
        return Cost(
            steps=len(self.steps),
            rows=sum(step.rows for step in self.steps),
            tokens=sum(step.tokens for step in self.steps),
            computed_tokens=sum(step.computed_tokens for step in self.steps),
            trained_tokens=sum(step.trained_tokens for step in self.steps),
            seconds=math.fsum(step.seconds for step in self.steps),
            peak_memory_bytes=max((step.peak_memory_bytes for step in self.steps), default=0),
        )

    @property
    def best_held_out(self) -> HeldOut | None:
        """The evaluation with the lowest loss, the first of equal ones."""
        return min(self.held_out, key=lambda evaluation: evaluation.loss, default=None)


def read_run(directory: RunDir) -> RunRecord:
    """Read what is there.

    Raises ConfigError where the folder is no run, StorageError naming a file that is damaged.
    """
    if not (directory.config.is_file() or directory.events.is_file()):
        raise ConfigError(
            f"{directory.path}: no run is in this folder: neither config.yaml nor events.jsonl.\n"
            "  Name the directory of a run, such as runs/NAME; `myna runs` lists them."
        )
    data = _json(directory.data)
    return RunRecord(
        name=directory.path.absolute().name,
        settings=stored_settings(directory.config) if directory.config.is_file() else (),
        accounting=None if data is None else _as(Accounting, data, directory.data),
        hashes=(
            {} if data is None else _as(dict[str, str], data.get("sha256", {}), directory.data)
        ),
        plan=_of_file(Plan, directory.plan),
        **_events(directory.events),
        sample=read_sample(directory.sample) if directory.sample.is_file() else (),
        evaluation=_of_file(Evaluation, directory.evaluation),
        adapter=_adapter(directory.adapter),
    )


def _adapter(folder: Path) -> SavedAdapter | None:
    settings = _json(folder / "adapter_config.json")
    if settings is None:
        return None
    saved: SavedAdapter = _as(SavedAdapter, settings | (_json(folder / "myna.json") or {}), folder)
    return saved


def _events(path: Path) -> dict[str, Any]:
    found: dict[str, list[Any]] = {"starts": [], "steps": [], "held_out": [], "incidents": []}
    kinds: Mapping[str, tuple[str, type[_Read]]] = {
        "start": ("starts", Start),
        "step": ("steps", Step),
        "eval": ("held_out", HeldOut),
        **dict.fromkeys(("warning", "resume", "stop", "error"), ("incidents", Incident)),
    }
    last: float | None = None
    for event in read_events(path) if path.is_file() else ():
        last = _as(Moment, event, path).time
        if event["event"] in kinds:
            name, kind = kinds[event["event"]]
            found[name].append(_as(kind, event, path))
    return {**found, "last_time": last}


Value = TypeVar("Value")


def _of_file(kind: type[Value], path: Path) -> Value | None:
    content = _json(path)
    return None if content is None else _as(kind, content, path)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = _as(dict[str, Any], json.loads(path.read_bytes()), path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as JSON: {error}.") from None
    return content


def _as(kind: Any, content: Any, path: Path) -> Any:
    try:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind.model_validate(content)
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "its content"
        raise StorageError(
            f"{path}: {where} is {fault['input']!r:.80}; {fault['msg']}.\n"
            "  The file is not as myna wrote it."
        ) from None
