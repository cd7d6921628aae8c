"""How many threads compute on a CPU, where HTTP and the clients want a core too.

Owns the trial and the choice, which is the process's.
"""

import statistics
import time

import torch
from transformers import PreTrainedModel

ROWS = 64
"""Answers in the step that is timed, a token of each."""
LONG_SECONDS = 0.1
"""A step that takes so long is arithmetic: all threads are worth having."""
MOST_TIMES = 1.5
"""How much longer a step may take with a thread fewer: a thread that waits for its core at every
product costs more."""
_TRIALS = 5


def leave_a_core(model: PreTrainedModel) -> str | None:
    """Compute with a thread fewer from now on where that costs little; returns a sentence then.

    Threads that are there already keep their number. On two cores, a model of 3 million
    parameters answered 495 tokens a second with both and 850 with one (benchmarks/README.md).
    Nothing is changed on other devices, with one thread (`OMP_NUM_THREADS=1`), and for models whose
    step is long.
    """
    threads = torch.get_num_threads()
    if model.device.type != "cpu" or threads == 1:
        return None
    ids = torch.zeros(ROWS, 1, dtype=torch.long)
    seconds: dict[int, list[float]] = {threads: [], threads - 1: []}
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
        for _ in range(_TRIALS):
            for number, found in seconds.items():
                torch.set_num_threads(number)
                begun = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                found.append(time.perf_counter() - begun)
            if seconds[threads][0] > LONG_SECONDS:
                break
    all_, fewer = (statistics.median(seconds[number]) for number in (threads, threads - 1))
    if all_ > LONG_SECONDS or fewer > MOST_TIMES * all_:
        torch.set_num_threads(threads)
        return None
    return (
        f"computing with {threads - 1} of {threads} threads: a step of {ROWS} answers takes "
        f"{1000 * fewer:.0f} ms in place of {1000 * all_:.0f} ms, and HTTP has a core"
    )
