"""The library in a few names, for notebooks and programs: what the commands do, as functions.

Owns the way in only: settings as a YAML, a mapping or keywords, output in plain lines, and what a
run left as an object. The work is that of the commands (`cli`), so a run begun here goes on there.
Errors are exceptions of `myna.errors`, whose text is the whole message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from myna.cli import data as data_command
from myna.cli import eval as eval_command
from myna.cli import train as train_command
from myna.cli.preparation import prepare_rows
from myna.config import Config
from myna.config_file import ResolvedConfig, load_config
from myna.data.conversation import Message as Message
from myna.data.dataset import Accounting
from myna.device import limit_kernel_cache
from myna.evaluation.evaluate import Evaluation as Evaluation
from myna.inference import speaker as speaking
from myna.inference.generate import Sampling as Sampling
from myna.inference.speaker import Speaker as Speaker
from myna.run_dir import RunDir
from myna.training.events import read_events

Settings = str | Path | Mapping[str, Any] | None
"""A YAML file, a run directory, the settings themselves, or nothing but keywords."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Its directory."""

    @property
    def adapter(self) -> Path:
        """The folder that peft, transformers and vLLM load."""
        return RunDir(self.path).adapter

    @property
    def config(self) -> Config:
        """The settings it was made with."""
        return load_config(self.path).config

    @property
    def loss_plot(self) -> Path:
        """The loss as a picture."""
        return RunDir(self.path).loss_plot

    @property
    def losses(self) -> list[float]:
        """Mean loss of each step's trained tokens, in order."""
        return self._losses("step")

    @property
    def held_out_losses(self) -> list[float]:
        """The same over the held-out rows, of each evaluation."""
        return self._losses("eval")

    def _losses(self, kind: str) -> list[float]:
        events = read_events(RunDir(self.path).events)
        return [float(event["loss"]) for event in events if event["event"] == kind]


def train(settings: Settings = None, *, fresh: bool = False, **changes: Any) -> Run:
    """Train an adapter, or go on with the run that the same settings began, as `myna train` does.

    `changes` are settings by name, which win over those in `settings`: `model="…"`,
    `lora={"rank": 8}`, or the names of other tools. `fresh` takes the next free directory. Raises
    MynaError, as a subclass, for everything that a person can mend.
    """
    limit_kernel_cache()
    options = train_command.Options(fresh=fresh)
    finished = train_command.run(_resolve(settings, changes), options, console=_plain())
    return Run(finished.directory.path)


def show_data(settings: Settings = None, *, rows: int = 1, **changes: Any) -> Accounting:
    """Print what would be trained, as `myna data` does, with the first `rows` answers by token.

    Returns the counts. Raises DataError with every row that cannot be trained.
    """
    config = _resolve(settings, changes).config
    quiet = Console(quiet=True)
    prepared = prepare_rows(config, trust_remote_code=False, needs_model=False, console=quiet)
    data_command.run(
        prepared,
        config,
        as_json=False,
        html=None,
        rows=rows,
        wanted=data_command.Wanted(),
        console=_plain(),
    )
    return prepared.dataset.accounting


def evaluate(
    run: Run | str | Path,
    *,
    data: str | Path | None = None,
    metrics: Sequence[str] = (),
    limit: int | None = None,
) -> Evaluation:
    """Judge adapter and base on the rows that `run` held out, or on `data`, as `myna eval` does.

    `metrics` are named as there (`exact_match`, `regex:PATTERN`, `FILE.py:FUNCTION` …); none: the
    run's own, or exact match and chrF. `limit` takes so many rows, the first. Prints the tables and
    writes evaluation.json. Raises ConfigError for what is no finished run or metric, DataError for
    rows that cannot be judged.
    """
    limit_kernel_cache()
    options = eval_command.Options(
        data=None if data is None else str(data), metrics=tuple(metrics), limit=limit
    )
    path = run.path if isinstance(run, Run) else Path(run)
    return eval_command.run(path, options, console=_plain())


def open_speaker(source: Run | str | Path | None = None, *, system: str | None = None) -> Speaker:
    """Load a run, an adapter folder or a model, to ask it something; not given: the newest run.

    `system` takes the place of the persona used in training. Raises ConfigError for a source that
    is none of these, or whose base is not the one it was trained on.
    """
    limit_kernel_cache()
    path = source.path if isinstance(source, Run) else source
    return speaking.open_speaker(None if path is None else str(path), system=system)


def _resolve(settings: Settings, changes: Mapping[str, Any]) -> ResolvedConfig:
    if isinstance(settings, Mapping):
        return load_config(None, arguments={**settings, **changes})
    return load_config(None if settings is None else Path(settings), arguments=changes)


def _plain() -> Console:
    """Lines as in a pipe: notebooks show neither bars that move nor colours of terminals."""
    return Console(force_jupyter=False, force_terminal=False, highlight=False, width=100)
