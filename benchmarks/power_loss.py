"""What is left of a folder when the power fails: what was done to it, replayed up to a moment.

Owns a recorder of everything that a program does to a folder, and a disk that keeps no more than it
has to. A name that was made, changed or removed is kept for certain once its folder was flushed,
the content of a file once the file was flushed; of the rest, anything may be there or not. Which
state is a good one is for the caller to say.

The recorder sees opening, renaming, making and removing through an audit hook and flushing by
taking the place of `os.fsync`; what a file holds it looks up between these. A program that writes
past Python (tokenizers' Rust) is seen at the next of them.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = 0
"""The node of the folder that is watched."""


@dataclass(frozen=True)
class Operation:
    """One thing that was done; nodes are numbers of files and folders, whatever their names."""

    kind: Literal["make", "write", "flush", "rename", "remove"]
    node: int
    names: tuple[tuple[int, str, int | None], ...] = ()
    """Folder, name and what it names from then on; None where the name is gone."""
    content: bytes | None = None
    """What the file holds from then on; None in a `make` means a folder."""


@dataclass
class Recording:
    """What was in a folder, and what was then done to it."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, bytes] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)


@contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """Record what this process does to `root` in the block; the recording is whole after it."""
    global _watching
    assert _watching is None, "one recording at a time"
    _install()
    whole = os.fsync
    watcher = _Watcher(root)
    recording = Recording(
        {node: dict(names) for node, names in watcher.folders.items()}, dict(watcher.files)
    )

    def fsync(descriptor: int) -> None:
        watcher.flushed(descriptor)
        whole(descriptor)

    os.fsync = fsync
    _watching = watcher
    try:
        yield recording
    finally:
        _watching = None
        os.fsync = whole
        watcher.look()
        recording.operations = watcher.operations


_watching: "_Watcher | None" = None
_installed = False


def _install() -> None:
    """Audit hooks stay for ever, so there is one."""
    global _installed
    if not _installed:
        _installed = True
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _watching
    if _watching is None or event not in (
        "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate",
    ):  # fmt: skip
        return
    watcher, _watching = _watching, None  # what it does itself is not recorded
    try:
        watcher.see(event, arguments)
    finally:
        _watching = watcher


class _Watcher:
    """The tree as it is known to be, and the operations that led there."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}
        self.files: dict[int, bytes] = {}
        self.operations: list[Operation] = []
        self._next = ROOT
        self.look()
        self.operations = []

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note what is about to be done."""
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and any(sign in mode for sign in "wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            )
            place = self._place(path) if writes and not isinstance(path, int) else None
            if place is None:
                return
            self.look()
            folder, name = place
            node = self.folders[folder].get(name)
            if node is None:
                self._make(folder, name, b"")
            elif isinstance(flags, int) and flags & os.O_TRUNC and self.files.get(node):
                self._write(node, b"")
            return
        if event == "os.truncate":
            self.look()
            return
        place = self._place(arguments[0], arguments[2 if event == "os.rename" else -1])
        if event == "os.rename":
            self._see_rename(place, self._place(arguments[1], arguments[3]))
        elif place is not None:
            self.look()
            folder, name = place
            exists = name in self.folders[folder]
            if event == "os.mkdir" and not exists:
                self._make(folder, name, None)
            elif event in ("os.remove", "os.rmdir") and exists:
                self._remove(folder, name)

    def flushed(self, descriptor: int) -> None:
        """Note that a file or folder is about to be flushed."""
        global _watching
        watching, _watching = _watching, None
        try:
            self.look()
            flushed = os.fstat(descriptor)
            for node, path in self._paths(ROOT, self._root):
                if os.path.samestat(flushed, path.stat()):
                    self.operations.append(Operation("flush", node))
        finally:
            _watching = watching

    def look(self, node: int = ROOT, path: Path | None = None) -> None:
        """Note what has changed on the disk since."""
        path = path or self._root
        names = self.folders[node]
        there = {entry.name: entry.is_dir() for entry in os.scandir(path)}
        for name in [*names]:
            if name not in there:
                self._remove(node, name)
        for name, is_folder in sorted(there.items()):
            if name not in names:
                self._make(node, name, None if is_folder else b"")
            child = names[name]
            if is_folder:
                self.look(child, path / name)
            elif (content := (path / name).read_bytes()) != self.files[child]:
                self._write(child, content)

    def _see_rename(self, source: tuple[int, str] | None, target: tuple[int, str] | None) -> None:
        if source is None and target is None:
            return
        assert source is not None and target is not None, "renamed into or out of the folder"
        self.look()
        (folder, name), (to_folder, to_name) = source, target
        if name not in self.folders[folder]:
            return
        node = self.folders[folder].pop(name)
        self.folders[to_folder][to_name] = node
        names = ((folder, name, None), (to_folder, to_name, node))
        self.operations.append(Operation("rename", node, names))

    def _make(self, folder: int, name: str, content: bytes | None) -> None:
        self._next += 1
        node = self._next
        self.folders[folder][name] = node
        if content is None:
            self.folders[node] = {}
        else:
            self.files[node] = content
        self.operations.append(Operation("make", node, ((folder, name, node),), content))

    def _write(self, node: int, content: bytes) -> None:
        self.files[node] = content
        self.operations.append(Operation("write", node, content=content))

    def _remove(self, folder: int, name: str) -> None:
        node = self.folders[folder].pop(name)
        self.operations.append(Operation("remove", node, ((folder, name, None),)))

    def _place(self, path: Any, folder: Any = None) -> tuple[int, str] | None:
        """Folder and name of a path below the root; None for others."""
        text = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        full = Path(os.path.abspath(text))
        full = full.parent.resolve() / full.name
        if not full.is_relative_to(self._root) or full == self._root:
            return None
        node = ROOT
        for part in full.relative_to(self._root).parts[:-1]:
            found = self.folders.get(node, {}).get(part)
            if found is None:
                self.look()
                found = self.folders.get(node, {}).get(part)
            if found is None:
                return None
            node = found
        return node, full.name

    def _paths(self, node: int, path: Path) -> Iterator[tuple[int, Path]]:
        yield node, path
        for name, child in self.folders.get(node, {}).items():
            yield from self._paths(child, path / name)


class _Disk:
    """Names and contents as programs see them, and as they are for certain on the disk."""

    def __init__(self, recording: Recording) -> None:
        self.names = {node: dict(names) for node, names in recording.folders.items()}
        self.contents = dict(recording.files)
        self.flushed_names = {node: dict(names) for node, names in recording.folders.items()}
        self.flushed_contents = dict(recording.files)
        self.pending: list[tuple[tuple[int, str, int | None], ...]] = []
        """Changes of names that may be lost, those of one operation together."""

    def apply(self, operation: Operation) -> None:
        node = operation.node
        if operation.kind == "make":
            if operation.content is None:
                self.names[node] = {}
                self.flushed_names[node] = {}
            else:
                self.contents[node] = operation.content
                self.flushed_contents[node] = b""
        elif operation.kind == "write":
            assert operation.content is not None
            self.contents[node] = operation.content
        elif operation.kind == "flush" and node in self.contents:
            self.flushed_contents[node] = self.contents[node]
        elif operation.kind == "flush":
            self.flushed_names[node] = dict(self.names[node])
            left = (tuple(n for n in names if n[0] != node) for names in self.pending)
            self.pending = [names for names in left if names]
        if operation.names:
            _change(self.names, operation.names)
            self.pending.append(operation.names)


def _change(
    names: Mapping[int, dict[str, int]], changes: Sequence[tuple[int, str, int | None]]
) -> None:
    for folder, name, node in changes:
        if node is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = node


@dataclass(frozen=True)
class Left:
    """A state that a power cut may leave behind."""

    moment: int
    """So many operations had been done."""
    what: str
    """What became of that which had not been flushed."""
    files: Mapping[str, bytes | None]
    """Contents by path; None for a folder."""
    running: Mapping[str, bytes | None]
    """The same as programs saw it before the cut."""

    @property
    def key(self) -> int:
        """Equal for equal files."""
        return hash(tuple(self.files.items()))

    def write(self, folder: Path) -> None:
        """Make it, in an empty folder."""
        for path, content in self.files.items():
            if content is None:
                (folder / path).mkdir()
            else:
                (folder / path).write_bytes(content)


_DATA = ("lost", "torn", "zeros", "whole")
"""What may become of content that was not flushed: as it was at the last flush (nothing, in a new
file); the first half of it; its length without its bytes; all of it."""


def power_cuts(recording: Recording, *, thorough: bool = True) -> Iterator[Left]:
    """Every prefix of the operations, in states that a power cut after it may leave.

    Of names that were not flushed, none and all of them are kept, each with every fate of content;
    and, where `thorough`, each alone and all but each, with the content lost.
    """
    disk = _Disk(recording)
    for moment in range(len(recording.operations) + 1):
        if moment:
            disk.apply(recording.operations[moment - 1])
        pending = disk.pending
        seen: set[int] = set()
        running = dict(_walk(disk.names, disk, "whole", ROOT, ""))
        choices = [("no name kept", []), ("all names kept", pending)]
        states = [(words, names, data) for words, names in choices for data in _DATA]
        if thorough and len(pending) > 1:
            for number, names in enumerate(pending):
                shown = names[-1][1]
                others = pending[:number] + pending[number + 1 :]
                states.append((f"of the names only {shown} kept", [names], "lost"))
                states.append((f"all names but {shown} kept", others, "lost"))
        for words, kept, data in states:
            names = {node: dict(entries) for node, entries in disk.flushed_names.items()}
            for changes in kept:
                _change(names, changes)
            files = dict(_walk(names, disk, data, ROOT, ""))
            left = Left(moment, f"{words}, content {data}", files, running)
            if left.key not in seen:
                seen.add(left.key)
                yield left


def _walk(
    names: Mapping[int, dict[str, int]], disk: _Disk, data: str, node: int, prefix: str
) -> Iterator[tuple[str, bytes | None]]:
    for name, child in sorted(names[node].items()):
        if child in names:
            yield prefix + name, None
            yield from _walk(names, disk, data, child, f"{prefix}{name}/")
            continue
        content, flushed = disk.contents[child], disk.flushed_contents[child]
        if content != flushed and data != "whole":
            content = {
                "lost": flushed,
                "torn": content[: len(content) // 2],
                "zeros": bytes(len(content)),
            }[data]
        yield prefix + name, content
