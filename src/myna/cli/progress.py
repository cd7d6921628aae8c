"""What a person sees while a run trains: a bar with ETA, tokens/s and loss, and some lines.

Owns the display of events. It listens to the same events that `events.jsonl` keeps and knows
nothing else of the run.
"""

import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from myna.report.amounts import duration


class TrainingDisplay:
    """A listener for `EventLog`; a context manager that shows the bar."""

    def __init__(
        self, console: Console, *, total_steps: int, first_step: int, logging_steps: int
    ) -> None:
        self._console = console
        self._total = total_steps
        self._first = first_step
        self._every = logging_steps
        self._recent: deque[dict[str, Any]] = deque(maxlen=logging_steps)
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=first_step - 1, numbers=""
        )

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away; printed lines stay."""
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        match event["event"]:
            case "step":
                self._show_step(event)
            case "eval":
                scores = event.get("metrics", {})
                self._say(
                    f"step {event['step']:>6}  held-out loss {event['loss']:.4f}"
                    + "".join(f"  {escape(name)} {worth:.4g}" for name, worth in scores.items())
                )
            case "warning":
                self._say(f"[yellow]warning:[/] {event['message']}")

    def _show_step(self, event: dict[str, Any]) -> None:
        step = event["step"]
        self._recent.append(event)
        seconds = sum(entry["seconds"] for entry in self._recent)
        rate = sum(entry["tokens"] for entry in self._recent) / max(seconds, 1e-9)
        trained = sum(entry["trained_tokens"] for entry in self._recent)
        loss = sum(entry["loss"] * entry["trained_tokens"] for entry in self._recent) / trained
        self._progress.update(
            self._task, completed=step, numbers=f"loss {loss:.3f} · {rate:,.0f} tokens/s"
        )
        if step == self._first:
            left = event["seconds"] * (self._total - step)
            self._say(
                f"first step took {event['seconds']:.2f} s: about {duration(left)} to go, "
                f"until {time.strftime('%H:%M', time.localtime(time.time() + left))}"
            )
        if step % self._every == 0 or step == self._total:
            self._say(
                f"step {step:>6}  epoch {event['epoch']:.2f}  loss {loss:.4f}  "
                f"learning rate {event['learning_rate']:.2e}  {rate:,.0f} tokens/s"
            )

    def _say(self, text: str) -> None:
        self._console.print(text)
