"""Signals: how a run is asked to stop, and how long it may take over it.

Owns what SIGINT, SIGTERM, SIGUSR1 (SLURM's `--signal`) and SIGHUP (a closed terminal) mean: the
first one a checkpoint at the next step boundary, the second one an end at once. Machines that are
taken away give 30 seconds between SIGTERM and SIGKILL (SLURM, Kubernetes, cloud providers' spot
machines) unless they say otherwise; when that time is nearly over, a step that is still being
computed is left.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from myna.errors import ConfigError, Interrupted
from myna.training.stop import StopRequest

GRACE = "MYNA_GRACE_SECONDS"
"""Environment variable: seconds between the first signal and SIGKILL, where they are not 30."""
_USUAL_GRACE = 30.0
_FOR_SAVING = 0.3
"""Share of the grace that is left for writing the checkpoint."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


@contextmanager
def signals_noted(console: Console) -> Iterator[StopRequest]:
    """Turn signals into the request to stop; restores the handlers that were there.

    Raises Interrupted at a second signal, and ConfigError for a grace that is no number.
    """
    grace = _grace()
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals are the main thread's, and whoever runs there answers them
        return

    def note(number: int, _: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True
        name = signal.Signals(number).name
        console.print(f"{name}: stopping after this step (again: at once)")
        # A person waits for the step, or sends the second signal; a machine does not.
        if number != signal.SIGINT:
            signal.setitimer(signal.ITIMER_REAL, grace * (1 - _FOR_SAVING))

    def hurry(_: int, __: FrameType | None) -> None:
        request.hurry()

    before = {
        number: signal.signal(number, note)
        for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name))
        # A job in the background ignores Ctrl-C, which is meant for the one in front.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, hurry)
    try:
        yield request
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped at once; the same command goes on from the last checkpoint."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, action in before.items():
            signal.signal(number, action)


def _grace() -> float:
    text = os.environ.get(GRACE, "")
    try:
        seconds = float(text) if text else _USUAL_GRACE
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{GRACE} is {text!r}; expected seconds, such as 120.")
    return seconds
