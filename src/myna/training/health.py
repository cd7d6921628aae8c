"""Signs that a run does not learn: weights that no gradient reaches, and a loss that jumps.

Owns the check after the first step, which stops a run, and the watch over the loss, which only says
something. Values that are not finite are `nonfinite.py`'s.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from torch import nn

from myna.data.store import Example
from myna.errors import ConfigError
from myna.training.optimizer import trainable


def check_gradients_arrive(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raise ConfigError for layers whose adapter the first step does not reach.

    At B = 0 every B has a gradient and no A has one. Experts that no token was sent to have none
    either, and where every row computes a single token, attention has nothing to choose from.
    """
    if all(len(example.prompt_ids) + len(example.completion_ids) <= 2 for example in examples):
        return
    dead = [
        name.removeprefix("base_model.model.")
        for name, parameter in trainable(model).items()
        if ".lora_B." in name
        and "expert" not in name
        and (parameter.grad is None or not bool(parameter.grad.any()))
    ]
    if dead:
        listed = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise ConfigError(
            f"After the first step {len(dead)} adapter weights have no gradient, so they would "
            f"never learn: {listed}.\n"
            "  Leave these layers out of lora.target_modules (parts of a model that text does not "
            "pass through, such as a vision tower, cannot learn from it)."
        )


class Divergence:
    """Says once in a while that the loss has jumped far above what it was."""

    TIMES, WINDOW, FEWEST = 10, 50, 10
    LEAST = 0.5
    """Nats a token. Rows that a model knows by heart have a thousandth, and a stumble is none."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._quiet = 0

    def note(self, loss: float) -> str | None:
        """A sentence where `loss` is more than ten times the median of the last fifty."""
        usual = statistics.median(self._recent) if len(self._recent) >= self.FEWEST else math.inf
        self._recent.append(loss)
        self._quiet = max(0, self._quiet - 1)
        if loss <= max(self.TIMES * usual, self.LEAST) or self._quiet:
            return None
        self._quiet = self.WINDOW
        return (
            f"the loss is {loss:.4g}, more than {self.TIMES} times the {usual:.4g} of the steps "
            "before; a lower learning rate may be needed"
        )
