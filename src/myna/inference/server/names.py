"""Names: which runs are served together, and what clients call them.

Owns the names of models and finding the one base that all runs share. A name is looked up in a
table of the runs that were given at the start, and nothing else: no name that a client sends ever
becomes a path.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from myna.errors import ConfigError
from myna.inference.speaker import find_adapter, find_base
from myna.lora.adapter_file import read_adapter
from myna.models.load import fingerprint_of

BASE = "base"
"""The name of the base model without an adapter."""

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Runs:
    """What is served: a base, as a folder or a hub id, and adapter folders by model name."""

    base: str
    adapters: Mapping[str, Path]


def find_runs(sources: Sequence[str], *, trust_remote_code: bool = False) -> Runs:
    """What the arguments of `myna serve` mean: runs and adapter folders, or a model alone.

    Raises ConfigError for what is none of these, for a name that cannot be a model's or that two
    have, and for runs that do not share their base.
    """
    adapters: dict[str, Path] = {}
    bases: dict[str, str] = {}
    for source in sources:
        folder = find_adapter(source)
        if folder is None:
            bases[source] = source
            continue
        name = _name(source, folder)
        if name in adapters:
            raise ConfigError(
                f'two runs are called "{name}": {adapters[name]} and {folder}.\n'
                "  Rename one of the directories; its name is the model name that clients send."
            )
        adapters[name] = folder
        bases[source] = find_base(read_adapter(folder))
    base = next(iter(bases.values()))
    if len(set(bases.values())) > 1:
        _check_shared(bases, trust_remote_code)
    return Runs(base, adapters)


def _name(source: str, folder: Path) -> str:
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "adapter" else folder.name
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f'{source}: "{name}" cannot be a model name; expected 1 to 64 letters, digits, points, '
            "dashes and underscores, the first a letter or a digit.\n  Rename the directory."
        )
    if name == BASE:
        raise ConfigError(
            f'{source}: "{BASE}" is the name of the base model without an adapter.\n'
            "  Rename the directory."
        )
    return name


def _check_shared(bases: Mapping[str, str], trust_remote_code: bool) -> None:
    """Raise ConfigError unless all bases, some of other names, have the same weights."""
    known = {
        base: fingerprint_of(base, trust_remote_code=trust_remote_code)
        for base in dict.fromkeys(bases.values())
    }
    if len(set(known.values())) > 1:
        lines = "\n".join(f"  {source}: {base}, {known[base]}" for source, base in bases.items())
        raise ConfigError(
            f"one server has one base in memory, and these have several:\n{lines}\n"
            "  Start one server for each base."
        )
