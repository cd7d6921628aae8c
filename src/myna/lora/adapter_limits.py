"""Limits: what an adapter folder may hold, before anything in it is used.

Owns the checks against folders that were made to do harm, or were mangled: links that lead
elsewhere, settings that would allocate without bound, regular expressions that never end. What the
settings mean is `adapter_file.py`'s.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from myna.errors import ConfigError, StorageError

MAX_JSON_BYTES = 1 << 20
"""Settings are a few kilobytes; a megabyte is none."""
MAX_SCALING = 1e4
"""An update scaled up further is noise. Usual are 1 to 4."""
MAX_PATTERN = 2000
"""Characters of a regular expression over module names."""


def check_file(folder: Path, name: str, most_bytes: int | None = None) -> None:
    """Raise ConfigError for a link out of the folder and for no plain file, StorageError for size.

    Links of the hub's cache, from a snapshot into the blobs beside it, are what they should be.
    """
    path = folder / name
    if path.is_symlink():
        target = path.resolve()
        blobs = folder.resolve().parent.parent / "blobs"
        if not target.is_relative_to(folder.resolve()) and target.parent != blobs:
            raise ConfigError(
                f"{path} is a link to {target}, out of the adapter's folder; it is not followed.\n"
                "  Copy the file itself into the folder."
            )
    if not path.is_file():
        raise ConfigError(f"{path} is not a plain file; expected the adapter's own.")
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise StorageError(
            f"{path} has {size:,} bytes; settings of an adapter have {most_bytes:,} at most.\n"
            "  Copy the adapter again from its source."
        )


def check_settings(
    file: Path, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ConfigError for settings that a real adapter with these tensors does not have.

    peft allocates by the rank in the settings before it sees the tensors; here the tensors, whose
    bytes are there, bound it.
    """
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape}
    ranks |= {shape[1] for name, shape in shapes.items() if name.endswith("lora_embedding_A")}
    for name, rank in _ranks(settings):
        if type(rank) is not int or rank < 1 or (ranks and rank > max(ranks)):
            raise ConfigError(
                f"{file}: {name} is {_shown(rank)}, and the tensors have "
                f"{'the rank ' if len(ranks) == 1 else 'ranks up to '}{max(ranks, default=0)}; "
                "nothing was allocated.\n  Copy the adapter again from its source."
            )
    for name, alpha in _alphas(settings):
        usual = type(alpha) in (int, float) and math.isfinite(alpha)
        if not usual or abs(alpha) > MAX_SCALING * min(ranks, default=1):
            raise ConfigError(
                f"{file}: {name} is {_shown(alpha)}; expected a number that scales the update by "
                f"{MAX_SCALING:,.0f} at most.\n  Copy the adapter again from its source."
            )
    for name, pattern in _patterns(settings):
        if fault := _fault(pattern):
            raise ConfigError(
                f"{file}: {name} is {_shown(pattern)}, {fault}.\n"
                "  Write the names of the layers as a list."
            )


def _ranks(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "r", settings.get("r")
    yield from _entries(settings, "rank_pattern")


def _alphas(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "lora_alpha", settings.get("lora_alpha")
    yield from _entries(settings, "alpha_pattern")


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = settings.get(name)
        if value is None:
            continue
        whole = isinstance(value, str)
        for part in [value] if whole else value if isinstance(value, list) else [value]:
            yield name, part if whole or not isinstance(part, str) else re.escape(part)
    for name in ("rank_pattern", "alpha_pattern"):
        for key, _ in _entries(settings, name):
            yield name, key.removeprefix(f"{name}.")


def _entries(settings: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    value = settings.get(name) or {}
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{name}.{key}", entry
    else:
        yield name, value


def _fault(pattern: Any) -> str | None:
    """Why `pattern` is not used as a regular expression; None where it may be."""
    if not isinstance(pattern, str):
        return "no text"
    if len(pattern) > MAX_PATTERN:
        return f"which is longer than {MAX_PATTERN:,} characters"
    try:
        parser: Any = re._parser  # type: ignore[attr-defined]  # there is no public one
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return "which is no regular expression"
    if _repeats_repeats(tree, inside=False):
        return "which repeats what repeats and may never end"
    return None


def _repeats_repeats(tree: Any, *, inside: bool) -> bool:
    """Whether a repetition holds another one or a choice: time may then be exponential."""
    return any(_may_never_end(str(name), argument, inside=inside) for name, argument in tree)


def _may_never_end(name: str, argument: Any, *, inside: bool) -> bool:
    if name == "BRANCH":
        return inside or any(_repeats_repeats(one, inside=inside) for one in argument[1])
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        _, most, body = argument
        repeats = most > 1
        return (repeats and inside) or _repeats_repeats(body, inside=inside or repeats)
    if name == "SUBPATTERN":
        return _repeats_repeats(argument[-1], inside=inside)
    if name in ("ASSERT", "ASSERT_NOT"):
        return _repeats_repeats(argument[1], inside=inside)
    return name in ("GROUPREF_EXISTS", "ATOMIC_GROUP")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
