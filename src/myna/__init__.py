"""myna: LoRA fine-tuning of chat models without silent mistakes and without wasted work.

Importing the package loads no torch: the names of the library (`myna.train`, `myna.open_speaker` …,
`api.py`) are looked up when they are used. `myna.cli` is the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myna.api import (
        Evaluation,
        Message,
        Run,
        Sampling,
        Speaker,
        evaluate,
        open_speaker,
        show_data,
        train,
    )

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "Message",
    "Run",
    "Sampling",
    "Speaker",
    "evaluate",
    "open_speaker",
    "show_data",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'myna' has no attribute {name!r}")
    from myna import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
