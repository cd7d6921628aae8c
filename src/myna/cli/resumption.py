"""Whether a run directory belongs to the command that was given.

Owns what is written when a run begins (settings, hashes, measured choices) and the comparison with
it when the same command comes again: settings that change what is trained must be equal, others
may differ.
"""

import json
from collections.abc import Callable
from typing import Any

from myna.config import Config, flatten, is_free, leaves
from myna.config_file import ResolvedConfig, load_config
from myna.device import Compute
from myna.errors import ConfigError
from myna.run_dir import RunDir, write_file

_ELSEWHERE = (
    "  Repeat the command that began this run, start another with --fresh, or choose another "
    "place with --output."
)


def check_same_settings(directory: RunDir, config: Config) -> None:
    """Raise ConfigError, with both values, where the run in `directory` has other settings."""
    stored = flatten(load_config(directory.config).config)
    asked = flatten(config)
    differing = [
        f"  {name} is {asked[name]!r} now and was {stored[name]!r}"
        for name, field in leaves().items()
        if name != "output" and not is_free(field) and asked[name] != stored[name]
    ]
    if differing:
        lines = "\n".join(differing)
        raise ConfigError(
            f"{directory.path} holds a run with other settings:\n{lines}\n{_ELSEWHERE}"
        )


def check_same_data(directory: RunDir, hashes: dict[str, str]) -> None:
    """Raise ConfigError where data, tokenizer or template are not those the run began with."""
    stored = json.loads(directory.data.read_text(encoding="utf-8"))["sha256"]
    changed = [name for name in hashes if hashes[name] != stored[name]]
    if changed:
        lines = "\n".join(
            f"  {name}: {hashes[name][:16]}… now, {stored[name][:16]}… then" for name in changed
        )
        raise ConfigError(
            f"{directory.path} holds a run on another {' and '.join(changed)} (SHA-256):\n"
            f"{lines}\n{_ELSEWHERE}"
        )


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
    hashes: dict[str, str],
    measured: dict[str, Any],
) -> None:
    """Note what the run is, before its first step; `measured` becomes plan.json."""
    write_file(directory.data, _json({**accounting, "sha256": hashes}))
    write_file(directory.plan, _json({**measured, "replans": []}))
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
    if not directory.plan.exists():
        return None
    plan: dict[str, Any] = json.loads(directory.plan.read_text(encoding="utf-8"))
    return plan


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
