"""Whether a run directory belongs to the command that was given.

Owns what is written when a run begins (settings, hashes, measured choices) and the comparison with
it when the same command comes again: settings that change what is trained must be equal, others
may differ, and `--allow-change` names exceptions.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from myna.config import Config, flatten, is_free, leaves
from myna.config_file import ResolvedConfig, load_config
from myna.device import Compute
from myna.errors import ConfigError
from myna.run_dir import RunDir, write_file

_ELSEWHERE = (
    "  Repeat the command that began this run, allow it with --allow-change KEY, start another "
    "with --fresh, or choose another place with --output."
)
FORMAT = 1
"""Of what a run directory holds beside checkpoints and adapter; raised by a change that an older
version would misread."""
_BEND_THE_SCHEDULE = ("train.epochs", "train.max_steps")


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the run began."""

    name: str
    """As `--allow-change` takes it: a setting or one of `INPUTS`."""
    before: Any
    now: Any

    def __str__(self) -> str:
        """`train.learning_rate is 0.5 now and was 0.001`."""
        return f"{self.name} is {_shown(self.now)} now and was {_shown(self.before)}"


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, _Hash) else repr(value)
    return text


class _Hash(str):
    """A fingerprint, shown without quotes and cut."""

    def __str__(self) -> str:
        return f"{self[:24]}…" if len(self) > 25 else str.__str__(self)


def changed_settings(
    directory: RunDir, config: Config, allowed: Sequence[str] = ()
) -> list[Change]:
    """Settings that differ from those of the run in `directory`, all of them allowed to.

    Raises ConfigError, with both values, for those that are not, and for a name in `allowed` that
    is nothing which could change, and for a run that a newer version of myna began.
    """
    _read_plan(directory)  # before its config.yaml, which may have keys that are unknown here
    known = {*leaves(), *INPUTS}
    for name in allowed:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ConfigError(
                f'--allow-change {name}: there is no setting or input "{name}".'
                + (f" Did you mean {near[0]}?" if near else "")
            )
    stored = flatten(load_config(directory.config).config)
    asked = flatten(config)
    changes = [
        Change(name, stored[name], asked[name])
        for name, field in leaves().items()
        if name != "output" and not is_free(field) and asked[name] != stored[name]
    ]
    _refuse(directory, changes, allowed, "settings")
    return changes


def changed_inputs(
    directory: RunDir, identity: Mapping[str, str], allowed: Sequence[str] = ()
) -> list[Change]:
    """As `changed_settings`, for what `identity` tells of the `INPUTS`.

    Raises ConfigError with both values.
    """
    stored = json.loads(directory.data.read_text(encoding="utf-8"))["sha256"]
    changes = [
        Change(name, _Hash(stored[name]), _Hash(now))
        for name, now in identity.items()
        if name in stored and stored[name] != now
    ]
    what = " and ".join(change.name for change in changes)
    _refuse(directory, changes, allowed, what)
    return changes


def _refuse(
    directory: RunDir, changes: Sequence[Change], allowed: Sequence[str], what: str
) -> None:
    refused = [change for change in changes if change.name not in allowed]
    if not refused:
        return
    lines = "\n".join(f"  {change}" for change in refused)
    bent = ""
    if any(change.name in _BEND_THE_SCHEDULE for change in refused):
        bent = "\n  A longer or shorter run has another learning rate at every step that is left."
    raise ConfigError(
        f"{directory.path} holds a run with other {what}:\n{lines}{bent}\n{_ELSEWHERE}"
    )


INPUTS = ("data", "tokenizer", "template", "base", "torch", "transformers", "peft")
"""What `identity` may name."""


def versions() -> dict[str, str]:
    """Versions of the packages that compute the numbers, up to what says how torch was built."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for everything the bits depend on that is not as it was at the checkpoint."""
    return [
        f"{name} is {now[name]} now and was {before[name]}; resumed, not bit-identical"
        for name in now
        if name in before and before[name] != now[name]
    ]


def stored_identity(directory: RunDir) -> str | None:
    """The run's own name, by which its checkpoints are known; None for a new run."""
    found: str | None = (_read_plan(directory) or {}).get("run")
    return found


def stored_compute(directory: RunDir) -> Compute | None:
    """The device and number format that the run began with; None for a new run."""
    plan = _read_plan(directory)
    if plan is None:
        return None
    return Compute(plan["device"], plan["dtype"], f"{plan['dtype']} as when this run began.")


def stored_memory_plans(directory: RunDir) -> list[dict[str, Any]]:
    """The memory plan that the run began with and those that came later; [] for a new run."""
    plan = _read_plan(directory)
    if plan is None or "memory" not in plan:
        return []
    return [plan["memory"], *plan["replans"]]


def stored_prepacking(directory: RunDir) -> dict[str, Any] | None:
    """Whether the run began with prepacked weights, and why; None for a new run."""
    return (_read_plan(directory) or {}).get("prepacked")


def write_description(
    directory: RunDir,
    resolved: ResolvedConfig,
    accounting: dict[str, Any],
    identity: Mapping[str, str],
    measured: dict[str, Any],
) -> None:
    """Note what the run is, before its first step; `measured` becomes plan.json."""
    write_file(directory.data, _json({**accounting, "sha256": dict(identity)}))
    replans = (_read_plan(directory) or {}).get("replans", [])
    write_file(directory.plan, _json({"format": FORMAT, **measured, "replans": replans}))
    write_file(directory.config, resolved.to_yaml())


def replans_noted(directory: RunDir) -> Callable[[dict[str, Any]], None]:
    """A listener to events that adds every plan made on the way to plan.json.

    It is there before the step is repeated: a run killed after that one replays it.
    """

    def note(event: dict[str, Any]) -> None:
        if event["event"] != "plan" or "part" not in event:
            return
        plan = _read_plan(directory)
        assert plan is not None, "plan.json is written before the first step"
        # Those of later steps come from a run that is repeated with less memory.
        kept = [older for older in plan["replans"] if older["step"] <= event["step"]]
        write_file(directory.plan, _json({**plan, "replans": [*kept, event["memory"]]}))

    return note


def _read_plan(directory: RunDir) -> dict[str, Any] | None:
    # config.yaml is written last: without it no run has begun here, whatever a killed one left.
    if not (directory.config.exists() and directory.plan.exists()):
        return None
    plan: dict[str, Any] = json.loads(directory.plan.read_text(encoding="utf-8"))
    found = plan.get("format", FORMAT)
    if found > FORMAT:
        raise ConfigError(
            f"{directory.path} holds a run of a newer version of myna: its format is {found}, and "
            f"this version reads up to {FORMAT}.\n"
            "  Go on with that version, or start another run with --fresh."
        )
    return plan


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
