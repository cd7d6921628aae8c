"""Checkpoints: the state of a run at a step boundary, whole or absent.

    checkpoints/step-00000100/   adapter.safetensors optimizer.safetensors state.json MANIFEST.json

Owns writing them aside, the manifest of SHA-256 sums, finding the newest that is intact, and
removing old ones. Order is by step, never by the clock. No pickle is written or read. What the
tensors mean is known to `lora` and `optimizer`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from myna.errors import StorageError
from myna.run_dir import write_file, written_aside

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class State:
    """Where a run stands, besides its tensors."""

    step: int
    best_loss: float | None = None
    """Best held-out loss so far."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    loss_scaling: dict[str, Any] = field(default_factory=dict)
    """What torch's GradScaler keeps; empty but for float16."""
    plans: list[dict[str, Any]] = field(default_factory=list)
    """The run's memory plans so far, as `MemoryPlan.to_json`."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified."""

    state: State
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def folder_of(root: Path, step: int) -> Path:
    """`root/step-00000100` for step 100."""
    return root / f"step-{step:08d}"


def save_checkpoint(
    root: Path,
    state: State,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Write one checkpoint whole, then remove all but the newest `keep`.

    Raises StorageError where it could not be written; older checkpoints are then untouched.
    """
    folder = folder_of(root, state.step)
    with written_aside(folder) as aside:
        contents = {
            "adapter.safetensors": save(dict(adapter)),
            "optimizer.safetensors": save(dict(optimizer)),
            "state.json": json.dumps(asdict(state), indent=1).encode(),
        }
        manifest = {}
        for name, content in contents.items():
            (aside / name).write_bytes(content)
            manifest[name] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for old in _newest_first(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _newest_first(root: Path) -> list[Path]:
    return sorted(
        (path for path in root.glob("step-" + "[0-9]" * 8) if path.is_dir()), reverse=True
    )


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, or None where there is none.

    A damaged one is renamed to `*.corrupt`, told through `warn`, and the one before it is used.
    """
    for folder in _newest_first(root):
        fault = _fault(folder)
        if fault is None:
            return Checkpoint(
                State(**json.loads((folder / "state.json").read_text())),
                load_file(folder / "adapter.safetensors"),
                load_file(folder / "optimizer.safetensors"),
            )
        folder.rename(folder.with_name(folder.name + ".corrupt"))
        warn(f"checkpoint {folder.name} is damaged ({fault}); renamed to {folder.name}.corrupt")
    return None


def _fault(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest.items():
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if found != expected["sha256"]:
                return f"{name} does not have the bytes that were written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def save_best(root: Path, step: int, loss: float, adapter: Mapping[str, Tensor]) -> None:
    """Keep the adapter of the best held-out loss beside the checkpoints."""
    write_file(
        root / "best.safetensors", save(dict(adapter), {"step": str(step), "loss": repr(loss)})
    )


def load_best(root: Path) -> dict[str, Tensor]:
    """The adapter that `save_best` kept."""
    try:
        return load_file(root / "best.safetensors")
    except OSError as error:
        raise StorageError(
            f"{root / 'best.safetensors'}: the best adapter is gone: {error}."
        ) from None
