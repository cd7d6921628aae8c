"""Checkpoints: the state of a run at a step boundary, whole or absent.

    checkpoints/step-00000100/   adapter.safetensors optimizer.safetensors state.json MANIFEST.json

Owns writing them aside, in the background, from a copy; the manifest of SHA-256 sums; reading back
what was written; finding the newest that is intact; and removing old ones, never before the new one
is proven. Order is by step, never by the clock. No pickle is written or read. What the tensors mean
is known to `lora` and `optimizer`.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from myna.errors import ConfigError, StorageError
from myna.run_dir import make_folder, remove_leftovers, write_file, written_aside

SCHEMA = 1
"""Of the files and of `State`; raised by a change that an older version would misread."""
MANIFEST = "MANIFEST.json"
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its tensors."""

    step: int
    run: str = ""
    """Identity of the run; a checkpoint of another one is not used."""
    best_loss: float | None = None
    """Held-out loss of the best evaluation so far."""
    best_score: float | None = None
    """Its worth by the metric that the best is chosen by; None where that is the loss."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_steps: tuple[int, ...] = ()
    """Steps left out because loss or gradient was not finite (`on_nonfinite: skip`)."""
    loss_scaling: dict[str, Any] = field(default_factory=dict)
    """What torch's GradScaler keeps; empty but for float16."""
    plans: list[dict[str, Any]] = field(default_factory=list)
    """The run's memory plans so far, as `MemoryPlan.to_json`."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What else the bits of the result depend on (`device.environment`)."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified."""

    state: State
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]


@dataclass(frozen=True)
class Best:
    """The adapter of the best held-out loss so far."""

    step: int
    loss: float
    adapter: Mapping[str, Tensor]


def folder_of(root: Path, step: int) -> Path:
    """`root/step-00000100` for step 100."""
    return root / f"step-{step:08d}"


def checkpoint_bytes(model: nn.Module) -> int:
    """About the size of a checkpoint: the adapter and AdamW's two averages of it."""
    return 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


Outcome = tuple[int, Exception | None]
"""Step of a checkpoint, and why it could not be written."""


class CheckpointWriter:
    """Writes checkpoints while the run goes on, one after the other.

    `begin` takes a copy and returns; what became of it is told by `finished` or `wait`.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []

    def begin(
        self,
        state: State,
        adapter: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        best: Best | None = None,
    ) -> None:
        """Start writing a checkpoint, after the one before is done.

        `best` is written before it, so that no checkpoint speaks of a best adapter that is not
        there. It is not copied.
        """
        if self._thread is not None:
            self._thread.join()
        copies = [
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (adapter, optimizer)
        ]
        self._thread = threading.Thread(
            target=self._write, args=(state, *copies, best), name="checkpoint", daemon=False
        )
        self._thread.start()

    def finished(self) -> list[Outcome]:
        """What became of checkpoints that ended since this was last asked."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def wait(self) -> list[Outcome]:
        """`finished`, once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.finished()

    def _write(
        self,
        state: State,
        adapter: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        best: Best | None,
    ) -> None:
        error: Exception | None = None
        try:
            if best is not None:
                save_best(self._root, best)
            save_checkpoint(self._root, state, adapter, optimizer, keep=self._keep)
        except MemoryError:
            error = StorageError(f"{folder_of(self._root, state.step)}: no memory to write it.")
        except Exception as failure:  # a thread has nobody to raise it to
            error = failure
        self._outcomes = [*self._outcomes, (state.step, error)]


def save_checkpoint(
    root: Path,
    state: State,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Write one checkpoint whole, read it back, then remove all but the newest `keep`.

    A checkpoint of that step that is there and intact is left as it is. Raises StorageError where
    it could not be written or does not read back; older checkpoints are then untouched.
    """
    folder = folder_of(root, state.step)
    if folder.is_dir() and not isinstance(_read(folder), str):
        return folder
    contents = dict(
        zip(
            FILES,
            (
                save(dict(adapter)),
                save(dict(optimizer)),
                json.dumps(asdict(state), indent=1).encode(),
            ),
            strict=True,
        )
    )
    with written_aside(folder) as aside:
        for name, content in contents.items():
            (aside / name).write_bytes(content)
        (aside / MANIFEST).write_bytes(_manifest(contents))
    found = _read(folder)
    if isinstance(found, str):
        raise StorageError(
            f"{folder}: what was written does not read back ({found}).\n"
            "  The disk or its driver is failing; older checkpoints are untouched."
        )
    for old in _newest_first(root)[keep:]:
        trash = old.with_name(f".{old.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        try:
            old.rename(trash)
        except OSError as error:
            raise StorageError(f"{old}: could not be removed: {error.strerror}.") from error
        shutil.rmtree(trash, ignore_errors=True)
    return folder


def latest_checkpoint(
    root: Path, warn: Callable[[str], None], run: str | None = None
) -> Checkpoint | None:
    """The newest intact checkpoint, or None where there is none.

    A damaged one is renamed to `*.corrupt`, and the one before it is used, which is told through
    `warn`. One of another run than `run` is not used either and left where it is. Raises
    ConfigError for one that a newer version has written, StorageError where one cannot be renamed.
    """
    found = None
    damaged: list[tuple[int, str]] = []
    try:
        remove_leftovers(root)
        for folder in _newest_first(root):
            read = _read(folder)
            if isinstance(read, str):
                step, aside = int(folder.name.removeprefix("step-")), _put_aside(folder)
                damaged.append(
                    (step, f"checkpoint {folder.name} is damaged ({read}); renamed to {aside.name}")
                )
            elif run is None or read.state.run == run:
                found = read
                break
            else:
                warn(f"checkpoint {folder.name} belongs to another run and is not used")
    except OSError as error:
        raise StorageError(f"{root}: could not be put in order: {error}.") from error
    for step, what in damaged:
        warn(f"{what}. {_instead(step, found)}")
    return found


def _put_aside(folder: Path) -> Path:
    aside = folder.with_name(folder.name + ".corrupt")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.corrupt-{number}")
    return folder.rename(aside)


def _instead(step: int, found: Checkpoint | None) -> str:
    """What is used instead of the checkpoint of `step`, and what that costs."""
    lost = step if found is None else step - found.state.step
    steps = "1 step is" if lost == 1 else f"{lost:,} steps are"
    if found is None:
        return f"No other one is intact: the run begins again; {steps} lost and computed again"
    return f"The run goes on from step-{found.state.step:08d}; {steps} lost and computed again"


def _newest_first(root: Path) -> list[Path]:
    return sorted(
        (path for path in root.glob("step-" + "[0-9]" * 8) if path.is_dir()), reverse=True
    )


def _manifest(contents: Mapping[str, bytes], schema: int = SCHEMA) -> bytes:
    """Sizes and sums of all files, and a sum of these lines themselves."""
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    lines = json.dumps({"schema": schema, "files": files}, indent=1)
    return f"{lines}\n{hashlib.sha256(lines.encode()).hexdigest()}\n".encode()


def _read(folder: Path) -> Checkpoint | str:
    """What the folder holds, or what is wrong with it. Raises ConfigError for a newer version's."""
    try:
        manifest = (folder / MANIFEST).read_bytes()
        schema = _schema_of(folder, manifest)
        contents = {name: (folder / name).read_bytes() for name in FILES}
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    if manifest != _manifest(contents, schema):
        return _first_difference(manifest, contents)
    adapter, optimizer, state = contents.values()
    values = json.loads(state)
    values["skipped_steps"] = tuple(values["skipped_steps"])
    return Checkpoint(State(**values), load(adapter), load(optimizer))


def _schema_of(folder: Path, manifest: bytes) -> int:
    """The schema that an intact manifest names. Raises ConfigError where it is not known here."""
    lines, _, total = manifest.removesuffix(b"\n").rpartition(b"\n")
    if hashlib.sha256(lines).hexdigest().encode() != total:
        return SCHEMA  # damaged, as the comparison will find
    schema: int = json.loads(lines)["schema"]
    if schema > SCHEMA:
        raise ConfigError(
            f"{folder} was written by a newer version of myna: its format is {schema}, and this "
            f"version reads up to {SCHEMA}.\n"
            "  Go on with that version, or begin another run with --fresh."
        )
    return schema


def _first_difference(manifest: bytes, contents: Mapping[str, bytes]) -> str:
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest().encode() not in manifest:
            return f"{name} does not have the bytes that were written"
    return f"{MANIFEST} does not have the bytes that were written"


def save_best(root: Path, best: Best) -> None:
    """Keep the best adapter beside the checkpoints. Raises StorageError."""
    about = {"step": str(best.step), "loss": repr(best.loss)}
    try:
        make_folder(root)
    except OSError as error:
        raise StorageError(f"{root}: could not be made: {error.strerror}.") from error
    write_file(root / "best.safetensors", save(dict(best.adapter), about))


def load_best(root: Path) -> dict[str, Tensor]:
    """The adapter that `save_best` kept."""
    try:
        return load_file(root / "best.safetensors")
    except OSError as error:
        raise StorageError(
            f"{root / 'best.safetensors'}: the best adapter is gone: {error}."
        ) from None
