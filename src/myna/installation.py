"""What an installation of myna needs, and whether it is all there.

Owns the comparison of the package's own metadata with what lies on the disk, for `myna doctor` and
for commands that cannot begin: an installer that was killed leaves packages out, leaves them half
written, or leaves older ones in their place. Loads nothing but the standard library, which is all
there may be.
"""

import csv
import importlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_REQUIREMENT = re.compile(
    r"\s*(?P<name>[A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*(?P<versions>[^;]*)(?:;(?P<marker>.*))?"
)
_MODULES = {"pyyaml": "yaml", "protobuf": "google.protobuf"}
"""Modules that are not named as their package is."""


@dataclass(frozen=True)
class Requirement:
    """A package that another one asks for."""

    name: str
    versions: str
    """As the metadata has it: `>=5.17`."""
    needed_by: str
    marker: str = ""

    def __str__(self) -> str:
        """As pip takes it."""
        return f"{self.name}{self.versions}"


@dataclass(frozen=True)
class Fault:
    """Something that is not as it has to be."""

    text: str
    install: str | None = None
    """What to install."""
    repair: str | None = None
    """What is there in name and has to be installed over itself."""


def incomplete() -> str | None:
    """What is missing and how to mend it, in as many lines as it takes; None where all is there."""
    found = faults()
    if not found:
        return None
    lines = ["this installation of myna is not complete:", *(f"  {fault.text}" for fault in found)]
    lines.append("  Mend it with")
    for option, names in (
        ("", [fault.install for fault in found if fault.install]),
        (" --force-reinstall --no-deps", [fault.repair for fault in found if fault.repair]),
    ):
        if names:
            quoted = " ".join(f'"{name}"' for name in names)
            lines.append(f"    python -m pip install{option} {quoted}")
    return "\n".join(lines)


def faults() -> list[Fault]:
    """Everything that keeps myna from running; imports what it needs if its files are all there."""
    own = _distribution("myna")
    if own is None:
        text = "myna's own metadata are missing, so that what it needs is not known"
        return [Fault(text, repair="myna")]
    found = list(_faults_of_files("myna", own))
    direct = [need for need in _requirements(own) if not need.marker]
    waiting, seen = list(direct), {"myna"}
    for need in waiting:  # grows while it is read
        if _key(need.name) in seen:
            continue
        seen.add(_key(need.name))
        there = _distribution(need.name)
        if there is None:
            found.append(Fault(f"{_shown(need)} is missing", install=str(need)))
            continue
        found += _faults_of(need, there)
        waiting += [more for more in _requirements(there) if not more.marker]
    return found or [fault for need in direct for fault in _faults_of_import(need)]


def _faults_of(need: Requirement, there: importlib.metadata.Distribution) -> Iterator[Fault]:
    least = re.search(r">=\s*([0-9.]+)", need.versions)
    if least and _release(there.version) < _release(least[1]):
        text = f"{_shown(need)} is too old: {there.version}, and at least {least[1]} is needed"
        yield Fault(text, install=str(need))
    else:
        yield from _faults_of_files(_shown(need), there)


def _faults_of_files(shown: str, there: importlib.metadata.Distribution) -> Iterator[Fault]:
    """Whether the files are there that were installed; packages of other tools may list none."""
    what = f"{shown} {there.version}"
    repair = f"{there.name}=={there.version.partition('+')[0]}"
    record = there.read_text("RECORD")
    if record is None:
        if there.read_text("INSTALLER") is None:  # which pip writes when all files are there
            text = f"{what} was not installed to its end: the list of its files is missing"
            yield Fault(text, repair=repair)
        return
    # Scripts lie elsewhere and are not needed; what has no size may change or be absent.
    sizes = {
        row[0]: int(row[2])
        for row in csv.reader(record.splitlines())
        if len(row) == 3 and row[2] and not row[0].startswith(("..", "/"))
    }
    broken = [path for path, size in sizes.items() if not _has_size(there, path, size)]
    if broken:
        text = (
            f"{what} is there in part: {len(broken):,} of its {len(sizes):,} files missing or cut "
            f"short, the first is {broken[0]}"
        )
        yield Fault(text, repair=repair)


def _has_size(there: importlib.metadata.Distribution, path: str, size: int) -> bool:
    try:
        # Somebody may have added to it; an installer that was killed leaves less.
        return os.stat(str(there.locate_file(path))).st_size >= size
    except OSError:
        return False


def _faults_of_import(need: Requirement) -> Iterator[Fault]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(_MODULES.get(_key(need.name), need.name.replace("-", "_")))
    except Exception as error:  # whatever a broken package raises
        there = importlib.metadata.version(need.name)
        text = f"{need.name} {there} cannot be imported: {type(error).__name__}: {error}"
        yield Fault(text, repair=f"{need.name}=={there.partition('+')[0]}")


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # A folder that an installer made and did not come to fill.
    return found if found.read_text("METADATA") else None


def _requirements(there: importlib.metadata.Distribution) -> Iterator[Requirement]:
    for line in there.requires or ():
        if match := _REQUIREMENT.match(line):
            marker = (match["marker"] or "").strip()
            yield Requirement(match["name"], match["versions"].strip(" ()"), there.name, marker)


def _shown(need: Requirement) -> str:
    return need.name if need.needed_by == "myna" else f"{need.name}, which {need.needed_by} needs,"


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at its end."""
    match = re.match(r"[0-9]+(?:\.[0-9]+)*?(?=(?:\.0+)*(?:[^0-9.]|$))", version)
    return tuple(map(int, match[0].split("."))) if match else ()
