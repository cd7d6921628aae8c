"""Model names: what a run is called by its clients.

Owns which names there can be and where a run's comes from. A name is looked up in a table of the
runs that were given at the start, and nothing else: no name that a client sends becomes a path.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from myna.errors import ConfigError

BASE = "base"
"""The name of the base model without an adapter."""

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def name_runs(sources: Sequence[str]) -> dict[str, str]:
    """Model name to source, one for each run or adapter folder: the run directory's own name.

    Raises ConfigError for a directory whose name cannot be one, for two of the same name, and for
    one that is called as the base is.
    """
    named: dict[str, str] = {}
    for source in sources:
        path = Path(source).expanduser().resolve()
        name = path.parent.name if path.name == "adapter" else path.name
        if not MODEL_NAME.fullmatch(name):
            raise ConfigError(
                f'{source}: "{name}" cannot be a model name; expected 1 to 64 letters, digits, '
                "points, dashes and underscores, the first a letter or a digit.\n"
                "  Rename the directory."
            )
        if name == BASE:
            raise ConfigError(
                f'{source}: "{BASE}" is the name of the base model without an adapter.\n'
                "  Rename the directory."
            )
        if name in named:
            raise ConfigError(
                f'two runs are called "{name}": {named[name]} and {source}.\n'
                "  Rename one of the directories; its name is the model name that clients send."
            )
        named[name] = source
    return named
