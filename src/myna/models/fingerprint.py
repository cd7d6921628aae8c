"""The fingerprint of a base: which weights an adapter belongs to.

Owns one hash over the name, the shape and some values of every tensor, read from the files before
anything is loaded. It is a sample and says so: a base that was trained on, merged into, pruned or
exchanged has another fingerprint; one in which single numbers were altered by hand may have the
same. Values count as bfloat16, so that copies in another number format or in other shards are the
same base.
"""

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

WINDOWS = 4
"""Places of each tensor that are looked at."""
WIDTH = 64
"""Neighbouring values at each."""


def fingerprint_weights(files: Iterable[Path]) -> str:
    """`sampled:` and a SHA-256 over the tensors of these safetensors files, in whatever order."""
    samples: dict[str, bytes] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no dict)
                samples[name] = _sample(name, tensors.get_slice(name))
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return f"sampled:{digest.hexdigest()}"


def _sample(name: str, tensor: Any) -> bytes:
    shape = tuple(tensor.get_shape())
    draw = random.Random(name)
    found = [f"{name} {shape}".encode()]
    for _ in range(WINDOWS if all(shape) else 0):
        place: list[slice] = [slice(at, at + 1) for at in map(draw.randrange, shape[:-1])]
        if shape:
            start = draw.randrange(max(1, shape[-1] - WIDTH + 1))
            place.append(slice(start, start + WIDTH))
        values = tensor[tuple(place)].flatten().to(torch.float32).to(torch.bfloat16)
        found.append(values.view(torch.int16).numpy().tobytes())
    return b"\0".join(found)
