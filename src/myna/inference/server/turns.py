"""Turns: whose requests are computed next.

Owns the order in which waiting answers are taken: models in turn (round robin, so that one with a
thousand requests does not keep another waiting longer than one turn), and within a model the one
that came first. What can be computed together has the same kind; the engine says which that is.
Not locked: the engine that owns it does that.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """Something that waits for its turn."""

    @property
    def model(self) -> str:
        """Whose turn it waits for."""

    @property
    def kind(self) -> Hashable:
        """What may be computed together with it: the same model and kind."""


W = TypeVar("W", bound=Waiting)


class Turns(Generic[W]):
    """Waiting answers; see the module."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[W]] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(queue) for queue in self._queues.values())

    def add(self, one: W) -> None:
        """Wait; a model without a waiting answer comes last."""
        self._queues.setdefault(one.model, deque()).append(one)

    def next(self) -> W | None:
        """The answer whose turn it is; it goes on waiting, its model behind the others."""
        if not self._queues:
            return None
        model, queue = next(iter(self._queues.items()))
        self._queues.move_to_end(model)
        return queue[0]

    def take(self, like: Waiting, count: int, fits: Callable[[W], bool] | None = None) -> list[W]:
        """Up to `count` answers of the model and kind of `like`, in order; they wait no longer."""
        queue = self._queues.get(like.model, deque())
        taken: list[W] = []
        for one in list(queue):
            if len(taken) >= count:
                break
            if one.kind == like.kind and (fits is None or fits(one)):
                taken.append(one)
        for one in taken:
            self.remove(one)
        return taken

    def others_wait(self, like: Waiting) -> bool:
        """Whether an answer waits that cannot be computed together with `like`."""
        return any(
            model != like.model or any(one.kind != like.kind for one in queue)
            for model, queue in self._queues.items()
        )

    def remove(self, one: W) -> bool:
        """Take an answer out; False where it does not wait."""
        queue = self._queues.get(one.model)
        if queue is None or one not in queue:
            return False
        queue.remove(one)
        if not queue:
            del self._queues[one.model]
        return True
