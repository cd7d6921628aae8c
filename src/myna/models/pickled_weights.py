"""Pickled weights: `.bin` shards into safetensors, once, in a cache folder.

A pickle can run any program. Owns the scan that refuses one with any global outside an allow-list
before torch opens it, and the conversion: shard by shard, in the memory of one shard, each file
written aside and renamed. Which shards a model has is left to `load.py`.
"""

import hashlib
import json
import os
import pickletools
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from myna.errors import ConfigError, StorageError

ALLOWED_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        "torch.DoubleStorage",
        "torch.FloatStorage",
        "torch.HalfStorage",
        "torch.BFloat16Storage",
        "torch.LongStorage",
        "torch.IntStorage",
        "torch.ShortStorage",
        "torch.CharStorage",
        "torch.ByteStorage",
        "torch.BoolStorage",
    }
)
"""What a pickle of tensors needs; BlueLM's shards use three of them."""


def cache_folder() -> Path:
    """Where converted weights are kept: `MYNA_CACHE`, else `~/.cache/myna`."""
    return Path(os.environ.get("MYNA_CACHE") or Path.home() / ".cache" / "myna").expanduser()


def scan_pickle(path: Path) -> None:
    """Refuse `path` unless it is a torch zip file whose pickle uses allowed globals only.

    Nothing in it is executed: the opcodes are read, not run.

    Raises ConfigError naming the first forbidden global, or that this is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".pkl")]
            if len(names) != 1 or Path(names[0]).name != "data.pkl":
                raise ConfigError(
                    f"{path}: holds the pickles {names}; a weight file of torch has data.pkl alone."
                )
            program = archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"{path}: not a zip file as torch >= 1.6 writes it; cut short, or of an older form.\n"
            "  Fetch it again, or a safetensors copy of the model."
        ) from error
    try:
        for opcode, argument, position in pickletools.genops(program):
            found = None
            if opcode.name == "GLOBAL":
                found = str(argument).replace(" ", ".")
            elif opcode.name in (
                "STACK_GLOBAL",
                "INST",
                "EXT1",
                "EXT2",
                "EXT4",
                "OBJ",
                "NEWOBJ_EX",
            ):
                found = f"something through opcode {opcode.name}"
            if found is not None and found not in ALLOWED_GLOBALS:
                raise ConfigError(
                    f"{path}: its pickle calls {found} (byte {position}), which weights do not "
                    "need: loading it could run a program.\n  It was not loaded. Use a safetensors "
                    "copy of the model from a source you trust."
                )
    except ValueError as error:
        raise ConfigError(f"{path}: its pickle is broken ({error}); fetch it again.") from error


def convert_pickled_weights(folder: Path, shards: Sequence[str]) -> Path:
    """Folder with the tensors of `shards` (files in `folder`) as safetensors and an index.

    All shards are scanned before the first is read. Converted once: the result lies in the cache
    under the paths, sizes and times of the sources. A conversion that was cut short goes on where
    it stopped, since only whole files have their final name and the index is written last.

    Raises ConfigError for a shard that is not plain weights, StorageError if the cache is full.
    """
    sources = [folder / name for name in shards]
    target = cache_folder() / "safetensors" / f"{folder.resolve().name}-{_key(sources)}"
    index_path = target / "model.safetensors.index.json"
    if index_path.is_file():
        return target
    for source in sources:
        scan_pickle(source)
    needed = sum(source.stat().st_size for source in sources)
    try:
        target.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target).free
        if free < needed:
            raise StorageError(
                f"{target}: {free / 1e9:.1f} GB free; converting {folder} to safetensors needs "
                f"{needed / 1e9:.1f} GB.\n  Free some, or set MYNA_CACHE to a folder with room."
            )
        weight_map: dict[str, str] = {}
        total_size = 0
        for number, source in enumerate(sources, start=1):
            name = f"model-{number:05d}-of-{len(sources):05d}.safetensors"
            tensors = _read_tensors(source)
            if not (target / name).is_file():
                aside = target / f"{name}.{os.getpid()}"
                save_file(tensors, aside, metadata={"format": "pt"})
                aside.replace(target / name)
            weight_map |= dict.fromkeys(tensors, name)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        aside = target / f"index.{os.getpid()}"
        aside.write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
        aside.replace(index_path)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot write the converted weights ({error}).\n  Set MYNA_CACHE to a "
            f"folder with {needed / 1e9:.1f} GB of room."
        ) from error
    return target


def _key(sources: Sequence[Path]) -> str:
    """Changes when a source is replaced; hashing 14 GB at every start would cost half a minute."""
    digest = hashlib.sha256()
    for source in sources:
        stat = source.stat()
        digest.update(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _read_tensors(source: Path) -> dict[str, Tensor]:
    """The flat name-to-tensor mapping of a scanned shard, no two sharing memory."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError and others when damaged
        raise ConfigError(f"{source}: damaged ({error}); fetch it again.") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ConfigError(f"{source}: not a flat mapping of names to tensors, as weights are.")
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        memory = value.untyped_storage().data_ptr()
        # safetensors refuses shared memory, which tied weights have.
        tensors[name] = value.contiguous() if memory not in seen else value.clone().contiguous()
        seen.add(memory)
    return tensors
