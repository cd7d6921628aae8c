"""Steps that are not finite: what is kept of them, so that they can be looked at and repeated.

    nonfinite/step-00000005/   adapter.safetensors step.json

Owns that folder: the adapter that the step began with, its rows as token ids with their places, and
what decided its dropout. Whether the run stops or leaves the step out is the loop's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from myna.data.store import Example
from myna.run_dir import make_folder, written_aside

ADAPTER, STEP = "adapter.safetensors", "step.json"

MOST_SKIPPED = 3
"""Steps of `WINDOW` that `on_nonfinite: skip` leaves out; with more of them something is wrong."""
WINDOW = 100


def too_many(skipped: Sequence[int], step: int) -> bool:
    """Whether leaving out `step` too would be more than `MOST_SKIPPED` in `WINDOW` steps."""
    return sum(step - WINDOW < earlier <= step for earlier in {*skipped, step}) > MOST_SKIPPED


def write_dump(
    root: Path,
    *,
    step: int,
    loss: float,
    grad_norm: float,
    rows: Sequence[int],
    examples: Sequence[Example],
    adapter: Mapping[str, Tensor],
    seed: int,
    plan: Mapping[str, object],
) -> Path:
    """Write what is needed to compute `step` again; the folder. Raises StorageError.

    `rows` are indices into the training set, `examples` those rows in that order.
    """
    folder = root / f"step-{step:08d}"
    make_folder(root)
    described = {
        "step": step,
        "loss": repr(loss),
        "grad_norm": repr(grad_norm),
        "seed": seed,
        "memory_plan": dict(plan),
        "rows": [
            {
                "row": row,
                "place": str(example.place),
                "prompt_ids": list(example.prompt_ids),
                "completion_ids": list(example.completion_ids),
            }
            for row, example in zip(rows, examples, strict=True)
        ],
    }
    with written_aside(folder) as aside:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
        (aside / ADAPTER).write_bytes(save(tensors))
        (aside / STEP).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return folder
