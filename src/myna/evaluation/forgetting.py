"""The forgetting probe: the loss on texts that have nothing to do with what was trained.

Owns the text that is shipped (`neutral.jsonl`: plain sentences in English and Chinese, written for
this purpose) and the two losses on a text. A model that is about to forget its language has a
higher loss on it with the adapter than without.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from myna.data.store import Example
from myna.evaluation.losses import Losses, losses_of

NEUTRAL = Path(__file__).with_name("neutral.jsonl")
"""One object a line, `text` in it."""


@dataclass(frozen=True)
class Forgetting:
    """Mean loss per token of a neutral text."""

    text: str
    """The text's name."""
    tokens: int
    """Tokens that are predicted."""
    base: float
    adapter: float

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def probe(model: Any, text: Path, examples: Sequence[Example], *, pad_id: int) -> Forgetting:
    """The losses of `model`, with its adapter's layers switched off and on, on `examples`."""
    losses: Losses = losses_of(model, examples, pad_id=pad_id)
    name = "neutral sentences, English and Chinese" if text == NEUTRAL else str(text)
    mean = losses.mean()
    return Forgetting(name, losses.tokens, mean["base"], mean["adapter"])
