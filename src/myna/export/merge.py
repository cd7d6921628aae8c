"""Merging: an adapter added to its base, as a folder that plain transformers loads.

Owns the folder: its shards, config, generation settings, tokenizer with chat template, and card. It
is written aside, compared with base and adapter (`verify.py`), and gets its name only then. What
becomes of each tensor is `weights.py`'s.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from myna import __version__
from myna.device import free_unused_memory
from myna.errors import StorageError
from myna.export.origin import Origin, check_target
from myna.export.verify import (
    MOST_TEXTS,
    Agreement,
    compare,
    logits_of_folder,
    logits_with_adapter,
    place_for,
    refuse_disagreement,
)
from myna.export.weights import MergedWeights, merged_weights
from myna.models.tokenizer import save_tokenizer
from myna.run_dir import remove_leftovers_of, write_file, written_aside

SHARD_BYTES = 2_000_000_000
"""Largest file of weights; one of them is in memory at a time."""

Say = Callable[[str], None]


def merge(
    origin: Origin,
    out: Path,
    texts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    say: Say = lambda _: None,
) -> Agreement:
    """Write base and adapter of `origin` as one model to the folder `out`.

    Sums are made in float32 and stored as the base stores each tensor, or all in `dtype`. `texts`
    are token ids that the result is compared on. Nothing is at `out` until the comparison has
    passed.

    Raises ConfigError where it cannot be done or the result differs by more than rounding, and
    StorageError where it finds no room.
    """
    assert origin.adapter is not None, "a base alone has nothing to be merged"
    assert texts, "nothing to compare on"
    check_target(out, origin)
    weights = merged_weights(origin)
    check_room(out, _bytes(weights, dtype))
    remove_leftovers_of(out)
    for note in (*origin.notes, *weights.notes):
        say(note)
    texts = texts[:MOST_TEXTS]
    device, compared_in = place_for(weights.num_parameters)
    say(f"base and adapter read {len(texts)} texts on {device} …")
    reference = logits_with_adapter(origin.base, origin.adapter.folder, texts, device, compared_in)
    free_unused_memory(device, cycles=True)
    say(f"{len(weights.names):,} tensors are written …")
    with written_aside(out) as folder:
        write_file(folder / "config.json", _json(_settings(weights, dtype)))
        write_file(folder / "generation_config.json", _json(_generation(origin)))
        tokenizer = origin.tokenizer
        tokenizer.chat_template = origin.encoder.template.saved_source
        save_tokenizer(tokenizer, folder)
        _write_weights(weights, folder, dtype)
        say("the result is loaded and reads the same texts …")
        agreement = compare(
            reference, logits_of_folder(folder, texts, device, compared_in), compared_in
        )
        refuse_disagreement(agreement, dtype or weights.dtype)
        write_file(folder / "README.md", _card(origin, weights, agreement, dtype))
    return agreement


def check_room(out: Path, needed: int) -> None:
    """Raise StorageError where the disk has no room for `needed` bytes at `out`."""
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"{out}: the disk has {free / 1e6:,.0f} MB left, and this needs "
            f"{needed / 1e6:,.0f} MB; nothing was written.\n  Make room, or give another place."
        )


def _bytes(weights: MergedWeights, dtype: torch.dtype | None) -> int:
    total = 0
    for name in weights.names:
        total += _size(weights, name, dtype)
    return total + 32_000_000  # tokenizer, settings and the headers of the shards


def _size(weights: MergedWeights, name: str, dtype: torch.dtype | None) -> int:
    count = 1
    for size in weights.shape(name):
        count *= size
    return count * (dtype or weights.stored_dtype(name)).itemsize


def _shards(weights: MergedWeights, dtype: torch.dtype | None) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name in weights.names:
        size = _size(weights, name, dtype)
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write_weights(weights: MergedWeights, folder: Path, dtype: torch.dtype | None) -> None:
    shards = list(_shards(weights, dtype))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: weights.tensor(name).to(dtype or weights.stored_dtype(name)).contiguous()
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors writes files that only their owner may read.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_size(weights, name, dtype) for name in weights.names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(folder / "model.safetensors.index.json", _json(index))


def _settings(weights: MergedWeights, dtype: torch.dtype | None) -> dict[str, Any]:
    settings = dict(weights.settings)
    name = "dtype" if "dtype" in settings else "torch_dtype"
    settings[name] = str(dtype or weights.dtype).removeprefix("torch.")
    return settings


def _generation(origin: Origin) -> dict[str, Any]:
    """The base's generation settings with every id that ends an answer."""
    settings = {
        name: value for name, value in origin.generation.items() if name != "_from_model_config"
    }
    stop_ids = list(origin.stop_ids)
    if stop_ids:
        settings["eos_token_id"] = stop_ids if len(stop_ids) > 1 else stop_ids[0]
    if origin.tokenizer.bos_token_id is not None:
        settings["bos_token_id"] = origin.tokenizer.bos_token_id
    settings["pad_token_id"] = origin.pad_id
    return settings


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _card(
    origin: Origin, weights: MergedWeights, agreement: Agreement, dtype: torch.dtype | None
) -> str:
    system = origin.encoder.system
    persona = ""
    if system:
        quoted = system.replace("\n", "\n> ")
        persona = f"\nIt was trained with this system text:\n\n> {quoted}\n"
    notes = "".join(f"- {note}.\n" for note in (*origin.notes, *weights.notes))
    stored = str(dtype or weights.dtype).removeprefix("torch.")
    base = origin.base if not Path(origin.base).is_dir() else Path(origin.base).name
    return f"""---
base_model: {base}
library_name: transformers
tags: [lora, merged, myna]
---

# {origin.name}: {base} with its adapter merged

Made with myna {__version__}: the adapter was added in float32 to the base's original files, and the
sums are stored in {stored}. Base and adapter say the same but for rounding, on
{agreement}.

{notes}{persona}
The tokenizer, the chat template and every id that ends an answer are those of the training.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

No code comes with it, and none is needed.
"""
