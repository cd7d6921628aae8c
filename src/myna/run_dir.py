"""The run directory: its layout, its lock, and how files get into it without being half written.

    runs/NAME/
      config.yaml   plan.json   data.json   events.jsonl   run.lock
      checkpoints/step-00000100/   adapter/   loss.png   evaluation.json

Owns names and safe writing. What stands in the files belongs to the modules that fill them.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from myna.errors import ConfigError, RunLockedError, StorageError

RUNS = Path("runs")


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings, each with where it came from."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Choices that were measured: dtype, device, memory plans."""
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        """Row accounting and hashes of data, tokenizer, template and base."""
        return self.path / "data.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result: adapter, tokenizer, chat template."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        """What `myna eval` found: losses, metrics and answers of base and adapter."""
        return self.path / "evaluation.json"

    @property
    def loss_plot(self) -> Path:
        """The loss curve as a picture."""
        return self.path / "loss.png"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the kernel frees it when the process dies.

        Raises RunLockedError naming the other process, and ConfigError for a place in which files
        cannot be made, renamed and flushed to disk.
        """
        try:
            make_folder(self.path)
            descriptor = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(_unusable(self.path, error)) from None
        try:
            self._take(descriptor)
            self._try_out()
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            except OSError as error:
                raise ConfigError(_unusable(self.path, error)) from None
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        for attempt in range(5):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:  # `myna runs` holds it for a moment to see whether it is free
                if attempt < 4:
                    time.sleep(0.02)
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise RunLockedError(
            f"{self.path}: process {holder} is training in this directory.\n"
            "  Wait for it, or start another run with --fresh."
        )

    def _try_out(self) -> None:
        """Make, flush, rename and remove a file and a folder, as checkpoints will be."""
        probe, renamed = self.path / ".probe.tmp-0", self.path / ".probe.tmp-1"
        try:
            for left in (probe, renamed):  # by a process that was killed here
                shutil.rmtree(left, ignore_errors=True)
            probe.mkdir()
            write_file(probe / "file", b"probe")
            os.rename(probe, renamed)
            sync_folder(self.path)
            shutil.rmtree(renamed)
        except StorageError as error:
            raise ConfigError(_unusable(self.path, error.__cause__)) from None
        except OSError as error:
            raise ConfigError(_unusable(self.path, error)) from None

    def check_room(self, bytes_of_checkpoint: int) -> None:
        """Raise StorageError where the disk has no room for the checkpoints that are kept.

        Two and a half of them: one is written while two are there.
        """
        free = shutil.disk_usage(self.path).free
        needed = int(2.5 * bytes_of_checkpoint)
        if free < needed:
            raise StorageError(
                f"{self.path}: the disk has {free / 1e6:,.0f} MB left, and the checkpoints of this "
                f"run need {needed / 1e6:,.0f} MB.\n  Make room, choose another place with "
                "--output, or train a smaller lora.rank."
            )


def _unusable(path: Path, error: object) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"{path}: the run cannot be kept there: {reason}.\n"
        "  Choose another place with --output, or mend the permission."
    )


def next_free(path: Path) -> Path:
    """`path`, or `path-2`, `path-3` … : the first that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def newest_run(root: Path = RUNS) -> RunDir:
    """The run under `root` whose adapter was finished last; ConfigError where there is none."""
    finished = [RunDir(path.parent) for path in root.glob("*/adapter") if path.is_dir()]
    if not finished:
        raise ConfigError(
            f"{root.resolve()}: no finished run here.\n"
            "  Name a run directory or a model, or train one with `myna train`."
        )
    return max(finished, key=lambda run: run.adapter.stat().st_mtime_ns)


def write_file(path: Path, content: str | bytes) -> None:
    """Write whole or not at all: aside, flushed to disk, renamed.

    Raises StorageError with the path and the system's reason.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise StorageError(f"{path}: could not be written: {error.strerror}.") from error


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` on success and vanishes on failure.

    An existing `folder` is replaced. Every file is flushed to disk before the rename.
    Raises StorageError with the path and the system's reason.
    """
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        make_folder(folder.parent)
        aside.mkdir()
        yield aside
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                _sync(path)
        sync_folder(aside)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"{folder}: could not be written: {error}.") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, each name flushed to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def remove_leftovers(root: Path) -> None:
    """Remove what `write_file` and `written_aside` left in `root` when their process was killed.

    A folder that was being replaced at that moment gets its name back.
    """
    for path in sorted(root.glob(".*.old-*")):
        name = path.name[1:].rpartition(".old-")[0]
        if not (root / name).exists():
            path.rename(root / name)
    for pattern in (".*.tmp-*", ".*.old-*", ".*.trash"):
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
