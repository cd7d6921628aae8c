"""Adapter folders that were made to do harm, and what has to happen with them.

Owns the list, for `reliability.py` and for the tests: each entry spoils a good folder. The pickles
would leave a file named canary beside the folder if anything read them.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from myna.errors import MynaError
from myna.lora.adapter_file import AdapterMetadata, load_adapter, save_adapter
from myna.lora.inject import inject


def base() -> LlamaForCausalLM:
    """A tiny model that the good adapter fits."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def make_adapter(place: Path) -> Path:
    """A good adapter in `place`/adapter."""
    injected = inject(
        base(),
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules="all-linear",
        use_rslora=False,
        use_dora=False,
        init="default",
        seed=1,
    )
    folder = place / "adapter"
    save_adapter(injected.model, folder, metadata=AdapterMetadata(base_model="some/base"))
    return folder


def load(folder: Path) -> str:
    """What is wrong with how loading `folder` went: nothing, if it was refused with words."""
    model = base()
    names = [name for name, _ in model.named_parameters()]
    try:
        load_adapter(model, folder)
    except MynaError as error:
        if str(folder) not in str(error):
            return f"the message does not name the folder: {error}"
        if [name for name, _ in model.named_parameters()] != names:
            return "something was put into the model"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was loaded"


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def linked(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def pickled(folder: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return open, (str(folder.parent / "canary"), "w")

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch()))


def header(text: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + rest


FOLDERS: dict[str, Callable[[Path], object]] = {
    "rank of a thousand million": settings(r=10**9),
    "rank that is a text": settings(r="8"),
    "rank that is a truth": settings(r=True),
    "rank below one": settings(r=0),
    "negative rank": settings(r=-4),
    "rank pattern": settings(rank_pattern={"q_proj": 10**9}),
    "rank pattern that is a list": settings(rank_pattern=[1]),
    "huge alpha": settings(lora_alpha=1e300),
    "infinite alpha": settings(lora_alpha=float("inf")),
    "alpha that is not a number": settings(lora_alpha=float("nan")),
    "alpha pattern": settings(alpha_pattern={"q_proj": 1e30}),
    "regular expression that never ends": settings(target_modules=r"(a+)+$"),
    "choice that is repeated": settings(target_modules=r"(?:.|\.)*x"),
    "exclusion that never ends": settings(exclude_modules=r"((m|o|d)+)*$"),
    "key that never ends": settings(rank_pattern={r"(.*)*": 4}),
    "very long expression": settings(target_modules="a" * 10_000),
    "no expression": settings(target_modules="(("),
    "another kind of adapter": settings(peft_type="PROMPT_TUNING"),
    "no object": replaced("adapter_config.json", b"[]"),
    "nested without end": replaced("adapter_config.json", b"[" * 100_000),
    "settings of a gigabyte": lambda folder: os.truncate(folder / "adapter_config.json", 1 << 30),
    "link out of the folder": linked("adapter_model.safetensors", "/etc/hostname"),
    "link to a device": linked("adapter_model.safetensors", "/dev/zero"),
    "link to settings elsewhere": linked("adapter_config.json", "/etc/hostname"),
    "pickle only": pickled,
    "pickle under a safe name": replaced("adapter_model.safetensors", pickle.dumps({"a": 1})),
    "header that is no text": replaced("adapter_model.safetensors", header(b"\xff" * 8)),
    "header of many gigabytes": replaced("adapter_model.safetensors", struct.pack("<Q", 1 << 40)),
    "tensor beyond the file": replaced(
        "adapter_model.safetensors",
        header(b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'),
    ),
    "tensors that overlap": replaced(
        "adapter_model.safetensors",
        header(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b"\0" * 8,
        ),
    ),
    "shape that does not fit its bytes": replaced(
        "adapter_model.safetensors",
        header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}', b"\0" * 8),
    ),
    "file of nothing": replaced("adapter_model.safetensors", b""),
    "metadata that is none": replaced("myna.json", b"{"),
}
